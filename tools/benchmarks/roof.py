"""The roof: the shortest time that the operations and the memory traffic of some work allow on this device.

Operations are counted by PyTorch's flop counter (matrix products, convolutions and attention), memory traffic as the
inputs and outputs of every operation that runs, as if nothing stayed in a cache. Rates are measured here: one large
matrix product, one large copy. The roof by operations holds for any way to compute the same; the one by traffic is that
of the code as it is written, and fusing operations raises it.
"""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Operations that move no data, beside views.
NO_TRAFFIC = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty"}


class Traffic(TorchDispatchMode):
    """Count operations and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations, self.num_bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in NO_TRAFFIC:
            self.num_operations += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            # An operation in place has the same tensor as input and output: read and written, so counted twice.
            self.num_bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def of_call(
    call: Callable[[], Any], device: torch.device, dtype: torch.dtype
) -> dict[str, float | int]:
    """Count one call and return the roof: FLOPs, bytes, number of operations, and milliseconds by either limit."""
    grouped = {torch.ops.aten.convolution_backward: conv_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=grouped)
    with counter as flops, Traffic() as traffic:
        call()
    matmul, copy = matmul_rate(device, dtype), copy_rate(device)
    return {
        "flops": flops.get_total_flops(),
        "bytes": traffic.num_bytes,
        "operations": traffic.num_operations,
        "matmul_flops_per_s": matmul,
        "copy_bytes_per_s": copy,
        "compute_ms": 1000 * flops.get_total_flops() / matmul,
        "memory_ms": 1000 * traffic.num_bytes / copy,
    }


def conv_backward_flops(
    grad_shape, _, weight_shape, _bias, _stride, _padding, _dilation, transposed, *rest, **_kwargs
) -> int:  # noqa: ANN001
    """Return the FLOPs of a convolution's backward pass. PyTorch's own count ignores groups."""
    *_, output_mask = rest
    grads = int(output_mask[0]) + int(output_mask[1])  # of the input and of the weight
    return grads * 2 * math.prod(grad_shape) // weight_shape[0] * math.prod(weight_shape)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured FLOP/s of a square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: a @ b, device)


@cache
def copy_rate(device: torch.device) -> float:
    """Return the measured bytes/s of a copy, read and written bytes together."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)  # other load can only make it longer
