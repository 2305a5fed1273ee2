"""Findings in the annotations of a split: what the parser recorded, images and numbers of objects."""

import os
from collections.abc import Iterator

import numpy as np

from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split


def findings_of_parser(kind: str, split: Split) -> Iterator[Finding]:
    """Yield what `datasets.labelled.annotations` recorded while it parsed the file."""
    ids, names = split.annotations.findings.get(kind, (np.zeros((0, 2)), ()))
    notes = split.annotations.image_notes.get(kind, {})
    for (annotation_id, image_id), name in zip(ids.tolist(), names, strict=True):
        # An unlisted image has no file name: point to the annotation file instead.
        file = os.path.join(split.images.image_folder, name) if name else split.annotations.source
        known_id = annotation_id if annotation_id >= 0 else None
        known_image = image_id if image_id >= 0 else None
        yield Finding("", split.name, file, notes.get(image_id, ""), known_image, known_id)


def find_noted_images(kind: str, split: Split) -> Iterator[Finding]:
    """Yield the images of which the parser recorded a text in `image_notes`."""
    notes = split.annotations.image_notes.get(kind, {})
    if notes:
        for index in np.flatnonzero(np.isin(split.annotations.image_ids, list(notes))):
            yield split.finding(index, notes[int(split.annotations.image_ids[index])])


def find_unlisted_sizes(split: Split) -> Iterator[Finding]:
    unlisted = ~split.annotations.sizes_hw.all(1)  # [I]
    return (split.finding(index) for index in np.flatnonzero(unlisted))


def find_duplicate_file_names(split: Split) -> Iterator[Finding]:
    """Yield one finding per file, at the second image that lists it."""
    names = list(split.annotations.file_names)
    if len(set(names)) == len(names):
        return
    images: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        images.setdefault(name, []).append(index)

    for first, *others in images.values():
        if others:
            more = ", ..." if others[1:] else ""
            detail = f"also image {split.annotations.image_ids[first]}{more}"
            yield split.finding(others[0], detail)


def find_images_without_objects(split: Split) -> Iterator[Finding]:
    counts = np.diff(split.annotations.offsets)
    return (split.finding(index) for index in np.flatnonzero(counts == 0))


def find_more_objects_than_queries(split: Split) -> Iterator[Finding]:
    """Yield one finding per image, the image with the most objects first: it decides `--num_queries`."""
    counts = np.diff(split.annotations.offsets)
    over = np.flatnonzero(counts > split.num_queries)
    for index in over[np.argsort(-counts[over], kind="stable")]:
        yield split.finding(index, f"{counts[index]} objects, --num_queries {split.num_queries}")
