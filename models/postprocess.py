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
        logits, boxes = full_precision(outputs["pred_logits"]), full_precision(outputs["pred_boxes"])
        if self.classification.kind == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        else:
            num_pairs = logits.shape[1] * logits.shape[2]
            scores, index = logits.sigmoid().flatten(1).topk(min(self.top_k, num_pairs), dim=1)
            labels = index % logits.shape[2]
            query = torch.div(index, logits.shape[2], rounding_mode="floor")
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        height, width = target_sizes.to(boxes).unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)
        boxes_xyxy_abs = box_cxcywh_to_xyxy(boxes) * scale[:, None]
        return [{"scores": s, "labels": k, "boxes": b} for s, k, b in zip(scores, labels, boxes_xyxy_abs, strict=True)]
