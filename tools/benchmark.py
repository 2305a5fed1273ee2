"""Times the parts that have more than one implementation, ours and public ones, in the same run.

    python tools/benchmark.py ms_deform_attn [--device cuda] [--image_size 800] [--batch_size 2]

Every contender first has to give the numbers of the first one. Then all take turns, so that what else the machine does
meets them alike. `--output` receives a table (SUBJECT.md) and all numbers (SUBJECT.json). A new subject is a function
that returns comparisons and a line in SUBJECTS.
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
SECONDS_PER_TURN = 0.02  # calls of a contender are repeated until a turn lasts about that long


@dataclass
class Comparison:
    """Contenders at the same work; each call does it once and returns what is compared. The first one is what the
    others are held to.

    `tolerance` is the largest difference allowed, as a fraction of the largest number of each tensor.
    """

    name: str
    contenders: dict[str, Callable[[], Iterable[Tensor]]]
    tolerance: float
    skipped: dict[str, str] = field(default_factory=dict)  # contender -> why it is not here


@dataclass
class Row:
    """One line of the table. Times are milliseconds a call; low and high are the quartiles over turns."""

    comparison: str
    contender: str
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float  # median of the first contender / this median
    peak_mib: float | None  # memory beyond what was in use before the call; GPU only
    difference: float
    turns: int
    calls_a_turn: int


# ---- the measurement ----


def check(comparison: Comparison) -> dict[str, float]:
    """Largest difference of each contender from the first.

    Raises:
        UserError: a contender gives other numbers.
    """
    first, *others = comparison.contenders
    expected = [tensor.double() for tensor in comparison.contenders[first]()]
    differences = {first: 0.0}
    for name in others:
        found = comparison.contenders[name]()
        differences[name] = max(
            float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-12))
            for a, b in zip(found, expected, strict=True)
        )
        if not differences[name] <= comparison.tolerance:
            raise UserError(
                f"{comparison.name}: {name} differs from {first} by {differences[name]:.2g}, more than "
                f"{comparison.tolerance:.2g}; its time would mean nothing"
            )
    return differences


def seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds for each of `calls` calls in a row: between events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call takes beyond what is in use, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(comparison: Comparison, turns: int, device: torch.device) -> list[Row]:
    """Checks the contenders, then times them in turns."""
    differences = check(comparison)
    contenders = comparison.contenders
    peaks = {name: peak_memory(call, device) for name, call in contenders.items()}
    calls = {
        name: max(1, math.ceil(SECONDS_PER_TURN / seconds(call, 1, device)))
        for name, call in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    progress = Progress(turns * len(contenders), comparison.name)
    for _ in range(turns):
        for name, call in contenders.items():
            times[name].append(1000 * seconds(call, calls[name], device))
            progress.step()
    base = statistics.median(next(iter(times.values())))
    return [
        Row(
            comparison.name,
            name,
            median := statistics.median(values),
            *quartiles(values),
            base / median,
            peaks[name],
            differences[name],
            turns,
            calls[name],
        )
        for name, values in times.items()
    ]


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---- multi-scale deformable attention ----


def compare_ms_deform_attn(args: argparse.Namespace, device: torch.device) -> Iterator[Comparison]:
    """Forward and backward at the shapes of training: four maps of images with sides 3 : 4, 8 heads of 32 channels, 4
    points.
    """
    shapes = feature_map_shapes(args.image_size)
    for dtype in args.dtypes:
        for part in ("encoder", "decoder"):
            inputs = attention_inputs(part, shapes, args.batch_size, getattr(torch, dtype), device)
            yield compare_attention(f"{part}, {dtype}", shapes, inputs)


def feature_map_shapes(height: int) -> list[tuple[int, int]]:
    """(height, width) of the four maps of an image of that height, which is as wide as COCO's usual 800 x 1066."""
    return [
        (math.ceil(height / stride), math.ceil(round(height * 1066 / 800) / stride))
        for stride in (8, 16, 32, 64)
    ]


def attention_inputs(
    part: str, shapes: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, locations, weights, gradient of the output). Encoder: each pixel is a query; decoder: 300 queries
    anywhere.

    Points lie as in training's first steps: 1 to 4 pixels away in a direction of each head, here with half a pixel of
    noise. Locations and weights are in float32, as autocast leaves them.
    """
    heads, channels, points = 8, 32, 4
    generator = torch.Generator().manual_seed(0)
    if part == "encoder":
        rows_columns = [
            torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
            for h, w in shapes
        ]
        reference = torch.cat(
            [torch.stack((x, y), -1).flatten(0, 1) for y, x in rows_columns]
        ).expand(batch, -1, -1)
    else:
        reference = torch.rand(batch, 300, 2, generator=generator)
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    offsets = direction[:, None, None] * torch.arange(1, points + 1)[:, None]  # [H, 1, P, 2] pixels
    size = batch, reference.shape[1], heads, len(shapes), points
    offsets = offsets + 0.5 * torch.randn(*size, 2, generator=generator)
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]
    pixels = reference[:, :, None, None, None] * sizes - 0.5 + offsets
    # On the edge between two cells the derivative depends on rounding, which no two implementations share.
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
    for peer, load in PUBLIC_IMPLEMENTATIONS.items():
        try:
            contender = forward_backward(
                load(shapes, value.device), (value, locations, weights), grad_output
            )
            contender()
            contenders[peer] = contender
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the others are still worth a table
            skipped[peer] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    return Comparison(name, contenders, 2e-2 if value.dtype != torch.float32 else 1e-3, skipped)


def forward_backward(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> tuple[Tensor, ...]:
        output = call(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return run


def level_sizes_and_starts(
    shapes: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(sizes [L, 2], number of the first pixel [L]) of the maps, as public implementations take them."""
    sizes = torch.tensor(shapes, device=device)
    areas = sizes.prod(1)
    return sizes, areas.cumsum(0) - areas


def transformers_attention(
    shapes: list[tuple[int, int]], device: torch.device
) -> Callable[..., Tensor]:
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    sizes, starts = level_sizes_and_starts(shapes, device)
    module = MultiScaleDeformableAttention()
    return lambda v, p, w: module(v.float(), sizes, shapes, starts, p, w, 64).to(v.dtype)


def mmcv_attention(shapes: list[tuple[int, int]], device: torch.device) -> Callable[..., Tensor]:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    sizes, starts = level_sizes_and_starts(shapes, device)
    return lambda v, p, w: MultiScaleDeformableAttnFunction.apply(
        v.float(), sizes, starts, p, w, 64
    ).to(v.dtype)


def extension_attention(
    shapes: list[tuple[int, int]], device: torch.device
) -> Callable[..., Tensor]:
    """The compiled extension that comes with the published code."""
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


# Public implementations compute in float32, also under autocast. One that can't be imported or run is left out, with
# the reason.
PUBLIC_IMPLEMENTATIONS = {
    "transformers": transformers_attention,
    "mmcv": mmcv_attention,
    "published extension": extension_attention,
}


SUBJECTS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Comparison]]] = {
    "ms_deform_attn": compare_ms_deform_attn,
}


# ---- the result ----


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on."""
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
    """The result as markdown."""
    head = [
        "work",
        "implementation",
        "median ms (quartiles)",
        "speed, first = 1",
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
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=800,
        help="short side of the images in pixels; the long one is 4/3 of it",
    )
    parser.add_argument("--batch_size", type=int, default=2, help="images")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
    )
    parser.add_argument("--turns", type=int, default=20, help="how often each contender is timed")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmark"), help="folder of the results"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results there")
    args = parser.parse_args(argv)
    for name in ("image_size", "batch_size", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    targets = [args.output / f"{args.subject}.{suffix}" for suffix in ("md", "json")]
    earlier = next((path for path in targets if path.exists()), None)
    if earlier and not args.overwrite:
        raise UserError(
            f"--output {args.output}: {earlier.name} is there already; give another folder or --overwrite"
        )
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no GPU is visible to PyTorch; give --device cpu")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows, skipped = [], {}
    for comparison in SUBJECTS[args.subject](args, device):
        rows += measure(comparison, args.turns, device)
        skipped |= comparison.skipped
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("subject", "output", "overwrite")
    }
    environment_info = environment(device)
    text = table(args.subject, rows, skipped, settings, environment_info)
    log.info("%s", text)
    write_text(targets[0], text)
    numbers = {
        "environment": environment_info,
        "settings": settings,
        "rows": [vars(row) for row in rows],
        "not_measured": skipped,
    }
    write_text(targets[1], json.dumps(numbers, indent=1))
    log.info("written: %s", args.output)


if __name__ == "__main__":
    run_script(main, parse)
