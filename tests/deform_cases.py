"""Cases of multi-scale deformable attention, compared with float64 on the PyTorch path.

As a script, it runs the Triton kernels on the CPU with Triton's interpreter:

    TRITON_INTERPRET=1 python tests/deform_cases.py numbers|registration
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.ms_deform_attn import (
    _triton,
    _triton_backward,
    _triton_fused,
    ms_deform_attn,
    ms_deform_attn_fused,
    sampling_points,
)

# Relative to the largest value: half a unit in the last place, and some additions.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 6e-3,
    torch.float16: 8e-4,
    torch.float64: 1e-5,
}


@dataclass(frozen=True)
class Case:
    """Q queries, H heads of D channels, P points, maps of these shapes; dtypes of value, locations, weights."""

    B: int
    Q: int
    H: int
    D: int
    P: int
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3
    points: str = "anywhere"


CASES = {
    "one of all": Case(1, 1, 1, 8, 1, ((5, 6),)),
    "odd numbers": Case(2, 5, 3, 24, 3, ((4, 5), (3, 2), (1, 3))),
    "usual": Case(2, 18, 2, 32, 4, ((6, 8), (3, 4), (2, 2), (1, 1))),
    "wide heads": Case(1, 10, 2, 64, 4, ((3, 5), (2, 2))),
    "five maps, eight points, narrow heads": Case(
        1, 3, 2, 8, 8, ((5, 4), (3, 3), (2, 2), (1, 2), (1, 1))
    ),
    "single cells": Case(2, 3, 1, 20, 2, ((1, 1), (1, 1))),
    "borders": Case(1, 18, 2, 16, 2, ((4, 8), (2, 4)), points="borders"),
    "far outside": Case(2, 8, 2, 8, 4, ((4, 5), (2, 3)), points="far"),
    "bfloat16": Case(
        1, 9, 2, 32, 4, ((5, 6), (3, 3)), (torch.bfloat16, torch.float32, torch.float32)
    ),
    "float16": Case(
        1, 9, 2, 24, 3, ((5, 6), (3, 3)), (torch.float16, torch.float32, torch.float16)
    ),
    "half locations": Case(
        1, 5, 2, 16, 2, ((4, 4), (2, 2)), (torch.float32, torch.float16, torch.bfloat16)
    ),
    "double locations": Case(
        1, 5, 2, 16, 2, ((5, 4), (2, 3)), (torch.float32, torch.float64, torch.float64)
    ),
}


def sampling_pixels(case: Case, generator: torch.Generator) -> Tensor:
    """Return pixel coordinates (x, y) of the sampling points, [B, Q, H, L, P, 2]."""
    size = torch.tensor([(width, height) for height, width in case.shapes])[:, None]
    shape = case.B, case.Q, case.H, len(case.shapes), case.P, 2
    if case.points == "borders":
        # Every distance from a border that changes which pixels are read; exact in floating point.
        choices = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5])
        near, far = (choices[torch.randint(5, shape, generator=generator)] for _ in range(2))
        return torch.where(torch.rand(shape, generator=generator) < 0.5, near, size - 1 - far)
    pixels = torch.rand(shape, generator=generator) * (1.6 * size + 2) - (0.3 * size + 1)
    # Between two cells the derivative depends on rounding: keep away.
    pixels = pixels.floor() + (pixels - pixels.floor()).clamp(0.02, 0.98)
    if case.points == "far":
        for fraction, distance in ((0.5, 1e4), (0.3, -1e9), (0.1, 1e30)):
            far_away = torch.rand(shape, generator=generator) < fraction
            pixels = torch.where(far_away, distance, pixels)
    return pixels


def make_inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, locations, weights and the gradient of the output."""
    generator = torch.Generator().manual_seed(case.Q)
    size = torch.tensor([(width, height) for height, width in case.shapes])[:, None]
    locations = (sampling_pixels(case, generator) + 0.5) / size
    value = torch.randn(
        case.B, sum(h * w for h, w in case.shapes), case.H, case.D, generator=generator
    )
    weights = torch.rand(locations.shape[:-1], generator=generator)
    grad_output = torch.randn(case.B, case.Q, case.H * case.D, generator=generator)
    dtypes = (*case.dtypes, case.dtypes[0])
    return tuple(
        t.to(device, dtype)
        for t, dtype in zip((value, locations, weights, grad_output), dtypes, strict=True)
    )


def run(
    inputs: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    implementation: str,
    attention=ms_deform_attn,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output and the gradients of value, locations and weights."""
    *leaves, grad_output = (tensor.detach() for tensor in inputs)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attention(leaves[0], shapes, leaves[1], leaves[2], implementation)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def check(
    name: str, found: Sequence[Tensor], inputs: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> None:
    """Compare a result with float64 arithmetic on the same (rounded) inputs."""
    expected = run([tensor.double() for tensor in inputs], shapes, "pytorch")
    for part, a, b, like in zip(
        ("output", "value", "locations", "weights"),
        found,
        expected,
        (inputs[0], *inputs),
        strict=False,
    ):
        assert a.dtype == like.dtype, f"{name}: {part} is {a.dtype}"
        assert torch.isfinite(a).all(), f"{name}: {part} is not finite"
        difference = float((a.double() - b).abs().max())
        assert difference <= TOLERANCES[a.dtype] * max(float(b.abs().max()), 0.1), (
            f"{name}: {part} differs by {difference:.2g}"
        )


class Model(nn.Module):
    """Takes maps, so that exported shapes are dynamic if the maps are."""

    def forward(self, maps: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
        value = (
            torch.cat([pixels.flatten(2) for pixels in maps], 2)
            .transpose(1, 2)
            .unflatten(2, (weights.shape[2], -1))
        )
        return ms_deform_attn(
            value, [pixels.shape[-2:] for pixels in maps], locations, weights, "triton"
        )


def check_numbers() -> None:
    for name, case in CASES.items():
        inputs = make_inputs(case)
        check(name, run(inputs, case.shapes, "triton"), inputs, case.shapes)
    for name in QUICK_FUSED_CASES:
        for dtypes in FUSED_DTYPES:
            check_fused(name, dtypes)


QUICK_FUSED_CASES = ("one of all", "odd numbers")
FUSED_CASES = (*QUICK_FUSED_CASES, "usual", "five maps, eight points, narrow heads")
FUSED_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))


def fused_inputs(
    case: Case, dtypes: Sequence[torch.dtype], device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Return value, samples, references and the gradient of the output, see `ms_deform_attn_fused`."""
    value, locations, _, grad_output = make_inputs(case)
    generator = torch.Generator().manual_seed(case.Q)
    size = torch.tensor([(width, height) for height, width in case.shapes])  # [L, 2]
    references = torch.rand(case.B, case.Q, len(size), 2, generator=generator)
    offsets = (locations.float() - references[:, :, None, :, None]) * size[:, None]
    logits = 5 * torch.randn(locations.shape[:-1], generator=generator)
    samples = torch.cat([offsets.flatten(2), logits.flatten(2)], -1)  # [B, Q, 3 N]
    dtype, samples_dtype = dtypes
    return (
        value.to(device, dtype),
        samples.to(device, samples_dtype),
        references.to(device),
        grad_output.to(device, dtype),
    )


def plain_from_samples(
    value: Tensor, shapes: Sequence[tuple[int, int]], samples: Tensor, references: Tensor
) -> Tensor:
    """`ms_deform_attn_fused` in PyTorch."""
    sizes_wh = torch.tensor([(w, h) for h, w in shapes], dtype=samples.dtype, device=samples.device)
    points = sampling_points(samples, references, sizes_wh, value.shape[2])
    return ms_deform_attn(value, shapes, *points, "pytorch")


def check_fused(name: str, dtypes: Sequence[torch.dtype], device: str = "cpu") -> None:
    """Compare the fused kernels with float64 arithmetic on the same (rounded) inputs."""
    case = CASES[name]
    value, samples, references, grad_output = fused_inputs(case, dtypes, device)
    results = []
    for attention, dtype in ((ms_deform_attn_fused, None), (plain_from_samples, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (value, samples)]
        output = attention(
            leaves[0], case.shapes, leaves[1], references.to(dtype or references.dtype)
        )
        gradients = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
        results.append((output.detach(), *gradients))
    for part, a, b in zip(("output", "value", "samples"), *results, strict=True):
        assert torch.isfinite(a).all(), f"{name}: {part} is not finite"
        difference = float((a.double() - b).abs().max())
        assert difference <= 3 * TOLERANCES[a.dtype] * max(float(b.abs().max()), 0.1), (
            f"{name}, fused: {part} differs by {difference:.2g}"
        )


def check_registration() -> None:
    """Run PyTorch's checks of custom operators, compile with gradients, and export with dynamic map sizes.

    Also further cases of the fused kernels, which take long under the interpreter.
    """
    for name in FUSED_CASES[len(QUICK_FUSED_CASES) :]:
        for dtypes in FUSED_DTYPES:
            check_fused(name, dtypes)
    case = Case(2, 5, 2, 8, 4, ((3, 4), (2, 2)))
    value, locations, weights, grad_output = make_inputs(case)
    flat = [3, 4, 2, 2]
    torch.library.opcheck(
        _triton,
        (
            value.clone().requires_grad_(),
            flat,
            locations.requires_grad_(),
            weights.requires_grad_(),
        ),
    )
    torch.library.opcheck(
        _triton_backward, (grad_output, value, flat, locations.detach(), weights.detach())
    )
    fused = fused_inputs(case, FUSED_DTYPES[0])[:3]
    torch.library.opcheck(
        _triton_fused, (fused[0].requires_grad_(), flat, fused[1].requires_grad_(), fused[2])
    )
    compiled = torch.compile(ms_deform_attn, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        run((value, locations, weights, grad_output), case.shapes, "triton", compiled),
        run((value, locations, weights, grad_output), case.shapes, "triton"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    sizes = {
        2: torch.export.Dim("height", min=2, max=99),
        3: torch.export.Dim("width", min=2, max=99),
    }
    others = {
        2: torch.export.Dim("other_height", min=2, max=99),
        3: torch.export.Dim("other_width", min=2, max=99),
    }
    maps = [torch.randn(2, 16, 3, 4), torch.randn(2, 16, 2, 5)]
    exported = torch.export.export(
        Model(),
        (maps, locations.detach(), weights.detach()),
        dynamic_shapes=([sizes, others], {}, {}),
    )
    assert any("predetr.ms_deform_attn" in str(node.target) for node in exported.graph.nodes)
    larger = [torch.randn(2, 16, 7, 6), torch.randn(2, 16, 4, 3)]
    torch.testing.assert_close(
        exported.module()(larger, locations, weights), Model()(larger, locations, weights)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"numbers": check_numbers, "registration": check_registration}[sys.argv[1]]()
