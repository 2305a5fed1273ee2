"""The set prediction loss (Carion et al. 2020, section 3.1) and the losses of the pretext tasks.

All decoder layers are matched and scored as one batch.

Shapes: L decoder layers, B images, Q queries, C class outputs, F features, D embedding width, T
targets of the whole batch, K matched pairs of all layers. Every layer has the same number of pairs,
K / L: the sum of min(Q, targets) over the images.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classification import Classification, sigmoid_focal_loss, summed_focal_loss
from models.detector import full_precision
from models.feature_head import select_features
from models.matcher import HungarianMatcher, Matches, copy_to_device
from models.segmentation import select_masks
from util.box_ops import box_cxcywh_to_xyxy, paired_giou
from util.distributed import all_reduce_sum, get_world_size
from util.packed_targets import PackedTargets, Targets, pack_objects

# The losses that encoder proposals have too. They have no features or embeddings.
PROPOSAL_LOSSES = ("labels", "boxes", "cardinality")


class Losses(dict[str, Tensor]):
    """Losses by name, each a scalar, with the matches that they were computed from.

    matches: of all decoder layers.
    proposal_matches: of the encoder proposals of a two-stage detector, else None.
    """

    matches: Matches
    proposal_matches: Matches | None = None

    @property
    def num_pairs(self) -> int:
        """Matched pairs of the last decoder layer, over which `class_error` is a mean."""
        return self.matches.num_pairs


@dataclass(kw_only=True)
class _MatchedBatch:
    """Stacked predictions of all layers, their matches and the targets."""

    logits: Tensor  # [L, B, Q, C]
    log_probabilities: Tensor | None  # the same shape; None for focal outputs
    boxes: Tensor  # [L, B, Q, 4], (cx, cy, w, h)
    matches: Matches
    labels: Tensor  # [T]
    target_boxes: Tensor  # [T, 4], (cx, cy, w, h)
    num_boxes: Tensor | float  # normalizer of the losses, see `SetCriterion._num_boxes`
    target_masks: Tensor | None  # bool [T, H, W], padded to one size; None without masks
    outputs: list[dict]  # model outputs of each layer, the last layer last

    def sum_per_layer(self, values: Tensor) -> Tensor:
        """Sum the values of matched pairs per layer: [K] -> [L]."""
        return values.reshape(len(self.logits), -1).sum(1)  # [L, K / L] -> [L]

    def last_layer_pairs(self) -> tuple[Tensor, Tensor]:
        """Return the last layer's pairs: indices into its B * Q queries and the T targets, [K / L] each."""
        earlier_layers = self.logits.shape[0] - 1
        # Pairs are stored layer by layer: the last K / L belong to the last layer.
        pairs = slice(self.matches.num_pairs * earlier_layers, None)
        queries_per_layer = self.logits.shape[1] * self.logits.shape[2]
        source = self.matches.source[pairs] - earlier_layers * queries_per_layer
        return source, self.matches.target[pairs]


class SetCriterion(nn.Module):
    """Match predictions to targets and compute the losses of every decoder layer.

    Losses of the last layer have plain names, those of earlier layers the suffix `_0`, `_1`, ...
    Each loss is a scalar that is connected to the graph even without any target, so that all ranks
    have gradients for the same parameters.

    Encoder proposals (`enc_outputs`) are matched and scored in a second pass that ignores classes:
    every target gets label 0. Their losses have the suffix `_enc` (Zhu et al. 2021, appendix A.4).

    Args:
        weight_dict: name -> weight in the total loss. Values without a weight are only logged.
        losses: which of `labels`, `boxes`, `cardinality`, `masks`, `features`, `object_embedding`
            and `global_contrast` to compute.
        eos_coef: class weight of "no object" in softmax classification.
        focal_alpha: weight of positives in focal classification.
        reproduce_published: for focal outputs log the published cardinality error, which counts
            queries whose best class is not the last one. By default it counts queries with a score
            above 0.5.
    """

    def __init__(
        self,
        classification: Classification,
        weight_dict: dict[str, float],
        *,
        losses: tuple[str, ...] = ("labels", "boxes", "cardinality"),
        eos_coef: float = 0.1,
        focal_alpha: float = 0.25,
        reproduce_published: bool = False,
    ) -> None:
        super().__init__()
        self.classification, self.weight_dict, self.losses = classification, weight_dict, losses
        self.focal_alpha, self.reproduce_published = focal_alpha, reproduce_published
        self.matcher = HungarianMatcher(classification)

        class_weight = torch.ones(classification.num_outputs)  # [C]
        if classification.kind == "softmax":
            class_weight[-1] = eos_coef
        self.empty_weight: Tensor
        # Not persistent: published checkpoints have no buffer of the criterion.
        self.register_buffer("empty_weight", class_weight, persistent=False)

    def forward(self, outputs: dict, targets: Targets, num_targets: float | None = None) -> Losses:
        """Compute the losses.

        Args:
            outputs: see `Detector.forward`. The loss `features` also needs `pred_features` of every
                layer and `target_features`, `object_embedding` needs both of the last layer, and
                `global_contrast` needs `projections` and `predictions`.
            targets: `labels` [n] and `boxes` [n, 4] (cx, cy, w, h) of each image, packed or as a
                list of dicts; for the loss `masks` also `masks` [n, H, W].
            num_targets: the number of targets to divide by, where gradients are accumulated: the
                mean over their batches. Default: the number in `targets`.

        Raises:
            NonFinitePrediction: in evaluation mode, a prediction for an image with objects is NaN
                or infinite. In training mode a loss is: the training loop skips such a step.
        """
        targets = pack_objects(targets)
        if num_targets is None:
            num_targets = sum(targets.counts["labels"])
        num_boxes = self._num_boxes(num_targets, outputs["pred_logits"].device)
        losses = self._compute_losses(self.losses, outputs, targets, num_boxes)

        if "enc_outputs" in outputs:
            names = [name for name in self.losses if name in PROPOSAL_LOSSES]
            labels = torch.zeros_like(targets.tensors["labels"])  # [T]
            class_agnostic = replace(targets, tensors={**targets.tensors, "labels": labels})
            proposal_losses = self._compute_losses(
                names, outputs["enc_outputs"], class_agnostic, num_boxes
            )
            proposal_losses.pop("class_error", None)  # meaningless with a single label
            losses.update({f"{name}_enc": value for name, value in proposal_losses.items()})
            losses.proposal_matches = proposal_losses.matches
        return losses

    def _compute_losses(
        self, names: Iterable[str], outputs: dict, targets: PackedTargets, num_boxes: Tensor | float
    ) -> Losses:
        batch = self._match_layers(outputs, targets, num_boxes)
        losses = Losses()
        losses.matches = batch.matches
        for name in names:
            losses.update(getattr(self, f"loss_{name}")(batch))
        return losses

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses, which training minimizes."""
        names = [name for name in self.weight_dict if name in losses]
        values = torch.stack([losses[name] for name in names])
        weights = torch.tensor([self.weight_dict[name] for name in names], dtype=values.dtype)
        return values @ copy_to_device(weights, values.device)

    def _match_layers(
        self, outputs: dict, targets: PackedTargets, num_boxes: Tensor | float
    ) -> _MatchedBatch:
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers])  # [L, B, Q, C]
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])  # [L, B, Q, 4]
        logits, boxes = full_precision(logits), full_precision(boxes)
        # Both the matching costs and the classification loss read them.
        softmax = self.classification.kind == "softmax"
        log_probabilities = logits.log_softmax(-1) if softmax else None
        return _MatchedBatch(
            logits=logits,
            log_probabilities=log_probabilities,
            boxes=boxes,
            # Raising on one rank would leave the others waiting in the next collective.
            matches=self.matcher(
                logits, boxes, targets, log_probabilities, allow_non_finite=self.training
            ),
            labels=targets.tensors["labels"],
            target_boxes=targets.tensors["boxes"].to(boxes.dtype),
            target_masks=targets.tensors.get("masks"),
            num_boxes=num_boxes,
            outputs=layers,
        )

    def _num_boxes(self, count: float, device: torch.device) -> Tensor | float:
        """Return the number of targets, at least 1; in training the mean over ranks.

        DDP averages gradients, so each rank divides by the mean count. In evaluation ranks may have
        different numbers of batches, and a collective would hang.
        """
        if get_world_size() == 1 or not self.training:
            return float(max(count, 1))
        # `full` on the device: copying a host tensor would make the host wait.
        total = all_reduce_sum(torch.full((1,), float(count), device=device))
        return (total / get_world_size()).clamp(min=1)[0]

    @staticmethod
    def _name_by_layer(name: str, values: Tensor) -> dict[str, Tensor]:
        """Name values [L] as published: all layers but the last get their index as suffix."""
        last = len(values) - 1
        return {
            name if layer == last else f"{name}_{layer}": value
            for layer, value in enumerate(values.unbind())
        }

    def loss_labels(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """Classification loss of all queries; unmatched queries are "no object".

        Also returns `class_error`, the percentage of wrong classes among the matched queries of the
        last layer, for the log.
        """
        labels = batch.labels[batch.matches.target]  # [K]
        if batch.log_probabilities is not None:
            values = self._cross_entropy(batch.log_probabilities, batch.matches.source, labels)
        else:
            positives = batch.matches.source * batch.logits.shape[-1] + labels  # [K]
            # The published mean over queries, times their number, is this sum.
            values = summed_focal_loss(batch.logits, positives, self.focal_alpha) / batch.num_boxes
        return {
            **self._name_by_layer("loss_ce", values),
            "class_error": self._class_error(batch),
        }

    def _cross_entropy(self, log_probabilities: Tensor, source: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted mean over all queries of each layer, [L], as in DETR.

        source, labels: int64 [K], the matched queries of all layers and their classes.
        """
        num_layers, *_, num_outputs = log_probabilities.shape
        log_probabilities = log_probabilities.flatten(0, 2)  # [L * B * Q, C]
        # The last output is "no object".
        classes = labels.new_full(log_probabilities.shape[:1], num_outputs - 1)  # [L * B * Q]
        classes[source] = labels
        weight = self.empty_weight.to(log_probabilities.dtype)  # [C]
        nll = functional.nll_loss(log_probabilities, classes, weight, reduction="none")
        nll, weights = nll.view(num_layers, -1), weight[classes].view(num_layers, -1)  # [L, B * Q]
        return nll.sum(1) / weights.sum(1)

    @torch.no_grad()
    def _class_error(self, batch: _MatchedBatch) -> Tensor:
        pairs = batch.matches.num_pairs  # K / L
        if pairs == 0:
            return batch.logits.new_full((), 100.0)  # filled on the device, the host does not wait

        # Pairs are stored layer by layer: the last K / L belong to the last layer.
        source, target = batch.matches.source[-pairs:], batch.matches.target[-pairs:]  # [K / L]
        predicted = batch.logits.flatten(0, 2)[source].argmax(-1)  # [K / L]
        correct = predicted == batch.labels[target]  # [K / L]
        return 100 - 100 * correct.to(batch.logits.dtype).mean()

    def loss_boxes(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """L1 of (cx, cy, w, h) and 1 - GIoU of matched pairs, over the number of boxes."""
        predicted = batch.boxes.flatten(0, 2)[batch.matches.source]  # [K, 4]
        target = batch.target_boxes[batch.matches.target]  # [K, 4]
        l1 = (predicted - target).abs().sum(1)  # [K]
        giou = paired_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target))  # [K]
        return {
            **self._name_by_layer("loss_bbox", batch.sum_per_layer(l1) / batch.num_boxes),
            **self._name_by_layer("loss_giou", batch.sum_per_layer(1 - giou) / batch.num_boxes),
        }

    @torch.no_grad()
    def loss_cardinality(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """Mean over images of |queries that predict an object - targets|, for the log."""
        if self.classification.kind == "softmax" or self.reproduce_published:
            # The best class is not the last one. `argmax` is slower, and prefers the first of equals.
            is_object = batch.logits[..., :-1].amax(-1) >= batch.logits[..., -1]  # [L, B, Q]
        else:
            is_object = batch.logits.amax(-1) > 0  # [L, B, Q]; sigmoid(0) = 0.5
        error = (is_object.sum(-1) - batch.matches.counts).abs()  # [L, B]
        return self._name_by_layer("cardinality_error", error.to(batch.logits.dtype).mean(-1))

    def loss_features(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """Squared distance of the normalized predicted and target features of matched pairs.

        Equals 2 - 2 cos, summed over pairs and divided by the number of boxes (Dai et al. 2021,
        equation 4). `target_features` [T, F] are in the order of the targets.
        """
        predicted = select_features(batch.outputs, batch.matches.source)  # [K, F]
        predicted = functional.normalize(predicted, dim=1)
        target = full_precision(batch.outputs[-1]["target_features"])  # [T, F]
        target = functional.normalize(target, dim=1)[batch.matches.target]  # [K, F]

        distance = (predicted - target).square().sum(1)  # [K]
        return self._name_by_layer("loss_feature", batch.sum_per_layer(distance) / batch.num_boxes)

    def loss_object_embedding(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """Mean L1 distance, over pairs and channels, of predicted and target object embeddings.

        Last decoder layer only; 0 without pairs (Bar et al. 2022, section 3.2). `target_features`
        [T, F] are in the order of the targets.
        """
        outputs = batch.outputs[-1]
        source, target = batch.last_layer_pairs()
        predicted = select_features([outputs], source)  # [K / L, F]
        distance = (predicted - full_precision(outputs["target_features"])[target]).abs()
        return {"loss_object_embedding": distance.sum() / max(distance.numel(), 1)}

    def loss_masks(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """Focal and dice loss of the masks of matched pairs, over the number of boxes.

        Last decoder layer only. The focal loss is a mean over the pixels of the padded batch, so padding
        counts as background, as published (Carion et al. 2020, section 4.4).

        Raises:
            ValueError: the targets have no masks.
        """
        if batch.target_masks is None:
            raise ValueError("the loss `masks` needs `masks` in the targets")
        source, target = batch.last_layer_pairs()
        num_queries = batch.logits.shape[2]
        image = torch.div(source, num_queries, rounding_mode="floor")  # [K / L]
        target_masks = batch.target_masks[target]  # [K / L, H, W]
        logits = select_masks(batch.outputs[-1], image, source % num_queries)  # [K / L, h1, w1]
        logits = functional.interpolate(
            logits[:, None], size=target_masks.shape[-2:], mode="bilinear", align_corners=False
        )
        logits, target_masks = (
            logits.flatten(1),
            target_masks.flatten(1).to(logits.dtype),
        )  # [K / L, H * W]

        focal = sigmoid_focal_loss(logits, target_masks).mean(1)  # [K / L]
        return {
            "loss_mask": focal.sum() / batch.num_boxes,
            "loss_dice": dice_loss(logits, target_masks).sum() / batch.num_boxes,
        }

    def loss_global_contrast(self, batch: _MatchedBatch) -> dict[str, Tensor]:
        """2 - 2 cos of each view's prediction and the other view's projection, mean over all views.

        Projections are constants, no gradient flows into them (Chen and He 2021, equations 1 to 4,
        times two). Also returns `projection_std` for the log: the standard deviation over the views
        of normalized projections, mean over channels. It is about 1 / sqrt(D) if they are spread
        out and 0 if they have collapsed.
        """
        outputs = batch.outputs[-1]
        projected = full_precision(outputs["projections"]).detach()  # [B, D], the images are views
        projected = functional.normalize(projected, dim=1)
        predicted = functional.normalize(full_precision(outputs["predictions"]), dim=1)  # [B, D]
        # View 1 of all images, then view 2: rolled by half, each row meets its other view.
        other_view = projected.roll(len(projected) // 2, 0)  # [B, D]
        distance = 2 - 2 * (predicted * other_view).sum(1)  # [B]
        return {
            "loss_enc_global_contra": distance.mean(),
            "projection_std": self._std_over_batch(projected),
        }

    @torch.no_grad()
    def _std_over_batch(self, x: Tensor) -> Tensor:
        """Return the standard deviation over rows [N, D] of all ranks, mean over channels."""
        # Count, sums and sums of squares in one tensor: a single collective.
        sums = torch.cat([x.new_full((1,), len(x)), x.sum(0), x.square().sum(0)])  # [1 + 2 D]
        if self.training:  # in evaluation ranks may have different numbers of batches
            all_reduce_sum(sums)
        mean, square = (sums[1:] / sums[0]).chunk(2)  # [D] each
        variance = (square - mean.square()).clamp(min=0)  # rounding can go below 0
        return variance.sqrt().mean()


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - (2 |P T| + 1) / (|P| + |T| + 1) of each mask (Milletari et al. 2016), without reduction.

    logits, targets: [K, pixels]; targets are 0 or 1. Returns [K].
    """
    probability = logits.sigmoid()
    intersection = (probability * targets).sum(1)
    return 1 - (2 * intersection + 1) / (probability.sum(1) + targets.sum(1) + 1)


def expand_weight_dict(
    weights: dict[str, float], num_aux_layers: int, proposals: bool = False
) -> dict[str, float]:
    """Add the weights of earlier layers (suffix `_0`, ...) and of encoder proposals (`_enc`)."""
    expanded = dict(weights)
    for layer in range(num_aux_layers):
        expanded.update({f"{name}_{layer}": weight for name, weight in weights.items()})
    if proposals:
        names = [name for name in ("loss_ce", "loss_bbox", "loss_giou") if name in weights]
        expanded.update({f"{name}_enc": weights[name] for name in names})
    return expanded
