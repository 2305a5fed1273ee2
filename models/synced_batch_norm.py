"""Batch norm over the samples of all ranks, on any backend (PyTorch's own refuses gloo)."""

from typing import Any

import torch
from torch import Tensor, nn

from util.distributed import all_reduce_sum, get_world_size


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. An input affects the loss of every rank, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())  # a copy, since the sum is in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


class SyncedBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for [N, C] with training statistics over the samples of all ranks.

    N may differ between ranks, but every rank must call it equally often. With gradients averaged
    over ranks, W ranks with N samples each equal one process with W * N samples.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C]"""
        if not self.training or get_world_size() == 1:
            return super().forward(x)

        count = all_reduce_sum(x.new_full((1,), len(x)))  # [1]
        mean = _AllReduceSum.apply(x.sum(0)) / count  # [C]
        centered = x - mean  # [N, C]
        # From centered values rather than the mean of squares, which would cancel.
        variance = _AllReduceSum.apply(centered.square().sum(0)) / count  # [C]
        # As in PyTorch, running statistics have the unbiased variance.
        unbiased = variance.detach() * count / (count - 1).clamp(min=1)
        self._update_running_stats(mean.detach(), unbiased)
        return centered * (variance + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
