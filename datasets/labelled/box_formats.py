"""Boxes that do not fit into their images: what share of a file they are, and which format they are probably in.

Shapes: K boxes that exceed their image or are skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from datasets.images.packed_strings import PackedStrings

# Pixels that a box may exceed its image without a warning: published boxes are rounded.
BOX_TOLERANCE = 1.0

MIN_BOXES = 5  # fewer boxes that exceed their image say nothing about a format
MIN_FITTING = 0.9  # fraction of them that must fit in another format
# Objects that annotators draw beyond the border exceed it by a small part of their size. In a wrong format, half of the
# boxes exceed their image by more than this fraction of it.
MIN_EXCESS = 0.1


def _empty(*shape: int) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(shape)


@dataclass(frozen=True)
class Misfits:
    """Boxes of a file that exceed their image, or are skipped because they have no area in it.

    Attributes:
        total: boxes of the file that are no crowds and belong to a listed image.
        skipped: bool [K].
        boxes_xyxy_abs: [K, 4], in pixels, as read.
        sizes_hw: [K, 2], of their images; 0 if the file does not say.
        ids: int64 [K, 2], annotation id (-1 if there is none) and image id.
        files: [K], names of the images.
    """

    total: int = 0
    skipped: np.ndarray = field(default_factory=_empty(0))
    boxes_xyxy_abs: np.ndarray = field(default_factory=_empty(0, 4))
    sizes_hw: np.ndarray = field(default_factory=_empty(0, 2))
    ids: np.ndarray = field(default_factory=_empty(0, 2))
    files: PackedStrings = field(default_factory=lambda: PackedStrings(()))


def exceeds_image(boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Return whether each box exceeds its image by more than BOX_TOLERANCE, bool [A].

    An image size of 0 is unknown: there is no upper limit.
    """
    limit = np.where(sizes_hw > 0, sizes_hw, np.inf)[:, ::-1]  # [A, 2], (width, height)
    below = (boxes_xyxy_abs[:, :2] < -BOX_TOLERANCE).any(1)
    above = (boxes_xyxy_abs[:, 2:] > limit + BOX_TOLERANCE).any(1)
    return below | above


def has_visible_area(boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Return whether a part of each box is inside its image, bool [A].

    Args:
        boxes_xyxy_abs: [A, 4], (x0, y0, x1, y1) in pixels.
        sizes_hw: [A, 2], size of each box's image. A size of 0 is unknown: there is no upper limit.
    """
    limit = np.where(sizes_hw > 0, sizes_hw, np.inf)[:, ::-1]  # [A, 2], (width, height)
    low = np.clip(boxes_xyxy_abs[:, :2], 0, limit)
    high = np.clip(boxes_xyxy_abs[:, 2:], 0, limit)
    return (high > low).all(1)


def guess_format(
    boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray, *, from_corners: bool
) -> tuple[str, np.ndarray] | None:
    """Return in which other format boxes fit into their images: (its name, bool [K], which ones do). None: in no other.

    Args:
        boxes_xyxy_abs: [K, 4], as read, of which none fits as it is.
        sizes_hw: [K, 2], of their images; 0 if unknown.
        from_corners: whether the file has corners (VOC's XML) instead of x, y, width, height (COCO).
    """
    known = sizes_hw.all(1) & np.isfinite(boxes_xyxy_abs).all(1)
    boxes, sizes = boxes_xyxy_abs[known].astype(np.float64), sizes_hw[known]
    if len(boxes) < MIN_BOXES or np.median(_excess(boxes, sizes)) < MIN_EXCESS:
        return None
    formats = _FORMATS_OF_CORNERS if from_corners else _FORMATS_OF_BBOX
    for name, convert in formats.items():
        converted = convert(boxes)
        fits = (converted[:, 2:] > converted[:, :2]).all(1) & ~exceeds_image(converted, sizes)
        if fits.mean() >= MIN_FITTING:
            all_fits = np.zeros(len(known), dtype=bool)
            all_fits[known] = fits
            return name, all_fits
    return None


def _excess(boxes: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Return the part of each box's width or height that is outside of its image, [K]; 1 without area."""
    first, last = boxes[:, :2], boxes[:, 2:]  # [K, 2], [K, 2]
    outside = np.maximum(-first, 0) + np.maximum(last - sizes_hw[:, ::-1], 0)
    extent = last - first
    parts = np.where(extent > 0, outside / np.where(extent > 0, extent, 1), 1)
    return parts.max(1).clip(max=1)


def _swap_axes(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, [1, 0, 3, 2]]


def _from_centers(boxes: np.ndarray) -> np.ndarray:
    """From (cx, cy, cx + width, cy + height)."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2  # [K, 2]
    return boxes - np.hstack([half, half])


# Format that the numbers in the file have -> from the boxes as read, (x0, y0, x1, y1), to what they mean, the most
# specific one first.
_FORMATS_OF_BBOX: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "corners [x0, y0, x1, y1]": lambda boxes: np.hstack(
        [boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]
    ),
    "[y, x, height, width], x and y swapped": _swap_axes,
    "centers [cx, cy, width, height] in pixels": _from_centers,
}
_FORMATS_OF_CORNERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ymin, xmin, ymax, xmax, x and y swapped": _swap_axes,
    "x, y, width, height": lambda boxes: np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
}
