"""Which precision an operation runs in: half precision in the network, float32 for boxes and losses."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def full_precision(x: Tensor) -> Tensor:
    """Cast half precision to float32; matching, losses and results never run in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def under_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for the device of `x`."""
    device = x.device.type
    # The meta device, on which model sizes are computed, has no autocast.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context with autocast off, for the device of `x`."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def to_weight_dtype(x: Tensor, head: nn.Module) -> Tensor:
    """Cast `x` to the dtype of the head's weights.

    Under autocast these are float32, so heads and boxes stay in float32. A model that was cast as a
    whole, for instance by `model.half()`, runs its heads in that dtype too.
    """
    return x.to(next(head.parameters()).dtype)
