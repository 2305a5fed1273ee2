"""Classification by softmax with a "no object" class, or by independent sigmoids (focal loss).

One `Classification` object configures head, matcher, criterion and post-processor, so they always
agree.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from util.settings import Settings

PRIOR_PROB = 0.01  # initial probability of a focal output (Lin et al. 2017, section 4.1)
SOFTPLUS_THRESHOLD = 40  # beyond it softplus(x) is x, exactly so in float64


@dataclass(frozen=True)
class Classification:
    """The kind of classification, the number of classes and the weights of the matching cost.

    kind: `softmax` (one extra output, the last, for "no object") or `focal`.
    num_classes: labels are 0 .. num_classes - 1.
    cost_class, cost_bbox, cost_giou: weights of the matching cost, see `HungarianMatcher`.

    Raises:
        ValueError: unknown kind, or all costs are 0.
    """

    kind: str
    num_classes: int
    _: KW_ONLY
    cost_class: float
    cost_bbox: float = 5.0
    cost_giou: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "focal"):
            raise ValueError(f"classification must be softmax or focal, got {self.kind}")
        if self.cost_class == self.cost_bbox == self.cost_giou == 0:
            raise ValueError(
                "all matching costs are 0: set at least one of --set_cost_class, --set_cost_bbox and "
                "--set_cost_giou above 0"
            )

    @property
    def num_outputs(self) -> int:
        """Width of the class head."""
        return self.num_classes + (self.kind == "softmax")

    def init_head(self, head: nn.Linear) -> None:
        """Initialize the bias of a focal head; a softmax head keeps PyTorch's initial values."""
        if self.kind == "focal":
            # sigmoid(bias) = PRIOR_PROB: otherwise the many negatives dominate the first steps.
            nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))

    def class_cost(self, scores: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the class term of the matching cost of every target and query: [L, T, Q].

        scores: logits [L, B, Q, C]; for softmax their log-probabilities. image, labels: int64 [T].

        Softmax: minus the probability (Carion et al. 2020, section 3.1). Focal: the focal loss as a
        positive minus the focal loss as a negative. Its alpha is 0.25 and its gamma 2 as published,
        independent of the criterion's `focal_alpha`.
        """
        # Only the classes of the targets are read, not all of them.
        own = scores.permute(1, 3, 0, 2)[image, labels].transpose(0, 1)  # [L, T, Q]
        if self.kind == "softmax":
            return -own.exp()

        probability = own.sigmoid()
        # The published 1e-8 keeps the logarithms finite at saturated probabilities.
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        return positive - negative


def matching_costs(settings: Settings) -> dict[str, float]:
    """Return the matching cost weights from the flags, as arguments of `Classification`."""
    return {
        "cost_class": settings.set_cost_class,
        "cost_bbox": settings.set_cost_bbox,
        "cost_giou": settings.set_cost_giou,
    }


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Return the element-wise focal loss (Lin et al. 2017, equation 5), without reduction.

    targets: 0 or 1, in the shape of `logits`. A negative `alpha` turns class weighting off.
    """
    probability = logits.sigmoid()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = probability * targets + (1 - probability) * (1 - targets)
    loss = cross_entropy * (1 - p_t) ** gamma
    if alpha < 0:
        return loss
    return loss * (alpha * targets + (1 - alpha) * (1 - targets))


def summed_focal_loss(logits: Tensor, positives: Tensor, alpha: float = 0.25) -> Tensor:
    """Return the focal loss with gamma 2, summed over all but the first dimension: [L, ...] -> [L].

    Equals `sigmoid_focal_loss` with few ones among the targets, but does not need these as a tensor.

    positives: int64 [K], where the targets are 1, as indices into the flattened logits; every layer
        has K / L of them, layer by layer.
    """
    positive_weight, negative_weight = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
    negative: Tensor = _NegativeFocalLoss.apply(logits.flatten(1))  # [L]

    own = logits.flatten()[positives]  # [K]
    # The loss of a positive is that of a negative with the opposite logit.
    difference = positive_weight * _negative_focal_loss(-own)
    difference = difference - negative_weight * _negative_focal_loss(own)
    return negative_weight * negative + difference.view(len(logits), -1).sum(1)


def _negative_focal_loss(logits: Tensor) -> Tensor:
    return logits.sigmoid().square() * -functional.logsigmoid(-logits)


class _NegativeFocalLoss(torch.autograd.Function):
    """Focal loss of negatives, summed over rows: [L, N] -> [L].

    The gradient is computed with the loss, in place: autograd would run twice the operations and keep
    five tensors of this size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        probability = logits.sigmoid()
        cross_entropy = functional.softplus(logits, threshold=SOFTPLUS_THRESHOLD)
        loss = probability.square().mul_(cross_entropy).sum(1)
        if ctx.needs_input_grad[0]:
            # (p^2 c)' = p^2 (2 (1 - p) c + p), since c' = p and p' = p (1 - p)
            gradient = cross_entropy.addcmul_(cross_entropy, probability, value=-1).mul_(2)
            gradient.add_(probability).mul_(probability).mul_(probability)
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss[:, None]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(x / (1 - x)) of values in [0, 1]; x and 1 - x are clamped to at least `eps`."""
    # One clamp of each, also because ONNX's optimizer breaks graphs with a clamp of a clamp.
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
