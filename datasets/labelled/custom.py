"""A custom labelled dataset: a folder of images with a COCO file or a folder of VOC XML files. Labels start at 0.

Classes are matched by name. The training file defines the classes, in the order of their ids. A checkpoint that is
resumed or evaluated brings its own classes (`classes`). Results are written with the category ids of the user's file:
labels are mapped back.
"""

import os
from collections import Counter
from dataclasses import replace

import numpy as np

from datasets.images.image_folder import ImageFolder
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import (
    CocoDetection,
    ConvertedDetection,
    filter_annotations,
    labelled_transforms,
    read_annotations,
)
from datasets.labelled.voc import read_xml_folder, refuse_masks
from util.checkpoints.classes import Classes, compose_class_name, fold_class_name
from util.errors import UserError
from util.logger import log
from util.settings import Settings


class CustomDetection(CocoDetection):
    """Images of a COCO file whose classes are matched by name."""

    def validate(self, image_set: str) -> None:
        _check_categories_are_listed(self.annotations)
        super().validate(image_set)


def build_custom(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> CocoDetection:
    """Build the dataset of `--train_images` or `--val_images` with their annotations.

    Args:
        classes: meaning of the class head in a checkpoint. None: the classes of the file, for a new head.

    Raises:
        UserError: a flag or a file is missing, or the file contains something that makes training or evaluation wrong:
            two classes with the same name, categories that are used but not listed, or classes missing from `classes`.
    """
    folder, file = _paths(image_set, settings)
    from_xml = os.path.isdir(file)  # XML files have class names, but no category ids
    if from_xml:
        refuse_masks(settings, f"the XML files in {file}")
        annotations, ground_truth = read_xml_folder(file, folder), None
    else:
        annotations, ground_truth = read_annotations(file, image_set, settings, folder)
    annotations = filter_annotations(annotations, folder, image_set, settings)

    _check_class_names(annotations)
    if classes is not None:
        # An unlisted category has no name to match. For a new head `validate` checks this later, so that
        # tools/check_dataset.py can build the dataset and list every such annotation.
        _check_categories_are_listed(annotations)
    if classes is None:
        classes = _classes_of_file(annotations)
    elif not classes.named:
        classes = _resolve_nameless_classes(annotations, classes, has_ids=not from_xml)
    _check_num_classes(settings, classes)

    ids = _match_classes_by_name(annotations, classes)
    annotations = _remap_labels(annotations, ids, classes)
    transforms = labelled_transforms(image_set, settings)
    if from_xml:
        return ConvertedDetection(
            folder, annotations, transforms, num_classes=classes.num_classes, seed=settings.seed
        )
    return CustomDetection(
        folder,
        annotations,
        transforms,
        num_classes=classes.num_classes,
        seed=settings.seed,
        category_ids=_add_absent_classes(ids, classes),
        ground_truth=ground_truth,
    )


def _paths(image_set: str, settings: Settings) -> tuple[str, str]:
    """Return (image folder, COCO file or folder of XML files)."""
    if image_set == "train":
        folder, file = settings.train_images, settings.train_annotations
    else:
        folder, file = settings.val_images, settings.val_annotations

    if not folder or not file:
        missing = f"--{image_set}_annotations FILE" if folder else f"--{image_set}_images DIR"
        raise UserError(
            f"--dataset_file custom needs --{image_set}_images and --{image_set}_annotations: add {missing}"
        )
    if not os.path.isdir(folder):
        raise UserError(
            f"--{image_set}_images {folder} is not a folder: give the one that the file names in {file} are relative to"
        )
    return folder, file


def custom_images(image_set: str, settings: Settings) -> ImageFolder:
    """Raise an error: without labels, `--train_images` or `--imagenet_path` names the images.

    Raises:
        UserError: always. This builder is only reached if neither flag is given.
    """
    raise UserError(
        "no unlabelled images: --dataset_file custom needs --train_images DIR (any folder tree)"
    )


def _check_categories_are_listed(annotations: Annotations) -> None:
    if "category not listed" in annotations.findings:
        ids, _ = annotations.findings["category not listed"]  # [K, 2]
        annotation_id, image_id = ids[0].tolist()
        raise UserError(
            f"{annotations.source}: annotation {annotation_id} of image {image_id} has a category id that "
            "'categories' does not list: add the category with its name, or correct the id"
        )


def _check_class_names(annotations: Annotations) -> None:
    source, names = annotations.source, annotations.class_names
    if not names:
        raise UserError(f"{source} lists no categories: add an id and a name for each class")

    name, count = Counter(names.values()).most_common(1)[0]
    if count > 1:
        same = [category_id for category_id, other in names.items() if other == name]
        raise UserError(
            f"{source}: the categories {same} have the same name '{name}': classes are matched by name, so rename or "
            "merge them"
        )


def _classes_of_file(annotations: Annotations) -> Classes:
    """Return the classes of the file as labels 0 to K - 1, in the order of their ids."""
    ids = dict(enumerate(sorted(annotations.class_names)))
    names = {label: annotations.class_names[category_id] for label, category_id in ids.items()}
    return Classes(names, ids, len(names), annotations.source)


def _check_num_classes(settings: Settings, classes: Classes) -> None:
    if settings.was_given("num_classes") and settings.num_classes != classes.num_classes:
        raise UserError(
            f"--num_classes {settings.num_classes}, but {classes.source} has {classes.num_classes} classes: "
            "omit the flag"
        )


def _resolve_nameless_classes(
    annotations: Annotations, classes: Classes, *, has_ids: bool
) -> Classes:
    """Return what the rows of a class head without class names mean, and log it.

    In all published codebases a row is a category id of the training data. 91 rows are COCO's if all names in the file
    are COCO's. They can also be the default size, with other categories: so other names are matched by id.

    Args:
        has_ids: False for XML files, which number no classes.

    Raises:
        UserError: the file has other classes than COCO's, and category ids that the class head has no rows for.
    """
    names = annotations.class_names
    ids_fit = has_ids and all(0 <= category_id < classes.num_classes for category_id in names)
    if classes.names and set(names.values()) <= set(classes.names.values()):
        differing = {row: name for row, name in names.items() if classes.names.get(row) != name}
        if ids_fit and differing:
            row, name = next(iter(differing.items()))
            log.warning(
                "%s has no class names: its %d rows are taken to be COCO's, matched by name. In %s, %d of %d category "
                "ids are not COCO's (first: '%s' is %d): if the detector was trained with these ids, AP is wrong; "
                "then use --dataset_file coco, or add the entry 'class_names' (id -> name) to the checkpoint",
                classes.source,
                classes.num_classes,
                annotations.source,
                len(differing),
                len(names),
                name,
                row,
            )
        return classes

    if ids_fit:
        log.warning(
            "%s has no class names: its rows are taken to be the category ids of %s (%s); to match by name, add the "
            "entry 'class_names' (id -> name) to the checkpoint",
            classes.source,
            annotations.source,
            ", ".join(f"{category_id} {name}" for category_id, name in list(names.items())[:5]),
        )
        rows = {category_id: category_id for category_id in names}
        return Classes(dict(names), rows, classes.num_classes, classes.source)

    example = next(name for name in names.values() if name not in classes.names.values())
    raise UserError(
        f"{classes.source} has no class names, and its {classes.num_classes} rows are neither COCO's classes nor the "
        f"category ids of {annotations.source} (which has '{example}'), so classes can't be matched; use it as "
        "--pretrain, or add the entry 'class_names' (row -> name) to the checkpoint"
    )


def _match_classes_by_name(annotations: Annotations, classes: Classes) -> dict[int, int]:
    """Return label -> category id of the file, for the classes in the file.

    Raises:
        UserError: the file has a class that is not in `classes`.
    """
    # In descending order, so that the lowest label wins if a checkpoint has a name twice.
    labels = {name: label for label, name in sorted(classes.names.items(), reverse=True)}
    names = _adopt_spelling(annotations, list(labels))
    for category_id, name in names.items():
        if name not in labels:
            more = ", ..." if len(classes.names) > 8 else ""
            known = ", ".join(list(classes.names.values())[:8]) + more
            alike = [other for other in labels if fold_class_name(other) == fold_class_name(name)]
            hint = f"; did you mean '{alike[0]}'?" if alike else ""
            raise UserError(
                f"{annotations.source} has the category '{name}' (id {category_id}), {classes.source} does not "
                f"({known}): rename it, or remove it{hint}"
            )

    absent = [name for name in labels if name not in names.values()]
    if absent:
        log.info(
            "%s does not have %d of the %d classes: %s",
            annotations.source,
            len(absent),
            len(labels),
            ", ".join(absent[:8]),
        )
    return {labels[name]: category_id for category_id, name in names.items()}


def _adopt_spelling(annotations: Annotations, known: list[str]) -> dict[int, str]:
    """Return category id -> class name, with the known spelling of a name that looks the same.

    Such names differ in spaces or in the encoding of accents, which nobody sees in an editor.
    """
    visible = {compose_class_name(name): name for name in known}
    names, taken = {}, set(annotations.class_names.values())
    for category_id, name in annotations.class_names.items():
        same = visible.get(compose_class_name(name), name)
        if name not in known and same not in taken:
            log.warning(
                "%s: the category %a (id %d) is taken as %a, which looks the same: use one spelling",
                annotations.source,
                name,
                category_id,
                same,
            )
            taken.add(same)
            name = same
        names[category_id] = name
    return names


def _remap_labels(annotations: Annotations, ids: dict[int, int], classes: Classes) -> Annotations:
    """Return the annotations with labels of the class head instead of category ids.

    Args:
        ids: label -> category id.
    """
    pairs = sorted((category_id, label) for label, category_id in ids.items())
    category_ids, labels = np.array(pairs, dtype=np.int64).T  # [K], [K]
    remapped = labels[np.searchsorted(category_ids, annotations.labels)]  # [A]
    return replace(annotations, labels=remapped, class_names=dict(classes.names))


def _add_absent_classes(ids: dict[int, int], classes: Classes) -> dict[int, int]:
    """Return label -> category id with the classes that the file lacks.

    They get the id that they had in training, unless it belongs to another class in this file. Then they get none.
    """
    free = {
        label: category_id
        for label, category_id in classes.category_ids.items()
        if label not in ids and category_id not in ids.values()
    }
    return dict(sorted({**ids, **free}.items()))
