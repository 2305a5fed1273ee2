"""Batch norm over the samples of all processes, on any backend: PyTorch's own refuses gloo."""

from typing import Any

import torch
from torch import Tensor, nn

from util.distributed import all_reduce_sum, get_world_size


class _SumOverProcesses(torch.autograd.Function):
    """What one process puts in changes the loss of every process, so that gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


class SyncedBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for [N, C] whose training statistics are of the samples of all processes together; N may differ
    between them.

    Every process must call it equally often. With gradients averaged over the processes, W processes with N samples
    equal one with W x N.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C]"""
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        count = all_reduce_sum(x.new_full((1,), len(x)))
        mean = _SumOverProcesses.apply(x.sum(0)) / count
        centred = x - mean
        variance = _SumOverProcesses.apply(centred.square().sum(0)) / count
        self._keep(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
