"""Findings in single boxes: outside their image, or listed twice."""

from collections.abc import Iterator

import numpy as np

from datasets.labelled.box_formats import exceeds_image, has_visible_area
from datasets.labelled.checks.annotations import findings_of_parser
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split, format_bbox


def find_boxes_outside_files(split: Split) -> Iterator[Finding]:
    """Yield the boxes that are outside their image, where only the file tells its size."""
    for row in np.flatnonzero(are_outside_files(split)):
        index = np.searchsorted(split.annotations.offsets, row, side="right") - 1
        height, width = split.sizes_hw[index]
        yield split.box_finding(row, f", the file has {width} x {height} pixels")


def are_outside_files(split: Split) -> np.ndarray:
    """Return which boxes are outside the pixels of their file, bool [A]. The parser skips those of listed sizes."""
    annotations = split.annotations
    return ~has_visible_area(annotations.boxes_xyxy_abs, split.sizes_hw[annotations.image_indices])


def find_boxes_partly_outside(split: Split) -> Iterator[Finding]:
    """Yield what the parser recorded, and the same where only the file tells the size of an image."""
    yield from findings_of_parser("box partly outside", split)
    for row in np.flatnonzero(exceed_files(split) & ~are_outside_files(split)):
        yield split.box_finding(row)


def exceed_files(split: Split) -> np.ndarray:
    """Return which boxes exceed their image, where only the file tells its size, bool [A]."""
    annotations = split.annotations
    listed = annotations.sizes_hw.all(1)  # [I]
    sizes = np.where(listed[:, None], 0, split.sizes_hw)[annotations.image_indices]  # [A, 2]
    return sizes.all(1) & exceeds_image(annotations.boxes_xyxy_abs, sizes)


def find_duplicate_boxes(split: Split) -> Iterator[Finding]:
    annotations = split.annotations
    # Floats are compared by their bits. Adding 0 turns -0.0, which has other bits, into 0.0.
    bits = (annotations.boxes_xyxy_abs + 0).view(np.int32)  # [A, 4]
    rows = np.column_stack([annotations.image_indices, annotations.labels, bits])  # [A, 6]

    # One hash per row, since one number sorts faster than six. Different rows may share a hash, so the loop below
    # compares whole rows.
    hashes = rows @ np.random.default_rng(0).integers(2**62, size=6)  # [A]
    _, groups, counts = np.unique(hashes, return_inverse=True, return_counts=True)

    seen: set[tuple[int, ...]] = set()
    for row in np.flatnonzero(counts[groups] > 1):
        key = tuple(rows[row].tolist())
        if key not in seen:
            seen.add(key)
            continue
        name = annotations.class_names[int(annotations.labels[row])]
        detail = f"{name}, {format_bbox(annotations.boxes_xyxy_abs[row])}"
        yield split.finding(annotations.image_indices[row], detail)
