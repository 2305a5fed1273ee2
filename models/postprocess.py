"""From the network's output to scores, labels and boxes in pixels."""

import torch
from torch import Tensor, nn

from models.classification import Classification
from models.detector import full_precision
from util.box_ops import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Softmax: each query gives its best class. Focal: the `top_k` best (query, class) pairs, best first.

    Boxes are (x0, y0, x1, y1) in pixels of the sizes asked for, not clipped, as published.
    """

    def __init__(self, classification: Classification, top_k: int = 100) -> None:
        super().__init__()
        self.classification, self.top_k = classification, top_k

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """target_sizes: [B, 2], (height, width) of each image. Returns for each image `scores` [K], `labels` [K],
        `boxes` [K, 4].
        """
        logits, boxes = (
            full_precision(outputs["pred_logits"]),
            full_precision(outputs["pred_boxes"]),
        )
        if self.classification.kind == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        else:
            num_pairs = logits.shape[1] * logits.shape[2]
            scores, index = logits.sigmoid().flatten(1).topk(min(self.top_k, num_pairs), dim=1)
            labels = index % logits.shape[2]
            query = torch.div(index, logits.shape[2], rounding_mode="floor")
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        boxes_xyxy_abs = to_pixels(boxes, target_sizes)
        return [
            {"scores": s, "labels": k, "boxes": b}
            for s, k, b in zip(scores, labels, boxes_xyxy_abs, strict=True)
        ]


class ClassAgnosticPostProcess(nn.Module):
    """One box of each query, whatever its class; the `top_k` best of an image, best first.

    label: the class output that says "object", whose score counts; None: the best of all classes. The boxes are
    (x0, y0, x1, y1) in pixels of the sizes asked for, not clipped, and have the label 1.
    """

    def __init__(
        self, classification: Classification, label: int | None = None, top_k: int = 1000
    ) -> None:
        super().__init__()
        self.classification, self.label, self.top_k = classification, label, top_k

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """As `PostProcess.forward`."""
        logits, boxes = (
            full_precision(outputs["pred_logits"]),
            full_precision(outputs["pred_boxes"]),
        )
        scores = (
            logits.softmax(-1)[..., :-1]
            if self.classification.kind == "softmax"
            else logits.sigmoid()
        )
        scores = scores.amax(-1) if self.label is None else scores[..., self.label]
        scores, order = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        boxes_xyxy_abs = to_pixels(boxes, target_sizes)
        labels = torch.ones_like(order)
        return [
            {"scores": s, "labels": n, "boxes": b}
            for s, n, b in zip(scores, labels, boxes_xyxy_abs, strict=True)
        ]


def to_pixels(boxes_cxcywh: Tensor, sizes_hw: Tensor) -> Tensor:
    """Normalised boxes [B, K, 4] -> (x0, y0, x1, y1) in pixels of images of (height, width) [B, 2]."""
    height, width = sizes_hw.to(boxes_cxcywh).unbind(1)
    scale = torch.stack([width, height, width, height], dim=1)
    return box_cxcywh_to_xyxy(boxes_cxcywh) * scale[:, None]
