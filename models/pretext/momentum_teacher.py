"""A momentum teacher: a copy of a pretext that follows it slowly and gives it targets (BYOL, Grill et al., NeurIPS
2020, section 3.1).
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.detector import Memory
from util.distributed import BATCH_NORMS
from util.nested_tensor import NestedTensor


class MomentumTeacher:
    """`network` is a copy of a pretext without gradients, whose parameters move after each step by equation 1:

        teacher <- m * teacher + (1 - m) * student
        m = 1 - (1 - momentum) * (cos(pi * progress) + 1) / 2, with the progress of the training in [0, 1]

    Dropout is off in it. Batch norm takes the statistics of the batch in training, as the student's does; running
    statistics are the student's. A backbone that does not train is not copied: its maps are those that the student's
    made.

    Args:
        student: complete; what it gets later is not in the copy.
        momentum: at the start of training, in [0, 1]; 0: the student as it was before the step, 1: never moves.
    """

    def __init__(self, student: Any, momentum: float) -> None:
        backbone = student.detector.backbone[0]
        self.momentum, self.maps = momentum, _GivenMaps() if backbone.frozen else None
        self.network: Any = (
            copy.deepcopy(student, {id(backbone): self.maps} if self.maps else {})
            .requires_grad_(False)
            .eval()
        )
        self.norms = [
            module for module in self.network.modules() if isinstance(module, BATCH_NORMS)
        ]

    @torch.no_grad()
    def follow(self, student: nn.Module, progress: float) -> None:
        """`progress`: of the training, in [0, 1]."""
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        own, source = dict(self.network.named_parameters()), dict(student.named_parameters())
        get_ema_multi_avg_fn(momentum)(list(own.values()), [source[name] for name in own], None)
        statistics = dict(student.named_buffers())
        for name, buffer in self.network.named_buffers():
            buffer.copy_(statistics[name])

    def train(self, mode: bool) -> None:
        for norm in self.norms:
            norm.train(mode)

    @torch.no_grad()
    def encode(self, samples: NestedTensor, memory: Memory) -> Memory:
        """What the teacher's encoder makes of the same images; `memory` is what the student's did."""
        if self.maps is None:
            return self.network.detector.encode(samples)
        self.maps.tensors = [feature.tensor for feature in memory.features]
        try:
            return self.network.detector.encode(samples)
        finally:
            self.maps.tensors = []  # nothing of this step is kept for the next one


class _GivenMaps(nn.Module):
    """In place of a backbone: maps that another one made of the same images."""

    tensors: list[Tensor] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.tensors
