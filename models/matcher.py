"""Hungarian matching of queries to targets (Carion et al. 2020, section 3.1).

All decoder layers and images are matched in one call.

Shapes: L decoder layers, B images, Q queries, C class outputs, n targets of an image, T targets of
the whole batch, K matched pairs of all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.classification import Classification
from util.box_ops import box_cxcywh_to_xyxy, paired_giou
from util.errors import NonFinite
from util.moved_names import moved_from
from util.packed_targets import PackedTargets, Targets, pack_objects

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.matcher")

LOWEST_COST = -1e6  # below every cost of finite predictions


class NonFinitePrediction(NonFinite):
    """A prediction is NaN or infinite; the message names the decoder layer and the image ids."""


@dataclass
class Matches:
    """Matched pairs of all layers and images: layer by layer, image by image, sorted by query.

    source: int64 [K], indices into the predictions flattened from [L, B, Q], on the device.
    target: int64 [K], indices into the T concatenated targets of the batch, on the device.
    counts: int64 [B], number of targets of each image, on the device.
    per_image: numbers of pairs of layers and images, int64 [L, B], on the host.
    queries, targets: int64 [K], indices of the pairs within their image, on the host.
    """

    source: Tensor
    target: Tensor
    counts: Tensor
    per_image: np.ndarray
    queries: np.ndarray
    targets: np.ndarray

    @property
    def num_pairs(self) -> int:
        """Number of pairs in one layer, K / L; the same in every layer."""
        return len(self.source) // len(self.per_image)

    @property
    def pairs(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """`pairs[layer][image]` is (queries, targets), two arrays of indices within the image."""
        ends = np.cumsum(self.per_image)[:-1]  # of all pairs of a layer and image but the last
        queries, targets = np.split(self.queries, ends), np.split(self.targets, ends)
        num_layers, num_images = self.per_image.shape
        flat = list(zip(queries, targets, strict=True))
        return [flat[i * num_images : (i + 1) * num_images] for i in range(num_layers)]


class HungarianMatcher:
    """Assign every target of an image to a different query at the lowest total cost.

    The cost of a pair is

        cost_class * class cost + cost_bbox * L1 - cost_giou * GIoU

    with `Classification.class_cost` and the L1 distance of the normalized (cx, cy, w, h). With more
    targets than queries, only Q targets are matched.

    Costs are computed on the device, for pairs of one image only, and copied to the host once; the
    indices are copied back once.

    while_waiting: called while the costs are on their way to the host. What it queues keeps the
        device busy while the host solves the assignment.
    """

    while_waiting: Callable[[], None] | None = None

    def __init__(self, classification: Classification) -> None:
        self.classification = classification

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        targets: Targets,
        log_probabilities: Tensor | None = None,
        allow_non_finite: bool = False,
    ) -> Matches:
        """Match the predictions of all layers.

        Args:
            logits: [L, B, Q, C].
            boxes_cxcywh: [L, B, Q, 4].
            targets: `labels` [n] and `boxes` [n, 4] (cx, cy, w, h) of each image, packed or as a
                list of dicts.
            log_probabilities: `logits.log_softmax(-1)`, if the caller has it; only softmax
                classification reads it.
            allow_non_finite: match queries with a NaN or infinite cost before all others, so that
                the losses are not finite either.

        Raises:
            NonFinitePrediction: a cost is NaN or infinite, without `allow_non_finite`.
        """
        targets = pack_objects(targets)
        counts = targets.counts["labels"]
        cost = np.zeros((len(logits), 0, logits.shape[2]), np.float32)
        if sum(counts) > 0:
            on_device = self.cost_matrix(logits, boxes_cxcywh, targets, log_probabilities)
            cost = copy_to_host(on_device, self.while_waiting)  # [L, T, Q]
            if not allow_non_finite:
                self._check_finite(cost, counts, targets)
            elif not np.isfinite(cost).all():
                cost = np.where(np.isfinite(cost), cost, LOWEST_COST)
        return self._assign(cost, counts, logits)

    def cost_matrix(
        self,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        targets: Targets,
        log_probabilities: Tensor | None = None,
    ) -> Tensor:
        """Return the cost of each target with each query of its image, [L, T, Q]."""
        targets = pack_objects(targets)
        counts = targets.counts["labels"]
        image = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))  # int64 [T]
        image = copy_to_device(image, logits.device)
        target_boxes = targets.tensors["boxes"].to(boxes_cxcywh.dtype)  # [T, 4]
        boxes, target_boxes = _with_corners(boxes_cxcywh), _with_corners(target_boxes)
        # In memory a coordinate of all queries is one row, so that operations run along the queries.
        boxes = boxes.movedim(-1, 0).index_select(2, image).movedim(0, -1)  # [L, T, Q, 8]
        target_boxes = target_boxes[:, None]  # [T, 1, 8]

        distance = (boxes[..., :4] - target_boxes[..., :4]).abs().sum(-1)  # [L, T, Q]
        giou = paired_giou(boxes[..., 4:], target_boxes[..., 4:])  # [L, T, Q]
        if self.classification.kind == "softmax":
            scores = logits.log_softmax(-1) if log_probabilities is None else log_probabilities
        else:
            scores = logits
        class_cost = self.classification.class_cost(scores, image, targets.tensors["labels"])
        return (
            self.classification.cost_bbox * distance
            + self.classification.cost_class * class_cost
            - self.classification.cost_giou * giou
        )

    @staticmethod
    def _check_finite(cost: np.ndarray, counts: list[int], targets: PackedTargets) -> None:
        finite = np.isfinite(cost).all(-1)  # [L, T]
        if finite.all():
            return
        layer = np.nonzero(~finite)[0][0]
        images = np.repeat(np.arange(len(counts)), counts)[~finite.all(0)]
        has_ids = "image_id" in targets.tensors
        ids = [
            int(targets[i]["image_id"]) if has_ids else f"batch position {i}"
            for i in np.unique(images)
        ]
        raise NonFinitePrediction(
            f"decoder layer {layer} (of 0 to {len(cost) - 1}) predicts NaN or infinity for images "
            f"{ids[:8]}: check their boxes, lower --lr, or use --amp no"
        )

    @staticmethod
    def _assign(cost: np.ndarray, counts: list[int], logits: Tensor) -> Matches:
        """Solve the assignment of each layer and image. cost: [L, T, Q]."""
        num_layers, num_images, num_queries = logits.shape[:3]
        first_target = np.cumsum([0, *counts])  # [B + 1]
        solved = [
            linear_sum_assignment(cost[layer, first_target[i] : first_target[i + 1]])
            for layer in range(num_layers)
            for i in range(num_images)
            if counts[i] > 0
        ]  # (targets, queries) of a layer and image, in the order of the targets
        per_image = np.minimum(counts, num_queries)[None].repeat(num_layers, 0)  # [L, B]
        image = np.arange(num_layers * num_images).repeat(per_image.ravel())  # [K], of all layers
        empty = np.zeros(0, dtype=np.int64)
        targets, queries = (
            np.concatenate([empty, *(pair[side] for pair in solved)]) for side in (0, 1)
        )

        # From indices within an image to indices into all predictions and all targets. The former
        # ascend from image to image, so that one sort orders the queries of every image.
        source = image * num_queries + queries
        order = source.argsort()
        source, queries, targets = source[order], queries[order], targets[order]
        target = first_target[image % num_images] + targets

        # Stacked, both index lists and the counts reach the device in one copy.
        index = torch.from_numpy(np.concatenate([source, target, counts]).astype(np.int64))
        index = copy_to_device(index, logits.device)
        parts = index.split([len(source), len(target), num_images])
        return Matches(parts[0], parts[1], parts[2], per_image, queries, targets)


def _with_corners(boxes_cxcywh: Tensor) -> Tensor:
    """Append (x0, y0, x1, y1) to (cx, cy, w, h): [..., 4] -> [..., 8]."""
    return torch.cat([boxes_cxcywh, box_cxcywh_to_xyxy(boxes_cxcywh)], -1)


def copy_to_host(values: Tensor, while_waiting: Callable[[], None] | None = None) -> np.ndarray:
    """Copy a tensor to the host, to pinned memory from a GPU. The host waits for the copy.

    while_waiting: called before that; the host does not wait for what it queues on the device.
    """
    if not values.is_cuda:
        if while_waiting is not None:
            while_waiting()
        return values.numpy()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    if while_waiting is None:
        return host.copy_(values).numpy()
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))
    while_waiting()
    copied.synchronize()
    return host.numpy()


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. The host does not wait: only pinned memory allows that."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
