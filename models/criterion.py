"""The set-prediction loss: classes, boxes and features of matched pairs, all decoder layers as one batch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classification import Classification, sigmoid_focal_loss
from models.detector import full_precision
from models.matcher import HungarianMatcher, Matches
from util.box_ops import box_cxcywh_to_xyxy, paired_giou
from util.distributed import all_reduce_sum, get_world_size
from util.packed_targets import PackedTargets, Targets, pack_objects

PROPOSAL_LOSSES = (
    "labels",
    "boxes",
    "cardinality",
)  # what of a detector's losses is scored on encoder proposals too


class Losses(dict[str, Tensor]):
    """What the criterion returns: name -> scalar, and what was matched for it.

    matches: of all decoder layers. proposal_matches: of the encoder proposals of a two-stage detector. num_pairs: what
    `class_error` is a mean over, the matched pairs of the last decoder layer.
    """

    matches: Matches
    proposal_matches: Matches | None = None

    @property
    def num_pairs(self) -> int:
        return self.matches.num_pairs


@dataclass(kw_only=True)
class _Batch:
    """Stacked predictions of L layers, their matches and the matched targets. K pairs, layer by layer."""

    logits: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4], (cx, cy, w, h)
    matches: Matches
    labels: Tensor  # [T], all targets of the batch
    true_boxes: Tensor  # [T, 4], (cx, cy, w, h)
    num_boxes: Tensor | float
    counts: list[int]
    outputs: list[dict]

    def per_layer(self, values: Tensor) -> Tensor:
        """[K] -> sums [L]"""
        return values.reshape(len(self.logits), -1).sum(1)


class SetCriterion(nn.Module):
    """Matches predictions to targets and computes the named losses of every decoder layer.

    The last layer's losses have plain names, those of earlier layers the suffix `_0`, `_1`, ... Each is a scalar
    connected to the graph even where there is nothing to match, so that processes without targets take part in every
    collective. Encoder proposals (`enc_outputs`) are matched and scored in a second pass, without regard to classes:
    every target has label 0. Their losses have the suffix `_enc` (Zhu et al. 2021, appendix A.4).

    Args:
        weight_dict: name -> weight in the total; names without weight are logged only.
        losses: which of `labels`, `boxes`, `cardinality`, `features`, `object_embedding`, `global_contrast` are
            computed.
        eos_coef: weight of "no object" in softmax classification.
        focal_alpha: weight of positives in focal classification.
        reproduce_published: log the published cardinality error with focal outputs, which counts queries whose best
            class is not the last one; by default it counts queries with a score above one half.
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
        class_weight = torch.ones(classification.num_outputs)
        if classification.kind == "softmax":
            class_weight[-1] = eos_coef
        self.empty_weight: Tensor
        self.register_buffer("empty_weight", class_weight, persistent=False)

    def forward(self, outputs: dict, targets: Targets) -> Losses:
        """Losses by name, each a scalar.

        Args:
            outputs: see `Detector.forward`, with `pred_features` and `target_features` for the loss `features`.
            targets: `labels` [n] and `boxes` [n, 4] (cx, cy, w, h) of each image, packed or in a list of dicts.

        Raises:
            NonFinitePrediction: a prediction for an image with objects is NaN or infinite.
        """
        targets = pack_objects(targets)
        num_boxes = self._num_boxes(sum(targets.rows["labels"]), outputs["pred_logits"].device)
        losses = self._score(self.losses, outputs, targets, num_boxes)
        if "enc_outputs" in outputs:
            names = [name for name in self.losses if name in PROPOSAL_LOSSES]
            no_classes = {**targets.tensors, "labels": torch.zeros_like(targets.tensors["labels"])}
            scored = self._score(
                names, outputs["enc_outputs"], replace(targets, tensors=no_classes), num_boxes
            )
            scored.pop("class_error", None)
            losses.update({f"{name}_enc": value for name, value in scored.items()})
            losses.proposal_matches = scored.matches
        return losses

    def _score(
        self, names: Iterable[str], outputs: dict, targets: PackedTargets, num_boxes: Tensor | float
    ) -> Losses:
        batch, losses = self._prepare(outputs, targets, num_boxes), Losses()
        losses.matches = batch.matches
        for name in names:
            losses.update(getattr(self, f"loss_{name}")(batch))
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        weighted = [
            losses[name] * weight for name, weight in self.weight_dict.items() if name in losses
        ]
        return sum(weighted[1:], weighted[0])

    def _prepare(self, outputs: dict, targets: PackedTargets, num_boxes: Tensor | float) -> _Batch:
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits = full_precision(torch.stack([layer["pred_logits"] for layer in layers]))
        boxes = full_precision(torch.stack([layer["pred_boxes"] for layer in layers]))
        return _Batch(
            logits=logits,
            boxes=boxes,
            matches=self.matcher(logits, boxes, targets),
            labels=targets.tensors["labels"],
            true_boxes=targets.tensors["boxes"].to(boxes.dtype),
            num_boxes=num_boxes,
            counts=targets.rows["labels"],
            outputs=layers,
        )

    def _num_boxes(self, count: int, device: torch.device) -> Tensor | float:
        """Targets a process, at least 1; averaged over the processes in training (in evaluation these may have
        different batches).
        """
        if get_world_size() == 1 or not self.training:
            return float(max(count, 1))
        total = all_reduce_sum(
            torch.full((1,), float(count), device=device)
        )  # filled there: a copy would make the host wait
        return (total / get_world_size()).clamp(min=1)[0]

    @staticmethod
    def _named(name: str, values: Tensor) -> dict[str, Tensor]:
        """Values [L] -> the published names: a suffix for all layers but the last."""
        last = len(values) - 1
        return {
            name if layer == last else f"{name}_{layer}": value
            for layer, value in enumerate(values.unbind())
        }

    def loss_labels(self, batch: _Batch) -> dict[str, Tensor]:
        """Classification over all queries; `class_error` (%) of the last layer's matched queries is for the log."""
        num_layers, outputs = len(batch.logits), batch.logits.shape[-1]
        flat = batch.logits.flatten(0, 2)
        background = outputs - 1 if self.classification.kind == "softmax" else outputs
        classes = torch.full(flat.shape[:1], background, dtype=torch.int64, device=flat.device)
        classes[batch.matches.source] = batch.labels[batch.matches.target]
        if self.classification.kind == "softmax":
            weight = self.empty_weight.to(flat.dtype)
            nll = functional.cross_entropy(flat, classes, weight, reduction="none").view(
                num_layers, -1
            )
            values = nll.sum(1) / weight[classes].view(num_layers, -1).sum(1)
        else:
            one_hot = functional.one_hot(classes, outputs + 1)[:, :-1].to(flat.dtype)
            values = (
                sigmoid_focal_loss(flat, one_hot, self.focal_alpha).view(num_layers, -1).sum(1)
                / batch.num_boxes
            )
        return {**self._named("loss_ce", values), "class_error": self._class_error(batch)}

    @torch.no_grad()
    def _class_error(self, batch: _Batch) -> Tensor:
        pairs = batch.matches.num_pairs
        if pairs == 0:
            return batch.logits.new_full((), 100.0)  # a fill, which the host does not wait for
        source, target = batch.matches.source[-pairs:], batch.matches.target[-pairs:]
        right = batch.logits.flatten(0, 2)[source].argmax(-1) == batch.labels[target]
        return 100 - 100 * right.to(batch.logits.dtype).mean()

    def loss_boxes(self, batch: _Batch) -> dict[str, Tensor]:
        """L1 of the normalised (cx, cy, w, h) and 1 - generalised IoU of matched pairs, over the number of boxes."""
        predicted = batch.boxes.flatten(0, 2)[batch.matches.source]
        true = batch.true_boxes[batch.matches.target]
        l1 = (predicted - true).abs().sum(1)
        giou = paired_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(true))
        return {
            **self._named("loss_bbox", batch.per_layer(l1) / batch.num_boxes),
            **self._named("loss_giou", batch.per_layer(1 - giou) / batch.num_boxes),
        }

    @torch.no_grad()
    def loss_cardinality(self, batch: _Batch) -> dict[str, Tensor]:
        """Mean over images of |queries that report an object - targets|; for the log."""
        if self.classification.kind == "softmax" or self.reproduce_published:
            reports = batch.logits.argmax(-1) != batch.logits.shape[-1] - 1
        else:
            reports = batch.logits.amax(-1) > 0
        counts = torch.tensor(batch.counts).to(batch.logits.device, non_blocking=True)
        error = (reports.sum(-1) - counts).abs().to(batch.logits.dtype).mean(-1)
        return self._named("cardinality_error", error)

    def loss_features(self, batch: _Batch) -> dict[str, Tensor]:
        """Squared distance of the normalised predicted and target feature of matched pairs, 2 - 2 cos, over the number
        of boxes.

        Dai et al. 2021, equation 4. `target_features` [T, F] stands in the order of the targets.
        """
        predicted = full_precision(
            torch.stack([layer["pred_features"] for layer in batch.outputs])
        ).flatten(0, 2)
        true = full_precision(batch.outputs[-1]["target_features"])
        predicted = functional.normalize(predicted[batch.matches.source], dim=1)
        true = functional.normalize(true, dim=1)[batch.matches.target]
        distance = (predicted - true).square().sum(1)
        return self._named("loss_feature", batch.per_layer(distance) / batch.num_boxes)

    def loss_object_embedding(self, batch: _Batch) -> dict[str, Tensor]:
        """Mean L1 distance, over pairs and channels, of predicted and target embeddings of the last layer's matched
        pairs; 0 without pairs.

        Bar et al. 2022, section 3.2. `target_features` [T, F] stands in the order of the targets.
        """
        outputs, layers = batch.outputs[-1], len(batch.logits)
        pairs = batch.matches.num_pairs
        first = (
            (layers - 1) * batch.logits.shape[1] * batch.logits.shape[2]
        )  # of the last layer's queries among all
        source, target = (
            index[pairs * (layers - 1) :] for index in (batch.matches.source, batch.matches.target)
        )
        predicted = full_precision(outputs["pred_features"]).flatten(0, 1)[source - first]
        distance = (predicted - full_precision(outputs["target_features"])[target]).abs()
        return {"loss_object_embedding": distance.sum() / max(distance.numel(), 1)}

    def loss_global_contrast(self, batch: _Batch) -> dict[str, Tensor]:
        """2 - 2 cos of each view's prediction and the other view's projection, which is a constant to it; mean over all
        views.

        Chen and He 2021, equations 1 to 4, times two. Also for the log: `projection_std`, the standard deviation over
        the views of normalised projections, mean over channels. It is about 1 / sqrt(channels) where they are spread, 0
        where they have collapsed.
        """
        outputs = batch.outputs[-1]
        projected = functional.normalize(full_precision(outputs["projections"]).detach(), dim=1)
        predicted = functional.normalize(full_precision(outputs["predictions"]), dim=1)
        distance = 2 - 2 * (predicted * projected.roll(len(projected) // 2, 0)).sum(1)
        return {
            "loss_enc_global_contra": distance.mean(),
            "projection_std": self._spread(projected),
        }

    @torch.no_grad()
    def _spread(self, x: Tensor) -> Tensor:
        """Standard deviation over the rows of [N, C] of all processes, mean over channels."""
        sums = torch.cat([x.new_full((1,), len(x)), x.sum(0), x.square().sum(0)])
        if self.training:  # as in `_num_boxes`
            all_reduce_sum(sums)
        mean, square = (sums[1:] / sums[0]).chunk(2)
        return (square - mean.square()).clamp(min=0).sqrt().mean()


def expand_weights(
    weights: dict[str, float], num_aux_layers: int, proposals: bool = False
) -> dict[str, float]:
    """The weights of the last layer, and the same for each earlier one with its suffix, and for the losses of encoder
    proposals.
    """
    expanded = dict(weights)
    for layer in range(num_aux_layers):
        expanded.update({f"{name}_{layer}": weight for name, weight in weights.items()})
    if proposals:
        expanded.update(
            {
                f"{name}_enc": weights[name]
                for name in ("loss_ce", "loss_bbox", "loss_giou")
                if name in weights
            }
        )
    return expanded
