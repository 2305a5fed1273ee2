"""Boxes that are not [x, y, width, height] in pixels: fractions, percentages, corners and others.

Shapes: A objects of a split, N of them in images of known size.
"""

import os
from collections.abc import Iterator

import numpy as np

from datasets.labelled.annotations import Annotations
from datasets.labelled.box_formats import guess_format
from datasets.labelled.checks.boxes import exceed_files
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split, format_bbox

MIN_BOXES_FOR_FORMAT = 10  # fewer boxes say nothing about the format of all


def find_boxes_in_another_format(split: Split) -> Iterator[Finding]:
    """Yield one finding if nearly all boxes that do not fit into their images would do so in another format.

    They may be a small part of the file. `find_corner_boxes` looks at whole files and classes.
    """
    found = describe_format(split)
    if found and not any(find_corner_boxes(split)):
        yield Finding("", split.name, split.annotations.source, found)


def describe_format(split: Split) -> str:
    """Return which format the boxes that do not fit into their images are probably in, as text; empty: not known."""
    annotations, misfits = split.annotations, split.annotations.misfits
    rows = np.flatnonzero(exceed_files(split))
    boxes = np.concatenate([misfits.boxes_xyxy_abs, annotations.boxes_xyxy_abs[rows]])  # [K, 4]
    sizes = np.concatenate(
        [misfits.sizes_hw, split.sizes_hw[annotations.image_indices[rows]]]
    )  # [K, 2]
    # Only formats with corners have a mark for difficult objects.
    guess = guess_format(boxes, sizes, from_corners=annotations.difficult is not None)
    if guess is None:
        return ""
    name, fits = guess
    first = int(np.flatnonzero(fits)[0])
    count = len(misfits.boxes_xyxy_abs)
    example = (
        misfit_finding(split, first) if first < count else split.box_finding(rows[first - count])
    )
    what = f"{fits.sum()} of {len(boxes)} boxes that exceed their image or have no area"
    return f"{what} fit as {name}, such as {example}"


def misfit_finding(split: Split, index: int) -> Finding:
    """Return one of the boxes that do not fit into their images, as a finding."""
    misfits = split.annotations.misfits
    annotation_id, image_id = misfits.ids[index].tolist()
    box = misfits.boxes_xyxy_abs[index]
    if split.annotations.difficult is None:
        text = format_bbox(box)
    else:  # VOC counts from 1
        text = "bndbox [" + ", ".join(f"{value:g}" for value in box + [1, 1, 0, 0]) + "]"
    height, width = misfits.sizes_hw[index].tolist()
    if height and width:
        text += f" in {width:g} x {height:g} pixels"
    return Finding(
        "",
        split.name,
        os.path.join(split.images.image_folder, misfits.files[index]),
        text,
        image_id,
        annotation_id if annotation_id >= 0 else None,
    )


def find_fraction_boxes(split: Split) -> Iterator[Finding]:
    return (split.box_finding(row) for row in np.flatnonzero(are_fractions(split.annotations)))


def are_fractions(annotations: Annotations) -> np.ndarray:
    """Return which boxes are fractions of the image, bool [A]; 1 may be rounded up.

    Those of XML files end within the first pixel. Of `bbox` all four numbers do, whether they mean the upper left
    corner, the center, or two corners.
    """
    first, last = np.split(annotations.boxes_xyxy_abs, 2, axis=1)  # [A, 2], [A, 2]
    return ((last <= 1.01) | (np.maximum(first, last - first) <= 1.01)).all(1)


def find_percent_boxes(split: Split) -> Iterator[Finding]:
    """Yield one finding if no box ends beyond 100, and enough of them are in images of at least twice that size."""
    rows, sizes_wh = boxes_with_sizes(split)  # [N], [N, 2]
    large = (sizes_wh >= 200).all(1)  # in smaller images, boxes in pixels rarely end beyond 100
    if large.sum() < MIN_BOXES_FOR_FORMAT or are_fractions(split.annotations).all():
        return
    if (split.annotations.boxes_xyxy_abs[rows, 2:] <= 100.5).all():
        width, height = sizes_wh[large].min(0)
        detail = (
            f"no box ends beyond 100, {large.sum()} of them in images of at least {width} x {height} pixels, such as "
            f"{split.box_finding(rows[large][0])}"
        )
        yield Finding("", split.name, split.annotations.source, detail)


def find_corner_boxes(split: Split) -> Iterator[Finding]:
    """Yield one finding if `bbox` looks like [x0, y0, x1, y1] instead of [x, y, width, height].

    It may do so in the whole file, or in the boxes of some classes: merged files often come from several programs.
    """
    rows, sizes_wh = boxes_with_sizes(split)  # [N], [N, 2]
    evidence = _CornerEvidence(split.annotations, rows, sizes_wh)
    everything = np.arange(len(rows))
    found = everything if evidence.is_convincing(everything) else everything[:0]
    if not len(found) and evidence.are_corners.any():
        labels = split.annotations.labels[rows]  # [N]
        order = np.argsort(labels, kind="stable")
        classes = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        found = np.concatenate([everything[:0], *filter(evidence.is_convincing, classes)])
    if len(found):
        detail = f"{len(found)} boxes, such as {split.box_finding(rows[found[0]])}"
        yield Finding("", split.name, split.annotations.source, detail)


class _CornerEvidence:
    """What tells that `bbox` means two corners.

    Attributes:
        are_corners: bool [N], boxes that are inside their image as corners.
        exceed: bool [N], boxes that exceed their image as x, y, width and height.
        have_area: bool [N], boxes whose `area` is that between two corners.
    """

    def __init__(self, annotations: Annotations, rows: np.ndarray, sizes_wh: np.ndarray) -> None:
        boxes = annotations.boxes_xyxy_abs[rows].astype(np.float64)  # [N, 4]
        # The first and the last two numbers of `bbox`.
        first = boxes[:, :2]  # [N, 2]
        second = boxes[:, 2:] - boxes[:, :2]  # [N, 2]
        self.are_corners = (second > first).all(1) & (second <= sizes_wh + 1).all(1)
        self.exceed = (boxes[:, 2:] > sizes_wh + 1).any(1)
        areas = annotations.areas[rows]
        between = (second - first).prod(1)
        # `area` may be rounded. That of a box at the origin is the same in both formats.
        self.have_area = np.isclose(areas, between, rtol=0.01, atol=1) & ~np.isclose(
            areas, second.prod(1), rtol=0.01, atol=1
        )

    def is_convincing(self, part: np.ndarray) -> bool:
        """As corners, all boxes must be inside their image. Otherwise, some must exceed it, or the area be wrong."""
        return (
            len(part) >= MIN_BOXES_FOR_FORMAT
            and self.are_corners[part].mean() >= 0.99
            and (self.exceed[part].mean() >= 0.1 or self.have_area[part].mean() >= 0.9)
        )


def boxes_with_sizes(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [N] of the objects in images of known size, and these sizes, (width, height), [N, 2]."""
    sizes_wh = split.sizes_hw[split.annotations.image_indices, ::-1]  # [A, 2]
    rows = np.flatnonzero(sizes_wh.all(1))
    return rows, sizes_wh[rows]
