"""Momentum teacher: an exponential moving average of a pretext that gives it targets (BYOL, Grill
et al., NeurIPS 2020, section 3.1).
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.backbone import Backbone
from models.detector import Memory
from util.distributed import BATCH_NORMS
from util.nested_tensor import NestedTensor


class MomentumTeacher:
    """A copy of a pretext without gradients, `network`, that follows it after each optimizer step.

    Equation 1 of BYOL, with a cosine schedule:

        teacher <- m * teacher + (1 - m) * student
        m = 1 - (1 - momentum) * (cos(pi * progress) + 1) / 2, with the training progress in [0, 1]

    Dropout is off in the teacher. In training its batch norm uses the statistics of the batch, as
    the student's does; its running statistics are copied from the student. A backbone that does not
    train is not copied, its feature maps are shared.

    Args:
        student: a complete pretext; parts that are added later are not in the copy.
        momentum: m at the start of training, in [0, 1]; 0: the student before the step, 1: constant.
    """

    def __init__(self, student: Any, momentum: float) -> None:
        backbone = student.detector.backbone[0]
        self.momentum = momentum
        self.maps = _PrecomputedMaps(backbone) if backbone.frozen else None
        # `deepcopy` finds the backbone in its memo and uses the substitute instead of a copy.
        memo = {id(backbone): self.maps} if self.maps else {}
        self.network: Any = copy.deepcopy(student, memo).requires_grad_(False).eval()
        self.norms = [
            module for module in self.network.modules() if isinstance(module, BATCH_NORMS)
        ]

    @torch.no_grad()
    def update(self, student: nn.Module, progress: float) -> None:
        """Move towards the student. progress: fraction of the training, in [0, 1]."""
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        own, source = dict(self.network.named_parameters()), dict(student.named_parameters())
        get_ema_multi_avg_fn(momentum)(list(own.values()), [source[name] for name in own], None)
        statistics = dict(student.named_buffers())
        for name, buffer in self.network.named_buffers():
            buffer.copy_(statistics[name])

    def train(self, mode: bool) -> None:
        """Set the mode of the batch norms; everything else stays in evaluation mode."""
        for norm in self.norms:
            norm.train(mode)

    @torch.no_grad()
    def encode(self, samples: NestedTensor, memory: Memory) -> Memory:
        """Encode images with the teacher. memory: the student's, for the same images."""
        if self.maps is None:
            return self.network.detector.encode(samples)
        self.maps.tensors = [feature.tensor for feature in memory.features]
        try:
            return self.network.detector.encode(samples)
        finally:
            self.maps.tensors = []  # frees the activations of this step


class _PrecomputedMaps(nn.Module):
    """Substitute for a backbone that returns feature maps computed elsewhere."""

    tensors: list[Tensor] = []

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.patch_size = backbone.patch_size

    def maps(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        return self.tensors
