"""A detector as one function of tensors, and its graph with dynamic batch and image size by `torch.export`.

Shapes: B images of one size H x W, Q queries, C class outputs, K detections per image, h1 x w1 a quarter of H x W.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datasets.collate import normalize_images
from models.frozen_norm import bake_frozen_norms
from models.postprocess import PostProcess
from predictor import Predictor

# Batch and image size at which the graph is recorded. Every map has more than one cell, down to stride 64.
EXAMPLE_SHAPE = (2, 3, 160, 224)


class Graph(nn.Module):
    """A detector of images of one size, without padding.

    Inputs: `images`, normalized float32 or with `normalization` uint8 [B, 3, H, W], RGB; with `postprocess` also
    `sizes_hw`, int64 [B, 2], height and width of the original images.

    Outputs: `logits` [B, Q, C] and `boxes` [B, Q, 4], (cx, cy, w, h) in [0, 1]. With `postprocess`, best first:
    `scores` [B, K], `labels` [B, K], rows of the class head, and `boxes` [B, K, 4], (x0, y0, x1, y1) in pixels of the
    original images, clipped. With a mask head in both cases `masks`, logits [B, Q or K, h1, w1].

    Args:
        detector: in evaluation mode, on the CPU. It is copied.
        normalization: `mean` and `std` of RGB in 0..1.
    """

    def __init__(
        self,
        detector: nn.Module,
        normalization: Mapping[str, Any] | None = None,
        postprocess: PostProcess | None = None,
    ) -> None:
        super().__init__()
        self.detector: Any = deepcopy(detector).requires_grad_(False)
        self.detector.aux_loss = False
        bake_frozen_norms(self.detector)
        self.normalization, self.postprocess = normalization, postprocess

    def forward(self, images: Tensor, sizes_hw: Tensor | None = None) -> dict[str, Tensor]:
        if self.normalization is not None:
            images = normalize_images(images, **self.normalization)
        outputs = self.detector(images)
        if self.postprocess is not None:
            return self._detections(self.postprocess, outputs, sizes_hw)
        found = {"logits": outputs["pred_logits"], "boxes": outputs["pred_boxes"]}
        return {**found, "masks": outputs["pred_masks"]} if self.has_masks else found

    @property
    def has_masks(self) -> bool:
        return hasattr(self.detector, "mask_head")

    @property
    def output_names(self) -> list[str]:
        names = (
            ["scores", "labels", "boxes"] if self.postprocess is not None else ["logits", "boxes"]
        )
        return [*names, "masks"] if self.has_masks else names

    def _detections(
        self, postprocess: PostProcess, outputs: Any, sizes_hw: Any
    ) -> dict[str, Tensor]:
        """Return what `Predictor` does with threshold 0."""
        found = postprocess.detections(outputs, sizes_hw)
        scores, labels, boxes, query = (
            found[name] for name in ("scores", "labels", "boxes", "queries")
        )
        if postprocess.classification.kind == "softmax":  # in the order of the queries
            scores, order = scores.topk(scores.shape[1], dim=1)  # [B, K]
            labels, query = labels.gather(1, order), query.gather(1, order)
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        limits = sizes_hw.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # [B, 1, 4], (w, h, w, h)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        results = {"scores": scores, "labels": labels, "boxes": boxes}
        if self.has_masks:
            image = torch.arange(query.shape[0])[:, None].expand_as(query)  # [B, K]
            masks = outputs.predict_masks(image.flatten(), query.flatten())  # [B * K, h1, w1]
            results["masks"] = masks.unflatten(0, query.shape)
        return results

    def inputs(self, shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs for images of a shape, by name."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if self.normalization is None:
            images = torch.randn(shape, generator=generator)
        if self.postprocess is None:
            return {"images": images}
        batch, _, height, width = shape
        sizes_hw = torch.tensor([[height, 2 * width]] * batch)  # as if resized from a wider image
        return {"images": images, "sizes_hw": sizes_hw}


def build_graph(predictor: Predictor, *, preprocessing: bool, postprocessing: bool) -> Graph:
    """Return the graph of a predictor's detector."""
    return Graph(
        predictor.model,
        predictor.model.normalization if preprocessing else None,
        predictor.postprocess if postprocessing else None,
    ).eval()


@dataclass
class Recorded:
    """A graph, and what `torch.export` recorded of it."""

    graph: Graph
    program: torch.export.ExportedProgram


@torch.no_grad()
def record(graph: Graph) -> Recorded:
    """Record a graph for every batch size and image size."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {"images": {0: dynamic, 2: dynamic, 3: dynamic}}
    inputs = graph.inputs(EXAMPLE_SHAPE)
    if "sizes_hw" in inputs:
        shapes["sizes_hw"] = {0: dynamic}
    program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes)
    return Recorded(graph, program)
