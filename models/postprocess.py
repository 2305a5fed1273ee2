"""Post-processing of detections: from model outputs to scores, labels and boxes in pixels.

Shapes: B images, Q queries, C class outputs, K results per image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.classification import Classification
from models.detector import full_precision
from models.segmentation_postprocess import PostProcessPanoptic, PostProcessSegm
from util.box_ops import box_cxcywh_to_xyxy
from util.settings import Settings


def build_postprocessors(
    settings: Settings, classification: Classification, things: Mapping[int, bool] | None = None
) -> dict[str, nn.Module]:
    """Return `bbox`, with a mask head also `segm`, and `panoptic` for panoptic data.

    things: category id -> whether it is a thing; panoptic data of any other dataset.
    """
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess(classification)}
    if settings.masks:
        postprocessors["segm"] = PostProcessSegm()
    if settings.masks and (things or settings.dataset_file == "coco_panoptic"):
        postprocessors["panoptic"] = PostProcessPanoptic(
            classification, things, reproduce_published=settings.reproduce_published
        )
    return postprocessors


class PostProcess(nn.Module):
    """Convert model outputs into detections.

    Softmax: one detection per query, its best class, in the order of the queries. Focal: the
    `top_k` best (query, class) pairs, best first; a query may appear with several classes. Boxes
    are (x0, y0, x1, y1) in pixels of the given sizes, not clipped, as published.
    """

    def __init__(self, classification: Classification, top_k: int = 100) -> None:
        super().__init__()
        self.classification, self.top_k = classification, top_k

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Post-process a batch.

        target_sizes: (height, width) of each image, [B, 2]. Returns `scores` [K], `labels` [K],
        `boxes` [K, 4] and `queries` [K], the query of each detection, of each image.
        """
        batch = self.detections(outputs, target_sizes)
        rows = zip(*(values.unbind() for values in batch.values()), strict=True)
        return [dict(zip(batch, row, strict=True)) for row in rows]

    def detections(self, outputs: dict, target_sizes: Tensor) -> dict[str, Tensor]:
        """Return what `forward` does of all images: `scores` [B, K], `boxes` [B, K, 4] and so on."""
        logits = full_precision(outputs["pred_logits"])  # [B, Q, C]
        boxes = full_precision(outputs["pred_boxes"])  # [B, Q, 4]
        if self.classification.kind == "softmax":
            # "No object" takes part in the softmax, but is no detection.
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q] each
            query = torch.arange(scores.shape[1], device=scores.device).expand_as(labels)  # [B, Q]
        else:
            num_classes = logits.shape[2]
            pair_scores = logits.sigmoid().flatten(1)  # [B, Q * C]
            num_results = min(self.top_k, pair_scores.shape[1])  # K; small models have fewer pairs
            scores, index = pair_scores.topk(num_results, dim=1)  # [B, K] each
            labels = index % num_classes
            query = torch.div(index, num_classes, rounding_mode="floor")  # [B, K]
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))  # [B, K, 4]

        boxes_xyxy_abs = to_pixels(boxes, target_sizes)
        return {"scores": scores, "labels": labels, "boxes": boxes_xyxy_abs, "queries": query}


class ClassAgnosticPostProcess(nn.Module):
    """Convert model outputs into class-agnostic detections: one per query, the `top_k` best first.

    label: the class output that scores objectness; None scores by the best of all classes. Boxes
    are (x0, y0, x1, y1) in pixels of the given sizes, not clipped. All labels are 1.
    """

    def __init__(
        self, classification: Classification, label: int | None = None, top_k: int = 1000
    ) -> None:
        super().__init__()
        self.classification, self.label, self.top_k = classification, label, top_k

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Post-process a batch, see `PostProcess.forward`."""
        logits = full_precision(outputs["pred_logits"])  # [B, Q, C]
        boxes = full_precision(outputs["pred_boxes"])  # [B, Q, 4]
        if self.classification.kind == "softmax":
            class_scores = logits.softmax(-1)[..., :-1]  # [B, Q, C - 1], without "no object"
        else:
            class_scores = logits.sigmoid()  # [B, Q, C]
        if self.label is None:
            scores = class_scores.amax(-1)  # [B, Q]
        else:
            scores = class_scores[..., self.label]  # [B, Q]

        scores, order = scores.topk(min(self.top_k, scores.shape[1]), dim=1)  # [B, K] each
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))  # [B, K, 4]
        boxes_xyxy_abs = to_pixels(boxes, target_sizes)
        labels = torch.ones_like(order)
        return [
            {"scores": s, "labels": k, "boxes": b, "queries": q}
            for s, k, b, q in zip(scores, labels, boxes_xyxy_abs, order, strict=True)
        ]


def to_pixels(boxes_cxcywh: Tensor, sizes_hw: Tensor) -> Tensor:
    """Scale normalized boxes to pixels.

    boxes_cxcywh: [B, K, 4] in [0, 1]. sizes_hw: (height, width) of each image, [B, 2]. Returns
    boxes_xyxy_abs [B, K, 4].
    """
    height, width = sizes_hw.to(boxes_cxcywh).unbind(1)  # [B] each
    scale = torch.stack([width, height, width, height], dim=1)  # [B, 4]
    return box_cxcywh_to_xyxy(boxes_cxcywh) * scale[:, None]  # [B, K, 4]
