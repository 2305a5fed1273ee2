"""Hungarian matching of queries to targets (Carion et al. 2020, section 3.1), all decoder layers and images at once."""

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
    """Matched pairs of all layers and images, layer by layer, image by image, sorted by query.

    source: int64 [K], positions in the flattened [L, B, Q] predictions. target: int64 [K], positions in the
    concatenated targets of the batch. Both on the device. `pairs[layer][image]` holds the (query, target) numpy arrays.
    """

    source: Tensor
    target: Tensor
    pairs: list[list[tuple[np.ndarray, np.ndarray]]]

    @property
    def num_pairs(self) -> int:
        """K / L, the number of pairs in every layer."""
        return len(self.source) // len(self.pairs)


class HungarianMatcher:
    """Assigns each target of an image to a different query so that the sum of costs is least.

    The cost of a pair is `cost_class` times the class cost (see `Classification.class_cost`), plus `cost_bbox` times
    the L1 distance of the normalised (cx, cy, w, h), minus `cost_giou` times the generalised IoU. With more targets
    than queries only as many targets as queries are matched. Costs are computed on the device for the targets of the
    own image only, copied to the host once, and the indices copied back once.
    """

    def __init__(self, classification: Classification) -> None:
        self.classification = classification

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Matches:
        """logits [L, B, Q, C], boxes_cxcywh [L, B, Q, 4]; each target has `labels` [n] and `boxes` [n, 4] (cx, cy, w,
        h), packed or in a list of dicts.

        Raises:
            NonFinitePrediction: a cost is NaN or infinite.
        """
        targets = pack_objects(targets)
        counts = targets.rows["labels"]
        cost = (
            self.cost(logits, boxes_cxcywh, targets).cpu().numpy()
            if max(counts, default=0)
            else None
        )
        if cost is not None:
            self._check_finite(cost, counts, targets)
        return self._assign(cost, counts, logits)

    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets) -> Tensor:
        """[L, B, Q, N] with N the largest number of targets; what stands beyond an image's own number has no
        meaning.
        """
        targets = pack_objects(targets)
        labels, true_boxes = (
            pad_sequence(targets.tensors[key].split(targets.rows[key]), batch_first=True)
            for key in ("labels", "boxes")
        )
        true_boxes = true_boxes.to(boxes_cxcywh.dtype)
        distance = (boxes_cxcywh[..., :, None, :] - true_boxes[:, None]).abs().sum(-1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes_cxcywh), box_cxcywh_to_xyxy(true_boxes))
        weights = self.classification
        labels = labels.expand(len(logits), -1, -1)
        class_cost = weights.class_cost(logits, labels)
        return (
            weights.cost_bbox * distance
            + weights.cost_class * class_cost
            - weights.cost_giou * giou
        )

    @staticmethod
    def _check_finite(cost: np.ndarray, counts: list[int], targets: PackedTargets) -> None:
        if np.isfinite(cost).all():
            return
        real = np.arange(cost.shape[-1]) < np.asarray(counts)[:, None]
        layers, images = np.nonzero((~np.isfinite(cost) & real[None, :, None, :]).any((2, 3)))
        if not len(layers):
            return
        known = "image_id" in targets.tensors
        ids = [
            int(targets[i]["image_id"]) if known else f"batch position {i}"
            for i in np.unique(images)
        ]
        raise NonFinitePrediction(
            f"decoder layer {layers[0]} (of 0 to {len(cost) - 1}) predicts NaN or infinity for images {ids[:8]}: "
            "look at their boxes, lower --lr, or use --amp no"
        )

    @staticmethod
    def _assign(cost: np.ndarray | None, counts: list[int], logits: Tensor) -> Matches:
        num_layers, batch, num_queries = logits.shape[:3]
        offsets = np.cumsum([0] + counts)
        none = np.zeros(0, dtype=np.int64)
        pairs = [
            [
                (none, none)
                if cost is None or not n
                else linear_sum_assignment(cost[layer, i, :, :n])
                for i, n in enumerate(counts)
            ]
            for layer in range(num_layers)
        ]
        first_query = (np.arange(num_layers)[:, None] * batch + np.arange(batch)) * num_queries
        source = [
            first_query[layer, i] + pairs[layer][i][0]
            for layer in range(num_layers)
            for i in range(batch)
        ]
        target = [
            offsets[i] + pairs[layer][i][1] for layer in range(num_layers) for i in range(batch)
        ]
        index = torch.from_numpy(
            np.stack([np.concatenate(source), np.concatenate(target)]).astype(np.int64)
        )
        source_index, target_index = index.to(logits.device, non_blocking=True)
        return Matches(source_index, target_index, pairs)
