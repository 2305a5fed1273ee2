"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3): a weighted sum of a few bilinear samples of
several maps.

Two implementations of the same numbers. "pytorch" runs on every device and in every dtype. "triton" runs on NVIDIA GPUs
from Ampere on; Triton comes with PyTorch, and nothing has to be built. "auto" takes Triton where it can run.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError

IMPLEMENTATIONS = ("auto", "pytorch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_COMPILER = "CC" in os.environ or any(
    map(shutil.which, ("gcc", "clang"))
)  # Triton builds its launcher with one, once
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's own switch: kernels run on the CPU, slowly, for tests


def ms_deform_attn(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    implementation: str = "auto",
) -> Tensor:
    """Samples every map at the locations (bilinear, zero outside, pixel coordinate = location * size - 0.5) and adds up
    by weights.

    Args:
        value: [B, S, H, D], the maps one after the other, row by row; H heads of D channels.
        shapes: (height, width) of each of the L maps; S is the sum of their areas.
        locations: [B, Q, H, L, P, 2], (x, y) in [0, 1] of each map; may lie outside, also far outside. Finite.
        weights: [B, Q, H, L, P].
        implementation: "auto", "pytorch" or "triton".

    Returns:
        [B, Q, H * D] in the dtype of value. Arithmetic is in float32 (float64 for a value in float64, on the PyTorch
        path) whatever the dtypes and whether autocast is on; each gradient has the dtype of its tensor. Derivatives are
        of first order on the Triton path, and its gradient of value is summed in no fixed order.

    Raises:
        UserError: "triton" where it can't run, or a name that is no implementation.
        ValueError: shapes that don't belong together.
    """
    _check(value, shapes, locations, weights)
    if choose(implementation, value.device, value.dtype) == "triton":
        flat = [size for shape in shapes for size in shape]
        return _triton(value.contiguous(), flat, locations.contiguous(), weights.contiguous())
    return _pytorch(value, shapes, locations, weights)


def choose(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "pytorch" or "triton": what `ms_deform_attn` runs for a value of this dtype on this device.

    Under `torch.use_deterministic_algorithms` "auto" is "pytorch", where PyTorch itself says what it can't repeat.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"--ms_deform_attn {implementation}: choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        runs = (
            device.type == "cuda"
            and _obstacle(device, dtype) is None
            and not torch.are_deterministic_algorithms_enabled()
        )
        return "triton" if runs else "pytorch"
    obstacle = _obstacle(device, dtype) if implementation == "triton" else None
    if obstacle:
        raise UserError(f"--ms_deform_attn triton: {obstacle}; give auto or pytorch")
    return implementation


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton can't run here, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    if _capability(device) < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later"
    return None if HAS_COMPILER else "Triton needs gcc or clang, and neither is installed"


@torch.compiler.assume_constant_result  # so that a call in a compiled function needs no break in its graph
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    B, S, H, _ = value.shape
    if sum(height * width for height, width in shapes) != S:
        raise ValueError(
            f"value has {S} pixels, maps of {[tuple(shape) for shape in shapes]} have another number"
        )
    if locations.dim() != 6 or locations.shape[-1] != 2 or locations.shape[:-1] != weights.shape:
        raise ValueError(
            f"locations {tuple(locations.shape)} are not weights {tuple(weights.shape)} with x and y"
        )
    if (locations.shape[0], *locations.shape[2:4]) != (B, H, len(shapes)):
        raise ValueError(
            f"locations {tuple(locations.shape)} are not for {B} images, {H} heads and {len(shapes)} maps"
        )


def _pytorch(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    B, _, H, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    maps = (
        value.to(dtype)
        .permute(0, 2, 3, 1)
        .reshape(B * H, D, -1)
        .split([height * width for height, width in shapes], -1)
    )
    grid = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 4, 1, 5).reshape(L, B * H, P, Q, 2)
    by_level = weights.to(dtype).permute(3, 0, 2, 4, 1).reshape(L, B * H, 1, P, Q)
    # Map by map, queries last: no tensor of all samples is made, and sums run over whole rows. On a CPU this halves the
    # time.
    summed: Any = 0
    for pixels, shape, points, weight in zip(maps, shapes, grid, by_level, strict=True):
        samples = F.grid_sample(
            pixels.unflatten(-1, tuple(shape)),
            points,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        summed = summed + (samples * weight).sum(-2)  # [B * H, D, Q]
    return summed.view(B, H, D, Q).permute(0, 3, 1, 2).reshape(B, Q, H * D).to(value.dtype)


@torch.library.custom_op("predetr::ms_deform_attn", mutates_args=())
def _triton(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    from models.ms_deform_attn_triton import forward

    return forward(value, shapes, locations, weights)


@torch.library.custom_op("predetr::ms_deform_attn_backward", mutates_args=())
def _triton_backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from models.ms_deform_attn_triton import backward

    return backward(grad_output, value, shapes, locations, weights)


@_triton.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_triton_backward.register_fake
def _(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _triton_backward(
        grad_output.contiguous(), value, ctx.shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


_triton.register_autograd(_gradients, setup_context=_keep)
