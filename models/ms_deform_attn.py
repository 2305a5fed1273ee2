"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3): a weighted sum of a few
bilinear samples of several feature maps.

Two implementations give the same results. "pytorch" runs on every device and in every dtype.
"triton" runs on NVIDIA GPUs from Ampere on; Triton comes with PyTorch, so there is nothing to
compile at install time. "auto" selects Triton where it can run.

Shapes: B images, S tokens (pixels of all maps), Q queries, H heads, D channels per head, L levels
(maps), P points, h x w size of a map.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import full_precision
from util.errors import UserError

IMPLEMENTATIONS = ("auto", "pytorch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # Ampere
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton builds its launcher with a C compiler, once.
HAS_COMPILER = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
# Triton's own switch: kernels run on the CPU, slowly, for tests.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ms_deform_attn(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    implementation: str = "auto",
) -> Tensor:
    """Sample every map at the locations and sum the samples by weight.

    Samples are bilinear and zero outside of the map. The pixel coordinate is location * size - 0.5.

    Args:
        value: [B, S, H, D], the maps one after the other, row by row.
        shapes: (height, width) of each of the L maps; their areas sum to S.
        locations: [B, Q, H, L, P, 2], (x, y), [0, 1] covers the map. Finite, may be far outside.
        weights: [B, Q, H, L, P].
        implementation: "auto", "pytorch" or "triton".

    Returns:
        [B, Q, H * D] in the dtype of value. Arithmetic is in float32 (on the PyTorch path float64
        for a float64 value), independent of dtypes and autocast. Each gradient has the dtype of its
        tensor. The Triton path has first-order derivatives only, and sums the gradient of value in
        no fixed order.

    Raises:
        UserError: an unknown implementation, or "triton" where it cannot run.
        ValueError: shapes that do not match.
    """
    _check_shapes(value, shapes, locations, weights)
    if select_implementation(implementation, value.device, value.dtype) == "triton":
        flat_shapes = [size for shape in shapes for size in shape]  # h, w, h, w, ...
        return _triton(
            value.contiguous(), flat_shapes, locations.contiguous(), weights.contiguous()
        )
    return _pytorch(value, shapes, locations, weights)


def ms_deform_attn_fused(
    value: Tensor, shapes: Sequence[tuple[int, int]], samples: Tensor, references: Tensor
) -> Tensor:
    """`ms_deform_attn` from what a query's linear layer predicts, in one Triton kernel.

    Only where `select_implementation` returns "triton". Equals `ms_deform_attn` of what
    `sampling_points` returns.

    Args:
        value, shapes: as in `ms_deform_attn`.
        samples: [B, Q, 3 * H * L * P], first the offsets (x, y) of all points in pixels of their
            map, then the logits of all points.
        references: points (x, y) [B, Q, L, 2], without gradient.

    Returns:
        [B, Q, H * D] in the dtype of value.
    """
    flat_shapes = [size for shape in shapes for size in shape]
    return _triton_fused(
        value.contiguous(), flat_shapes, samples.contiguous(), references.contiguous()
    )


def sampling_points(
    samples: Tensor, references: Tensor, sizes_wh: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Turn what a query's linear layer predicts into locations and weights of `ms_deform_attn`.

    Args:
        samples: [B, Q, 3 * H * L * P], as in `ms_deform_attn_fused`.
        references: points [B, Q, L, 2] or boxes (cx, cy, w, h) [B, Q, L, 4], relative to the maps.
        sizes_wh: size of each map, [L, 2].

    Returns:
        locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P], not in half precision: close to 1,
        bfloat16 has steps of 1/256, half a cell of 128.
    """
    third = samples.shape[-1] // 3
    offsets, weights = full_precision(samples).split([2 * third, third], -1)
    offsets = offsets.unflatten(-1, (num_heads, len(sizes_wh), -1, 2))  # [B, Q, H, L, P, 2]
    # One softmax over the points of all levels: the weights of a head sum to 1.
    weights = weights.unflatten(-1, (num_heads, -1)).softmax(-1)  # [B, Q, H, L * P]
    weights = weights.unflatten(-1, (len(sizes_wh), -1))  # [B, Q, H, L, P]

    anchors = references[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
    if anchors.shape[-1] == 2:
        # Offsets are in cells of each map.
        return anchors + offsets / sizes_wh[:, None], weights
    # Offsets scale with the box. Initially point p is at (p + 1) / P of half its sides.
    centers, sides = anchors[..., :2], anchors[..., 2:]
    return centers + offsets / offsets.shape[-2] * sides * 0.5, weights


def select_implementation(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what `ms_deform_attn` runs for a value of this dtype and device.

    Under `torch.use_deterministic_algorithms` "auto" is "pytorch": PyTorch reports its operations
    that are not deterministic, while Triton's atomic additions would go unnoticed.

    Raises:
        UserError: see `ms_deform_attn`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"--ms_deform_attn {implementation}: choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        use_triton = (
            device.type == "cuda"
            and _why_not_triton(device, dtype) is None
            and not torch.are_deterministic_algorithms_enabled()
        )
        return "triton" if use_triton else "pytorch"

    reason = _why_not_triton(device, dtype) if implementation == "triton" else None
    if reason:
        raise UserError(f"--ms_deform_attn triton: {reason}; use auto or pytorch")
    return implementation


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot run, or None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the kernel takes float32, bfloat16 and float16, not {name}"
    if TRITON_INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    if _capability(device) < MIN_CAPABILITY:
        major, minor = MIN_CAPABILITY
        return f"it needs a GPU of compute capability {major}.{minor} or later"
    return None if HAS_COMPILER else "Triton needs gcc or clang, and neither is installed"


@torch.compiler.assume_constant_result  # avoids a graph break under torch.compile
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check_shapes(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    B, S, H, _ = value.shape
    if sum(height * width for height, width in shapes) != S:
        sizes = [tuple(shape) for shape in shapes]
        raise ValueError(f"value has {S} pixels, which does not match maps of {sizes}")
    if locations.dim() != 6 or locations.shape[-1] != 2 or locations.shape[:-1] != weights.shape:
        raise ValueError(
            f"locations {tuple(locations.shape)} must have the shape of weights "
            f"{tuple(weights.shape)} and a last dimension of 2"
        )
    if (locations.shape[0], *locations.shape[2:4]) != (B, H, len(shapes)):
        raise ValueError(
            f"locations {tuple(locations.shape)} do not match {B} images, {H} heads and "
            f"{len(shapes)} maps"
        )


def _pytorch(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    B, _, H, D = value.shape
    _, Q, _, L, P, _ = locations.shape

    # Heads join the batch, since each has sampling points of its own.
    pixels = value.to(dtype).permute(0, 2, 3, 1).reshape(B * H, D, -1)  # [B * H, D, S]
    maps = pixels.split([height * width for height, width in shapes], -1)  # L x [B * H, D, h * w]
    # grid_sample's coordinates are -1 and 1 at the borders of the map.
    grid = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 4, 1, 5)  # [L, B, H, P, Q, 2]
    grid = grid.reshape(L, B * H, P, Q, 2)
    level_weights = weights.to(dtype).permute(3, 0, 2, 4, 1)  # [L, B, H, P, Q]
    level_weights = level_weights.reshape(L, B * H, 1, P, Q)

    # Level by level, with the queries last: no tensor of all samples exists at once, and sums run
    # over whole rows. On a CPU this halves the time.
    summed: Any = 0
    for level_map, shape, points, weight in zip(maps, shapes, grid, level_weights, strict=True):
        samples = F.grid_sample(
            level_map.unflatten(-1, tuple(shape)),  # [B * H, D, h, w]
            points,  # [B * H, P, Q, 2]
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # [B * H, D, P, Q]
        summed = summed + (samples * weight).sum(-2)  # [B * H, D, Q]
    out = summed.view(B, H, D, Q).permute(0, 3, 1, 2)  # [B, Q, H, D]
    return out.reshape(B, Q, H * D).to(value.dtype)


# Custom operators: torch.compile and torch.export keep the kernels as one node of the graph.
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


def _empty_output(value: Tensor, Q: int) -> Tensor:
    B, _, H, D = value.shape
    return value.new_empty(B, Q, H * D)


# Fake implementations give the shapes of the results while PyTorch traces.
@_triton.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _empty_output(value, locations.shape[1])


@_triton_backward.register_fake
def _(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _triton_backward(
        grad_output.contiguous(), value, ctx.shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


_triton.register_autograd(_backward, setup_context=_save_for_backward)


# The same for `ms_deform_attn_fused`. References get no gradient.
@torch.library.custom_op("predetr::ms_deform_attn_fused", mutates_args=())
def _triton_fused(
    value: Tensor, shapes: Sequence[int], samples: Tensor, references: Tensor
) -> Tensor:
    from models.ms_deform_attn_triton import fused_forward

    return fused_forward(value, shapes, samples, references)


@torch.library.custom_op("predetr::ms_deform_attn_fused_backward", mutates_args=())
def _triton_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    samples: Tensor,
    references: Tensor,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    from models.ms_deform_attn_triton import fused_backward

    return fused_backward(grad_output, value, shapes, samples, references, output)


@_triton_fused.register_fake
def _(value: Tensor, shapes: Sequence[int], samples: Tensor, references: Tensor) -> Tensor:
    return _empty_output(value, samples.shape[1])


@_triton_fused_backward.register_fake
def _(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    samples: Tensor,
    references: Tensor,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(samples)


def _save_for_fused_backward(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, samples, references = inputs
    ctx.save_for_backward(value, samples, references, output)


def _fused_backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, None]:
    value, samples, references, output = ctx.saved_tensors
    grad_value, grad_samples = _triton_fused_backward(
        grad_output.contiguous(), value, ctx.shapes, samples, references, output
    )
    return grad_value, None, grad_samples, None


_triton_fused.register_autograd(_fused_backward, setup_context=_save_for_fused_backward)
