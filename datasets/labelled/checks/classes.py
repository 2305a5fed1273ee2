"""Findings in the classes: their labels, their names, and those of two splits."""

from collections.abc import Iterator

import numpy as np

from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split
from util.checkpoints.classes import fold_class_name


def find_labels_out_of_range(split: Split) -> Iterator[Finding]:
    labels = split.annotations.labels
    for row in np.flatnonzero(labels >= split.num_classes):
        detail = f"category id {labels[row]}, --num_classes {split.num_classes}"
        yield split.finding(split.annotations.image_indices[row], detail)


def find_categories_without_boxes(split: Split) -> Iterator[Finding]:
    """Yield the classes of the training set that nothing can teach."""
    if split.name != "train":
        return
    names = split.annotations.class_names
    for label in np.setdiff1d(list(names), split.annotations.labels).tolist():
        yield Finding("", split.name, split.annotations.source, f"'{names[label]}'")


def find_broken_class_names(split: Split) -> Iterator[Finding]:
    """Yield class names with half of a surrogate pair, which JSON can express. They are not valid Unicode."""
    for label, name in split.annotations.class_names.items():
        if any("\ud800" <= character <= "\udfff" for character in name):
            yield Finding("", split.name, split.annotations.source, f"class {label} is {name!a}")


def find_similar_class_names(split: Split) -> Iterator[Finding]:
    """Yield class names that are the same apart from case, spaces and the encoding of accents."""
    first: dict[str, str] = {}
    for name in split.annotations.class_names.values():
        other = first.setdefault(fold_class_name(name), name)
        if other != name:
            yield Finding("", split.name, split.annotations.source, f"{other!r} and {name!r}")


def find_class_mismatches(train: Split, val: Split) -> Iterator[Finding]:
    """Yield labels with different names in the two splits, and validation classes without training boxes."""
    names, others = train.annotations.class_names, val.annotations.class_names
    for label, name in others.items():
        if names.get(label, name) != name:
            detail = (
                f"class {label} is '{names[label]}' in {train.annotations.source} and '{name}' here"
            )
            yield Finding("", val.name, val.annotations.source, detail)

    untrained = np.setdiff1d(val.annotations.labels, train.annotations.labels).tolist()
    if untrained:
        some = ", ".join(others[label] for label in untrained[:3])
        more = ", ..." if untrained[3:] else ""
        detail = (
            f"{len(untrained)} classes have boxes here and none in {train.annotations.source}: "
            f"{some}{more}"
        )
        yield Finding("", val.name, val.annotations.source, detail)
