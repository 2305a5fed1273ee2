"""Box formats, IoU and generalized IoU (Rezatofighi et al., CVPR 2019)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from util.moved_names import moved_from

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("util.box_ops")


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert (cx, cy, w, h) to (x0, y0, x1, y1): [..., 4] -> [..., 4]."""
    center, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2  # [..., 2] each
    return torch.cat([center - half, center + half], dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert (x0, y0, x1, y1) to (cx, cy, w, h): [..., 4] -> [..., 4]."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]  # [..., 2] each
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _iou_and_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return IoU, union and generalized IoU of boxes whose shapes broadcast, [...] each.

    Two boxes without area give 0, never NaN.
    """
    low = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])  # [..., 2]
    high = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])  # [..., 2]
    side = (high - low).clamp(min=0)  # negative where the boxes do not overlap
    inter = side[..., 0] * side[..., 1]
    union = _area(a_xyxy) + _area(b_xyxy) - inter
    # Divide by the smallest normal number rather than by 0; other results stay unchanged.
    tiny = torch.finfo(union.dtype).tiny
    iou = inter / union.clamp(min=tiny)

    # The smallest box that encloses both.
    hull_low = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    hull_high = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    span = hull_high - hull_low  # [..., 2]
    hull = span[..., 0] * span[..., 1]
    return iou, union, iou - (hull - union) / hull.clamp(min=tiny)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairwise IoU and union: [..., N, 4] and [..., M, 4] -> [..., N, M] each."""
    iou, union, _ = _iou_and_giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])
    return iou, union


def generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return pairwise generalized IoU in [-1, 1]: [..., N, 4] and [..., M, 4] -> [..., N, M]."""
    return _iou_and_giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])[2]


def paired_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return generalized IoU of boxes paired one to one: [..., 4] and [..., 4] -> [...]."""
    return _iou_and_giou(a_xyxy, b_xyxy)[2]
