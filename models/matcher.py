"""Hungarian matching of queries to targets (Carion et al. 2020, section 3.1).

All decoder layers and images are matched in one call.

Shapes: L decoder layers, B images, Q queries, C class outputs, n targets of an image and N their
maximum, T targets of the whole batch, K matched pairs of all layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.classification import Classification
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou
from util.errors import NonFinite
from util.packed_targets import PackedTargets, Targets, pack_objects


class NonFinitePrediction(NonFinite):
    """A prediction is NaN or infinite; the message names the decoder layer and the image ids."""


@dataclass
class Matches:
    """Matched pairs of all layers and images: layer by layer, image by image, sorted by query.

    source: int64 [K], indices into the predictions flattened from [L, B, Q], on the device.
    target: int64 [K], indices into the T concatenated targets of the batch, on the device.
    pairs: `pairs[layer][image]` is (queries, targets), two arrays of indices within the image.
    """

    source: Tensor
    target: Tensor
    pairs: list[list[tuple[np.ndarray, np.ndarray]]]

    @property
    def num_pairs(self) -> int:
        """Number of pairs in one layer, K / L; the same in every layer."""
        return len(self.source) // len(self.pairs)


class HungarianMatcher:
    """Assign every target of an image to a different query at the lowest total cost.

    The cost of a pair is

        cost_class * class cost + cost_bbox * L1 - cost_giou * GIoU

    with `Classification.class_cost` and the L1 distance of the normalized (cx, cy, w, h). With more
    targets than queries, only Q targets are matched.

    Costs are computed on the device, for the targets of the own image only, and copied to the host
    once; the indices are copied back once.
    """

    def __init__(self, classification: Classification) -> None:
        self.classification = classification

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Matches:
        """Match the predictions of all layers.

        Args:
            logits: [L, B, Q, C].
            boxes_cxcywh: [L, B, Q, 4].
            targets: `labels` [n] and `boxes` [n, 4] (cx, cy, w, h) of each image, packed or as a
                list of dicts.

        Raises:
            NonFinitePrediction: a cost is NaN or infinite.
        """
        targets = pack_objects(targets)
        counts = targets.counts["labels"]
        cost = None
        if max(counts, default=0) > 0:
            cost = self.cost_matrix(logits, boxes_cxcywh, targets).cpu().numpy()  # [L, B, Q, N]
            self._check_finite(cost, counts, targets)
        return self._assign(cost, counts, logits)

    def cost_matrix(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Tensor:
        """Return the matching costs [L, B, Q, N].

        Entries beyond an image's own number of targets are padding, without meaning.
        """
        targets = pack_objects(targets)
        tensors, counts = targets.tensors, targets.counts
        labels = pad_sequence(tensors["labels"].split(counts["labels"]), batch_first=True)  # [B, N]
        target_boxes = pad_sequence(tensors["boxes"].split(counts["boxes"]), batch_first=True)
        target_boxes = target_boxes.to(boxes_cxcywh.dtype)  # [B, N, 4]

        difference = boxes_cxcywh[..., :, None, :] - target_boxes[:, None]  # [L, B, Q, N, 4]
        distance = difference.abs().sum(-1)  # [L, B, Q, N]
        giou = generalized_box_iou(
            box_cxcywh_to_xyxy(boxes_cxcywh), box_cxcywh_to_xyxy(target_boxes)
        )  # [L, B, Q, N]
        labels = labels.expand(len(logits), -1, -1)  # [L, B, N]
        class_cost = self.classification.class_cost(logits, labels)  # [L, B, Q, N]

        return (
            self.classification.cost_bbox * distance
            + self.classification.cost_class * class_cost
            - self.classification.cost_giou * giou
        )

    @staticmethod
    def _check_finite(cost: np.ndarray, counts: list[int], targets: PackedTargets) -> None:
        # One cheap test for the usual case. What it finds may still be padding.
        if np.isfinite(cost).all():
            return
        is_target = np.arange(cost.shape[-1]) < np.asarray(counts)[:, None]  # [B, N]
        bad = ~np.isfinite(cost) & is_target[None, :, None, :]  # [L, B, Q, N]
        layers, images = np.nonzero(bad.any((2, 3)))
        if not len(layers):
            return

        has_ids = "image_id" in targets.tensors
        ids = [
            int(targets[i]["image_id"]) if has_ids else f"batch position {i}"
            for i in np.unique(images)
        ]
        raise NonFinitePrediction(
            f"decoder layer {layers[0]} (of 0 to {len(cost) - 1}) predicts NaN or infinity for images "
            f"{ids[:8]}: check their boxes, lower --lr, or use --amp no"
        )

    @staticmethod
    def _assign(cost: np.ndarray | None, counts: list[int], logits: Tensor) -> Matches:
        """Solve the assignment of each layer and image. `cost` is None if no image has a target."""
        num_layers, num_images, num_queries = logits.shape[:3]
        no_pairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        pairs = [
            [
                linear_sum_assignment(cost[layer, i, :, :n])
                if (cost is not None and n > 0)
                else no_pairs
                for i, n in enumerate(counts)
            ]
            for layer in range(num_layers)
        ]

        # From indices within an image to indices into all predictions and all targets.
        image_index = np.arange(num_layers)[:, None] * num_images + np.arange(num_images)  # [L, B]
        first_query = image_index * num_queries  # [L, B]
        first_target = np.cumsum([0] + counts)  # [B + 1]
        source, target = [], []
        for layer in range(num_layers):
            for i, (query_index, target_index) in enumerate(pairs[layer]):
                source.append(first_query[layer, i] + query_index)
                target.append(first_target[i] + target_index)

        # Stacked, both index lists reach the device in one copy.
        stacked = np.stack([np.concatenate(source), np.concatenate(target)])  # [2, K]
        index = torch.from_numpy(stacked.astype(np.int64))
        source_on_device, target_on_device = index.to(logits.device, non_blocking=True)
        return Matches(source_on_device, target_on_device, pairs)
