"""Boxes as (cx, cy, w, h) and (x0, y0, x1, y1), their overlap and generalised IoU (Rezatofighi et al., CVPR 2019)."""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]"""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]"""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _iou_and_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, union and generalised IoU of boxes whose shapes broadcast. Two boxes without area give 0, never NaN."""
    low = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    side = (high - low).clamp(min=0)
    inter = side[..., 0] * side[..., 1]
    union = _area(a_xyxy) + _area(b_xyxy) - inter
    tiny = torch.finfo(union.dtype).tiny
    iou = inter / union.clamp(min=tiny)
    span = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    hull = span[..., 0] * span[..., 1]
    return iou, union, iou - (hull - union) / hull.clamp(min=tiny)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise IoU and union of [..., N, 4] with [..., M, 4]: two tensors [..., N, M]."""
    iou, union, _ = _iou_and_giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])
    return iou, union


def generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Pairwise generalised IoU in [-1, 1] of [..., N, 4] with [..., M, 4]: [..., N, M]."""
    return _iou_and_giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])[2]


def paired_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes paired one to one: [..., 4], [..., 4] -> [...]."""
    return _iou_and_giou(a_xyxy, b_xyxy)[2]
