"""Findings in the masks of a split. `tools/check_dataset.py` decodes all of them."""

from collections.abc import Iterator

import numpy as np

from datasets.labelled.checks.annotations import findings_of_parser
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.mask_faults import MaskSource
from datasets.labelled.checks.split import Split
from datasets.labelled.coco_panoptic import CocoPanoptic


def has_masks(split: Split) -> bool:
    """Return whether a split has masks that can be checked."""
    if split.annotations is None:
        return False
    return split.annotations.segmentations is not None or isinstance(split.images, CocoPanoptic)


def mask_source(split: Split, index: int) -> MaskSource | None:
    """Return the masks of an image; None if there are none, or the image itself can't be used."""
    info, annotations = split.image_infos[index], split.annotations
    listed_hw = split.listed_hw(index)
    if info.error or (all(listed_hw) and listed_hw != info.size_hw):
        return None
    rows = np.arange(annotations.offsets[index], annotations.offsets[index + 1])
    boxes = annotations.boxes_xyxy_abs[rows]
    if isinstance(split.images, CocoPanoptic):
        ids, png = annotations.ids[rows], split.images.panoptic_path(index)
        return MaskSource(boxes, info.size_hw, segment_ids=ids, png=png)
    return MaskSource(boxes, info.size_hw, annotations.texts_of(rows))


def find_mask_faults(kind: str, split: Split) -> Iterator[Finding]:
    """Yield the faults of one kind that `inspect_masks` found."""
    for index, faults in enumerate(split.mask_faults):
        for fault in faults:
            if fault.kind == kind and fault.position < 0:
                yield split.finding(index, fault.detail)
            elif fault.kind == kind:
                row = int(split.annotations.offsets[index]) + fault.position
                yield split.box_finding(row, f", {fault.detail}")


def find_unsegmented_objects(split: Split) -> Iterator[Finding]:
    """Yield what the parser recorded, and what only decoding shows."""
    yield from findings_of_parser("no segmentation", split)
    yield from find_mask_faults("no segmentation", split)
