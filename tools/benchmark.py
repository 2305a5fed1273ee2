"""Benchmark operations that have several implementations, ours and public ones, in one run.

    python tools/benchmark.py ms_deform_attn [--device cuda] [--image_size 800] [--batch_size 2]

Each implementation must first agree with the first one, the reference. Then they are timed interleaved, so that other
load on the machine affects all of them alike. `--output` gets a table (SUBJECT.md) and all values (SUBJECT.json). To
add a subject, write a function that yields comparisons and add a line to SUBJECTS.

Letters in shape comments: B images, H heads, L levels (feature maps), P sampling points, Q queries, C channels per
head, S pixels of all levels.
"""

import argparse
import importlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.ms_deform_attn import ms_deform_attn, select_implementation  # noqa: E402
from util.errors import UserError
from util.files import write_text  # noqa: E402
from util.logger import Progress, log  # noqa: E402
from util.markdown import markdown_table  # noqa: E402
from util.runs.session import run_script  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "mmcv")
SECONDS_PER_TURN = 0.02  # a turn repeats the call until it lasts about this long


@dataclass
class Comparison:
    """Implementations of the same operation on the same inputs.

    Attributes:
        name: what is computed.
        contenders: name -> function that runs the operation once and returns the tensors to compare. The first one is
            the reference.
        tolerance: largest difference from the reference, relative to the largest absolute value of each tensor.
        skipped: contenders that can't run here -> the reason.
    """

    name: str
    contenders: dict[str, Callable[[], Iterable[Tensor]]]
    tolerance: float
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """One row of the table. Times are milliseconds per call."""

    comparison: str
    contender: str
    median_ms: float  # over turns
    low_ms: float  # lower quartile
    high_ms: float  # upper quartile
    speedup: float  # the reference's median divided by this one
    peak_mib: float | None  # peak memory minus memory in use before the call; GPU only
    difference: float  # see `Comparison.tolerance`
    turns: int
    calls_a_turn: int


# ---- measurement ----


def check(comparison: Comparison) -> dict[str, float]:
    """Return each contender's largest relative difference from the reference.

    Raises:
        UserError: a contender differs by more than the tolerance.
    """
    first, *others = comparison.contenders
    expected = [tensor.double() for tensor in comparison.contenders[first]()]
    differences = {first: 0.0}
    for name in others:
        outputs = comparison.contenders[name]()
        differences[name] = max(
            float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-12))
            for a, b in zip(outputs, expected, strict=True)
        )
        if not differences[name] <= comparison.tolerance:  # written so that NaN is refused too
            raise UserError(
                f"{comparison.name}: {name} differs from {first} by {differences[name]:.2g}, more than "
                f"{comparison.tolerance:.2g}; fix or remove it, its time would be meaningless"
            )
    return differences


def seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the mean seconds per call of `calls` calls in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    # Kernels run asynchronously: events measure on the device, without the host's time between launches.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls  # elapsed_time is in milliseconds


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB that a call allocates on top of what is in use; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(comparison: Comparison, turns: int, device: torch.device) -> list[Row]:
    """Check the contenders, then time them interleaved: each one once per turn."""
    differences = check(comparison)
    contenders = comparison.contenders
    peaks = {name: peak_memory(call, device) for name, call in contenders.items()}
    num_calls = {
        name: max(1, math.ceil(SECONDS_PER_TURN / seconds(call, 1, device)))
        for name, call in contenders.items()
    }

    times_ms: dict[str, list[float]] = {name: [] for name in contenders}
    progress = Progress(turns * len(contenders), comparison.name)
    for _ in range(turns):
        for name, call in contenders.items():
            times_ms[name].append(1000 * seconds(call, num_calls[name], device))
            progress.step()

    # Medians and quartiles, because other load on the machine makes single turns slow.
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    reference_ms = next(iter(medians.values()))
    rows = []
    for name, values in times_ms.items():
        low_ms, high_ms = quartiles(values)
        rows.append(
            Row(
                comparison=comparison.name,
                contender=name,
                median_ms=medians[name],
                low_ms=low_ms,
                high_ms=high_ms,
                speedup=reference_ms / medians[name],
                peak_mib=peaks[name],
                difference=differences[name],
                turns=turns,
                calls_a_turn=num_calls[name],
            )
        )
    return rows


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---- multi-scale deformable attention ----


def compare_ms_deform_attn(args: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    """Yield comparisons of forward + backward at the shapes of training: 4 levels, 8 heads of 32 channels, 4 points."""
    shapes = feature_map_shapes(args.image_size)
    for dtype in args.dtypes:
        for part in ("encoder", "decoder"):
            inputs = attention_inputs(part, shapes, args.batch_size, getattr(torch, dtype), device)
            yield compare_attention(f"{part}, {dtype}", shapes, inputs)


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
    contenders = {
        key: forward_backward(call, (value, locations, weights), grad_output)
        for key, call in calls.items()
    }

    for public_name, load in PUBLIC_IMPLEMENTATIONS.items():
        try:
            call = load(shapes, value.device)
            contender = forward_backward(call, (value, locations, weights), grad_output)
            contender()  # compiled extensions may fail only when they run
            contenders[public_name] = contender
        except Exception as error:  # noqa: BLE001 - any failure of a public package; the others are still measured
            first_line = str(error).partition("\n")[0]
            skipped[public_name] = f"{type(error).__name__}: {first_line}"

    tolerance = 1e-3 if value.dtype == torch.float32 else 2e-2
    return Comparison(name, contenders, tolerance, skipped)


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


SUBJECTS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Comparison]]] = {
    "ms_deform_attn": compare_ms_deform_attn,
}


# ---- results ----


def environment(device: torch.device) -> dict[str, str]:
    """Return what the times depend on: device, Python and package versions."""
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        hardware = (
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
        )
    found = {"device": hardware, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(
    subject: str,
    rows: list[Row],
    skipped: dict[str, str],
    settings: dict,
    environment_info: dict[str, str],
) -> str:
    """Return the results as Markdown."""
    head = [
        "operation",
        "implementation",
        "median ms (quartiles)",
        "speed-up over the first",
        "memory MiB",
        "largest difference",
    ]
    cells = [
        [
            row.comparison,
            row.contender,
            f"{row.median_ms:.3g} ({row.low_ms:.3g} to {row.high_ms:.3g})",
            f"{row.speedup:.2f}",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            f"{row.difference:.1e}",
        ]
        for row in rows
    ]
    lines = [
        f"# {subject}",
        "",
        ", ".join(f"{key} {value}" for key, value in environment_info.items()) + ".",
        "",
        "Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + ".",
        "",
        markdown_table(head, cells),
        "",
        *(f"Not measured: {name} ({reason})." for name, reason in skipped.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/benchmark.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "subject",
        choices=sorted(SUBJECTS),
        help="operation to measure; ms_deform_attn is multi-scale deformable attention, forward and backward",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:N or cpu; a GPU if there is one",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=800,
        metavar="PIXELS",
        help="short side of the images, in pixels; the long side is 4/3 of it",
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
        "--turns", type=int, default=20, metavar="N", help="how often each implementation is timed"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        metavar="DIR",
        help="folder for SUBJECT.md and SUBJECT.json",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier results in --output"
    )
    args = parser.parse_args(argv)
    for name in ("image_size", "batch_size", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    table_path = args.output / f"{args.subject}.md"
    json_path = args.output / f"{args.subject}.json"
    for path in (table_path, json_path):
        if path.exists() and not args.overwrite:
            raise UserError(
                f"--output {args.output} already has {path.name}: give another folder, or --overwrite to replace it"
            )
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no GPU is visible to PyTorch; use --device cpu")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    rows, skipped = [], {}
    for comparison in SUBJECTS[args.subject](args, device):
        rows += measure(comparison, args.turns, device)
        skipped |= comparison.skipped

    not_settings = ("subject", "output", "overwrite")
    settings = {key: value for key, value in vars(args).items() if key not in not_settings}
    environment_info = environment(device)
    text = table(args.subject, rows, skipped, settings, environment_info)
    log.info("%s", text)
    write_text(table_path, text)
    content = {
        "environment": environment_info,
        "settings": settings,
        "rows": [vars(row) for row in rows],
        "not_measured": skipped,
    }
    write_text(json_path, json.dumps(content, indent=1))
    log.info("results written to %s and %s", table_path, json_path)


if __name__ == "__main__":
    run_script(main, parse)
