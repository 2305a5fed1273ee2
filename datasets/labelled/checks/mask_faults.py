"""Faults of the masks of one image, which a worker process decodes.

Shapes: N objects of an image of h x w pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.labelled.coco_panoptic import VOID, boxes_of_masks, read_segment_ids
from datasets.labelled.segmentations import SegmentationError, Size, decode_mask
from datasets.sample import BadImageError

# The box around a mask differs from the annotated one if their IoU is below MIN_IOU, and one of their edges differs by
# more than MAX_EDGE_ERROR pixels: the IoU of tiny boxes says little.
MIN_IOU = 0.5
MAX_EDGE_ERROR = 3.0


class MaskFault(NamedTuple):
    """A fault of the mask of one object, or of an image's PNG.

    Attributes:
        kind: a key of `datasets.labelled.checks.table.KINDS`.
        position: of the object among those of its image; -1: the whole image.
        detail: what was found.
    """

    kind: str
    position: int
    detail: str


@dataclass(frozen=True)
class MaskSource:
    """What a worker process needs to check the masks of one image.

    Attributes:
        boxes_xyxy_abs: float32 [N, 4], (x0, y0, x1, y1) in pixels.
        size_hw: (height, width) of the decoded image.
        texts: [N], JSON of the segmentations; None for an object without one.
        segment_ids: int64 [N], of panoptic data.
        png: path of the PNG of panoptic data, else empty.
    """

    boxes_xyxy_abs: np.ndarray
    size_hw: Size
    texts: Sequence[str | None] = ()
    segment_ids: Sequence[int] = ()
    png: str = ""


def inspect_masks(source: MaskSource | None) -> list[MaskFault]:
    """Decode the masks of an image and return their faults."""
    if source is None:
        return []
    return list(_check_segments(source) if source.png else _check_segmentations(source))


def _check_segmentations(source: MaskSource) -> Iterator[MaskFault]:
    for position, text in enumerate(source.texts):
        if text is None:  # the parser of the annotations recorded it
            continue
        try:
            mask = decode_mask(text, source.size_hw)
        except SegmentationError as error:
            yield MaskFault("segmentation broken", position, str(error))
            continue
        if mask is None:
            yield MaskFault("no segmentation", position, "no polygon of three points")
        elif not mask.any():
            yield MaskFault("mask empty", position, "no pixel")
        else:
            yield from _compare_boxes(position, mask, source.boxes_xyxy_abs[position])


def _check_segments(source: MaskSource) -> Iterator[MaskFault]:
    try:
        ids = read_segment_ids(source.png)
    except BadImageError as error:
        yield MaskFault("panoptic PNG unusable", -1, str(error))
        return
    if ids.shape != source.size_hw:
        detail = f"{source.png} has {ids.shape[1]} x {ids.shape[0]} pixels, the image {source.size_hw[1]} x "
        yield MaskFault("panoptic PNG unusable", -1, f"{detail}{source.size_hw[0]}")
        return

    found = np.unique(ids)
    unlisted = np.setdiff1d(found, [VOID, *source.segment_ids])
    if len(unlisted):
        detail = f"{len(unlisted)} ids of {source.png} are not in its segments_info, the first is {unlisted[0]}"
        yield MaskFault("segment not listed", -1, detail)
    for position, segment_id in enumerate(source.segment_ids):
        if segment_id not in found:
            detail = f"segment {segment_id} has no pixel in {source.png}"
            yield MaskFault("segment without pixels", position, detail)
        else:
            box = source.boxes_xyxy_abs[position]
            yield from _compare_boxes(position, ids == segment_id, box)


def _compare_boxes(
    position: int, mask: np.ndarray, box_xyxy_abs: np.ndarray
) -> Iterator[MaskFault]:
    """Yield a fault if the box around a mask, [h, w], is not the annotated one."""
    height, width = mask.shape
    listed = np.clip(box_xyxy_abs, 0, [width, height, width, height])
    around = boxes_of_masks(mask[None] > 0)[0]  # [4]
    sides = np.minimum(listed[2:], around[2:]) - np.maximum(listed[:2], around[:2])
    overlap = np.prod(np.maximum(sides, 0))
    areas = [np.prod(box[2:] - box[:2]) for box in (listed, around)]
    if overlap < MIN_IOU * (sum(areas) - overlap) and abs(listed - around).max() > MAX_EDGE_ERROR:
        x0, y0, x1, y1 = around.tolist()
        yield MaskFault(
            "mask differs from box",
            position,
            f"the mask is in [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]",
        )
