"""How a detector tells classes apart: softmax with a "no object" class, or independent focal (sigmoid) outputs.

One object, given to head initialisation, matcher, criterion and post-processor, so that these can't disagree.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from util.settings import Settings

PRIOR = 0.01  # initial probability of a focal output (Lin et al. 2017, section 4.1)


@dataclass(frozen=True)
class Classification:
    """kind: `softmax` (one more output, the last, says "no object") or `focal`.

    num_classes: labels are 0 .. num_classes - 1. cost_*: weights of the three terms of the matching cost.
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
                "all matching costs are 0: at least one of --set_cost_class, _bbox and _giou must be positive"
            )

    @property
    def num_outputs(self) -> int:
        return self.num_classes + (self.kind == "softmax")

    def init_head(self, head: nn.Linear) -> None:
        """Focal heads start at the prior probability; softmax heads keep the library's initial values."""
        if self.kind == "focal":
            nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))

    def class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of giving each query each label: logits [..., Q, C], labels int64 [..., N] -> [..., Q, N].

        Softmax: minus the probability (Carion et al. 2020, section 3.1). Focal: the loss as a positive minus the loss
        as a negative, alpha 0.25 and gamma 2 as published, whatever the criterion's alpha.
        """
        index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])
        if self.kind == "softmax":
            return -logits.softmax(-1).gather(-1, index)
        probability = logits.gather(-1, index).sigmoid()
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        return positive - negative


def matching_costs(settings: Settings) -> dict[str, float]:
    """The weights of the matching cost from the flags, for `Classification`."""
    return {
        "cost_class": settings.set_cost_class,
        "cost_bbox": settings.set_cost_bbox,
        "cost_giou": settings.set_cost_giou,
    }


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Element-wise focal loss (Lin et al. 2017, equation 5); targets in {0, 1}, same shape. A negative alpha means no
    weighting.
    """
    probability = logits.sigmoid()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_true = probability * targets + (1 - probability) * (1 - targets)
    loss = cross_entropy * (1 - p_true) ** gamma
    if alpha < 0:
        return loss
    return loss * (alpha * targets + (1 - alpha) * (1 - targets))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of values in [0, 1], with both terms kept at `eps` or more."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
