"""Multi-scale deformable attention, forward and backward: ours in PyTorch and Triton, and public implementations.

Letters in shape comments: B images, H heads, L levels (feature maps), P sampling points, Q queries, C channels per
head, S pixels of all levels.
"""

import argparse
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.ms_deform_attn import (
    ms_deform_attn,
    ms_deform_attn_fused,
    sampling_points,
    select_implementation,
)
from tools.benchmarks import results
from tools.benchmarks.measure import Comparison, Local
from util.errors import UserError

TILES, WARPS = (256, 512, 1024, 2048), (1, 2, 4, 8)  # of the sweep


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    """Yield comparisons of forward + backward at the shapes of training: 4 levels, 8 heads of 32 channels, 4 points."""
    device = torch.device(args.device)
    shapes = feature_map_shapes(args.image_size)
    for dtype in args.dtypes:
        for part in ("encoder", "decoder"):
            inputs = attention_inputs(part, shapes, args.batch_size, getattr(torch, dtype), device)
            if not args.sweep:
                yield compare_attention(f"{part}, {dtype}", shapes, inputs)
            if part == "encoder":
                name = f"{part} with softmax and locations, {dtype}"
                yield compare_fused(name, shapes, inputs, args.sweep)


def feature_map_shapes(height: int) -> list[tuple[int, int]]:
    """Return (height, width) of the four levels for an image of this height, with the aspect ratio of 800 x 1066."""
    width = round(height * 1066 / 800)
    return [
        (math.ceil(height / stride), math.ceil(width / stride))
        for stride in (8, 16, 32, 64)  # C3 to C5 of a ResNet, and one more stride-2 convolution
    ]


def attention_inputs(
    part: str, shapes: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (value, sampling locations, attention weights, gradient of the output), random but always the same.

    In the encoder each pixel is a query, in the decoder there are 300 queries anywhere in the image. Sampling points
    are where they are in the first training steps: 1 to 4 pixels from the reference point, each head in its own
    direction; half a pixel of noise is added. Locations and weights are float32, as under autocast.

    Shapes: value [B, S, H, C], locations [B, Q, H, L, P, 2], weights [B, Q, H, L, P], gradient [B, Q, H * C].
    """
    heads, channels, points = 8, 32, 4
    generator = torch.Generator().manual_seed(0)
    if part == "encoder":
        centers = []
        for h, w in shapes:
            y, x = torch.meshgrid(
                (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"
            )
            centers.append(torch.stack((x, y), -1).flatten(0, 1))  # [h * w, 2]
        reference = torch.cat(centers).expand(batch, -1, -1)  # [B, S, 2]
    else:
        reference = torch.rand(batch, 300, 2, generator=generator)  # [B, Q, 2]

    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)  # [H, 2]
    radius = torch.arange(1, points + 1)[:, None]  # [P, 1] pixels
    offsets = direction[:, None, None] * radius  # [H, 1, P, 2] pixels
    size = batch, reference.shape[1], heads, len(shapes), points
    offsets = offsets + 0.5 * torch.randn(*size, 2, generator=generator)  # [B, Q, H, L, P, 2]

    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]  # [L, 1, 2]
    pixels = reference[:, :, None, None, None] * sizes - 0.5 + offsets  # [B, Q, H, L, P, 2]
    # Keep away from cell edges: there the derivative of bilinear sampling jumps, and rounding decides which side
    # counts.
    locations = (pixels.floor() + (pixels - pixels.floor()).clamp(0.05, 0.95) + 0.5) / sizes
    weights = torch.randn(*size, generator=generator).flatten(3).softmax(-1).view(size)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, generator=generator)
    grad_output = torch.randn(batch, reference.shape[1], heads * channels, generator=generator)
    return (
        value.to(device, dtype),
        locations.to(device),
        weights.to(device),
        grad_output.to(device, dtype),
    )


def compare_attention(
    name: str, shapes: list[tuple[int, int]], inputs: tuple[Tensor, ...]
) -> Comparison:
    """Return the comparison of all implementations that run here on the same inputs, see `attention_inputs`."""
    value, locations, weights, grad_output = inputs
    skipped = {}
    calls = {"pytorch": lambda v, p, w: ms_deform_attn(v, shapes, p, w, "pytorch")}
    try:
        select_implementation("triton", value.device, value.dtype)
        calls["triton"] = lambda v, p, w: ms_deform_attn(v, shapes, p, w, "triton")
    except UserError as error:
        skipped["triton"] = str(error)
    leaves = (value, locations, weights)
    contenders: dict[str, Any] = {}
    for key, call in calls.items():
        run = forward_backward(call, leaves, grad_output)
        contenders[key] = Local(run, run, value.device)

    for public_name, load in PUBLIC_IMPLEMENTATIONS.items():
        try:
            call = load(shapes, value.device)
            run = forward_backward(call, leaves, grad_output)
            run()  # compiled extensions may fail only when they run
            contenders[public_name] = Local(run, run, value.device)
        except Exception as error:  # noqa: BLE001 - any failure of a public package; the others are still measured
            first_line = str(error).partition("\n")[0]
            skipped[public_name] = f"{type(error).__name__}: {first_line}"

    return Comparison(name, contenders, tolerance(value), skipped=skipped, items=len(value))


def compare_fused(
    name: str, shapes: list[tuple[int, int]], inputs: tuple[Tensor, ...], sweep: str | None = None
) -> Comparison:
    """Return the comparison of attention with the softmax and the sampling points before it, see `attention_inputs`.

    In the encoder one Triton kernel computes them. sweep: `forward` or `backward`, whose launches are varied.
    """
    value, locations, weights, grad_output = inputs
    sizes_wh = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=value.device)
    references = locations.mean((2, 4))  # [B, Q, L, 2]
    offsets = (locations - references[:, :, None, :, None]) * sizes_wh[:, None]
    # As under autocast the linear layer before has the dtype of the value.
    samples = torch.cat([offsets.flatten(2), weights.log().flatten(2)], -1).to(value.dtype)

    def separate(implementation: str) -> Callable[..., Tensor]:
        def call(v: Tensor, x: Tensor) -> Tensor:
            points = sampling_points(x, references, sizes_wh, v.shape[2])
            return ms_deform_attn(v, shapes, *points, implementation)

        return call

    def fused(v: Tensor, x: Tensor) -> Tensor:
        return ms_deform_attn_fused(v, shapes, x, references)

    calls, skipped = {"pytorch": separate("pytorch")}, {}
    try:
        select_implementation("triton", value.device, value.dtype)
        calls["triton, separate"] = separate("triton")
        calls |= sweep_calls(fused, sweep) if sweep else {"triton, fused": fused}
    except UserError as error:
        skipped["triton"] = str(error)
    contenders: dict[str, Any] = {}
    for key, call in calls.items():
        run = forward_backward(call, (value, samples), grad_output)
        contenders[key] = Local(run, run, value.device)
    return Comparison(name, contenders, tolerance(value), skipped=skipped, items=len(value))


def tolerance(value: Tensor) -> float:
    return 1e-3 if value.dtype == torch.float32 else 2e-2


def sweep_calls(call: Callable[..., Tensor], direction: str) -> dict[str, Callable[..., Tensor]]:
    """Return a call with every block size and number of warps of the forward or backward kernel; last the usual one.

    They were not run on a GPU yet.
    """
    from models import ms_deform_attn_triton as kernels

    constant = direction.upper()  # FORWARD or BACKWARD
    usual = getattr(kernels, constant)

    def variant(launch: kernels.Launch) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            # The backward pass, which comes next, reads it too.
            setattr(kernels, constant, launch)
            return call(*inputs)

        return run

    launches = [kernels.Launch(*numbers) for numbers in itertools.product(TILES, WARPS)]
    found = {
        f"{results.SWEEP}{direction}, {launch.elements} elements, {launch.warps} warps": variant(
            launch
        )
        for launch in launches
    }
    return {**found, "triton, fused": variant(usual)}


def forward_backward(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs forward and backward once and returns the output and all input gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> tuple[Tensor, ...]:
        output = call(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return run


def level_sizes_and_starts(
    shapes: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (sizes [L, 2], index of each level's first pixel [L]), which public implementations take."""
    sizes = torch.tensor(shapes, device=device)  # [L, 2], (height, width)
    areas = sizes.prod(1)  # [L]
    return sizes, areas.cumsum(0) - areas


# Public implementations. They compute in float32, under autocast too, so the input is cast and the output cast back.
# The last argument (im2col_step) is the number of images per kernel launch; 64 as published.


def transformers_attention(
    shapes: list[tuple[int, int]], device: torch.device
) -> Callable[..., Tensor]:
    """Hugging Face transformers."""
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    sizes, starts = level_sizes_and_starts(shapes, device)
    module = MultiScaleDeformableAttention()
    return lambda v, p, w: module(v.float(), sizes, shapes, starts, p, w, 64).to(v.dtype)


def mmcv_attention(shapes: list[tuple[int, int]], device: torch.device) -> Callable[..., Tensor]:
    """OpenMMLab mmcv."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    sizes, starts = level_sizes_and_starts(shapes, device)
    apply = MultiScaleDeformableAttnFunction.apply
    return lambda v, p, w: apply(v.float(), sizes, starts, p, w, 64).to(v.dtype)


def extension_attention(
    shapes: list[tuple[int, int]], device: torch.device
) -> Callable[..., Tensor]:
    """The CUDA extension of the published Deformable DETR code, if it is compiled and installed."""
    extension = importlib.import_module("MultiScaleDeformableAttention")
    sizes, starts = level_sizes_and_starts(shapes, device)

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v: Tensor, p: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(v, p, w)
            return extension.ms_deform_attn_forward(v, sizes, starts, p, w, 64)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            v, p, w = ctx.saved_tensors
            return tuple(
                extension.ms_deform_attn_backward(v, sizes, starts, p, w, grad.contiguous(), 64)
            )

    return lambda v, p, w: Compiled.apply(v.float(), p, w).to(v.dtype)


# One that can't be imported or run is skipped, with the reason in the table.
PUBLIC_IMPLEMENTATIONS = {
    "transformers": transformers_attention,
    "mmcv": mmcv_attention,
    "published extension": extension_attention,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_size",
        type=int,
        default=800,
        metavar="PIXELS",
        help="short side of the images; the long side is 4/3 of it",
    )
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="images per batch")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
        help="data types of the values; sampling locations and weights are always float32",
    )
    parser.add_argument(
        "--sweep",
        choices=["forward", "backward"],
        help="vary block size and number of warps of the Triton kernel of this direction; the fastest is logged",
    )
