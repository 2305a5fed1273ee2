"""A measurement of one GPU in parts, with a time limit: what a step costs there, where, and what single changes bring.

Each part adds what it finds to the results as soon as it is found. A part that fails says so, and the next one runs.
**It has run on a CPU only (`--tiny`), not on a GPU yet.**
"""

import argparse
import collections
import json
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.benchmarks import results, roof, step, work
from tools.benchmarks.peers import first_line
from util.errors import UserError
from util.files import write_text
from util.logger import log

FACTS = "gpu.json"
OWN_FOLDERS = ("/models/", "/datasets/", "/util/", "/engine.py", "/trainer.py")
PRETRAINING = [
    "random_query_patch/detr",
    "region_prior/deformable_detr",
    "siamese/detr",
]
FINETUNING = ["detr", "conditional_detr", "deformable_detr"]


class Session:
    """The facts of a measurement, where they are saved, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.device = torch.device(args.device)
        self.facts: dict[str, list[dict[str, Any]]] = {}

    def left(self) -> float:
        return self.args.budget - (time.monotonic() - self.began)

    def add(self, key: str, **values: Any) -> None:
        self.facts.setdefault(key, []).append(values)
        write_text(self.args.output / FACTS, json.dumps(self.facts, indent=1) + "\n")
        log.info("%s: %s", key, ", ".join(f"{name} {value}" for name, value in values.items()))

    def measure(self, *words: str) -> None:
        """Run another subject on this device and add its run to the results."""
        from tools.benchmarks import command

        run = command.run_words([*words, "--device", self.args.device, "--turns", self.turns()])
        results.save_run(self.args.output / results.FILE, run)
        log.info("%s", results.run_text(run))

    def turns(self) -> str:
        return "1" if self.args.tiny else "10"

    def size(self, height: int, width: int) -> list[int]:
        return [64, 96] if self.args.tiny else [height, width]

    def batch(self, count: int) -> int:
        return 2 if self.args.tiny else count

    def model_words(self) -> list[str]:
        """Return flags of a model that a CPU can run, with `--tiny`."""
        if not self.args.tiny:
            return []
        return [
            "--backbone",
            "resnet18",
            "--hidden_dim",
            "32",
            "--enc_layers",
            "1",
            "--dec_layers",
            "1",
            "--num_queries",
            "12",
        ]


# ---- parts ----


def environment(session: Session) -> None:
    """Versions, and the rates of matrix products and copies."""
    session.add("environment", **results.environment(session.device))
    for dtype in (torch.float32, torch.bfloat16):
        rate = roof.matmul_rate(session.device, dtype)
        session.add("rates", dtype=str(dtype), matmul_tflops=round(rate / 1e12, 3))
    session.add("rates", copy_tb_per_s=round(roof.copy_rate(session.device) / 1e12, 4))


def resume(session: Session) -> None:
    """Whether a fused step takes contiguous moments of a published optimizer beside channels-last weights."""
    layer = nn.Conv2d(16, 32, 3).to(session.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(2, 16, 9, 9, device=session.device)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    optimizer.load_state_dict(state)
    try:
        optimizer.step()
        session.add("resume", moments="contiguous", result="steps")
    except RuntimeError as error:
        session.add("resume", moments="contiguous", result=first_line(error))


def waits(session: Session) -> None:
    """Where the host waits for the device in a training step, by line."""
    if session.device.type != "cuda":
        session.add("waits", skipped="only a GPU has them")
        return
    for model in (*FINETUNING, *PRETRAINING):
        training = _step(session, model, 4, 480, 640)
        training.step()
        torch.cuda.synchronize()
        lines = _waits_of(training.step)
        session.add("waits", model=model, count=sum(lines.values()), lines=dict(lines))


def _waits_of(call: Callable[[], Any]) -> collections.Counter[str]:
    lines: collections.Counter[str] = collections.Counter()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            own = [
                frame
                for frame in traceback.extract_stack()
                if any(folder in frame.filename for folder in OWN_FOLDERS)
            ]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "backward"
            lines[place] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return lines


def _step(session: Session, model: str, batch: int, height: int, width: int) -> step.Step:
    case = {
        "flags": {
            **work.model_flags(model),
            **work.parse_flags(session.model_words(), work.script_of(work.model_flags(model))),
        },
        "device": session.args.device,
        "batch_size": session.batch(batch),
        "size": session.size(height, width),
        "padded": True,
    }
    folder = session.args.output / "files"
    folder.mkdir(parents=True, exist_ok=True)
    training = step.Step(work.save_case(case, folder, work.calibrated_weights(case)))
    training.train()
    return training


def steps(session: Session) -> None:
    """Training steps in bfloat16 against transformers, and pre-training steps."""
    for models, batch, height, width in (
        (FINETUNING[:1], 16, 800, 1066),
        (PRETRAINING[:1], 128, 480, 600),
        (FINETUNING[1:], 8, 800, 1066),
        (PRETRAINING[1:], 16, 480, 600),
    ):
        for model in models:
            if session.left() < 0.3 * session.args.budget:
                session.add("steps", skipped=model, reason="no time left")
                continue
            size = map(str, session.size(height, width))
            session.measure(
                *("step", "--models", model, "--batch_size", str(session.batch(batch))),
                *("--size", *size, "--padded", "--amp", "bf16", "--parts", *session.model_words()),
            )


def shapes(session: Session) -> None:
    """A new padded size in each step, against one that was seen before: plans of convolutions and the allocator."""
    training = _step(session, "detr", 8, 800, 1066)
    height, width = training.samples.tensors.shape[-2:]
    full = training.samples

    def at(fraction: int) -> float:
        h, w = height - 8 * fraction, width - 8 * fraction
        training.samples = type(full)(
            full.tensors[..., :h, :w].contiguous(memory_format=torch.channels_last),
            full.mask[..., :h, :w].contiguous(),
            full.padded,
        )
        start = time.perf_counter()
        training.step()
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    at(0)
    sizes = range(1, 3 if session.args.tiny else 17)
    first, second = [at(i) for i in sizes], [at(i) for i in sizes]
    session.add(
        "shapes",
        new_ms=round(sorted(first)[len(first) // 2], 2),
        seen_ms=round(sorted(second)[len(second) // 2], 2),
    )


def kernels(session: Session) -> None:
    """Block sizes and warps of the backward kernel of deformable attention, at sizes of training and pre-training."""
    for size, batch in ((800, 8), (480, 24)):
        pixels = 64 if session.args.tiny else size
        session.measure(
            *("kernels", "--image_size", str(pixels), "--batch_size", str(session.batch(batch))),
            *("--dtypes", "bfloat16", "--sweep", "backward"),
        )


def loader(session: Session) -> None:
    """Samples per second of one core."""
    from tools.benchmarks import command

    models = ["--models", "detection"] if session.args.tiny else []
    words = ["loader", *models, "--device", "cpu", "--turns", session.turns()]
    run = command.run_words(words)
    results.save_run(session.args.output / results.FILE, run)
    log.info("%s", results.run_text(run))


PARTS: dict[str, Callable[[Session], None]] = {
    "environment": environment,
    "resume": resume,
    "waits": waits,
    "steps": steps,
    "shapes": shapes,
    "kernels": kernels,
    "loader": loader,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts, in this order"
    )
    parser.add_argument(
        "--budget", type=float, default=480, metavar="SECONDS", help="no part begins after this"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="try the command itself, on any device")
    results.output_argument(
        parser,
        "outputs/gpu",
        f"folder for {results.FILE} and {FACTS}",
    )


def main(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {args.device}: no GPU is visible to PyTorch; try the command with --device cpu --tiny"
        )
    session = Session(args)
    for name in args.parts:
        if session.left() <= 0:
            session.add("stopped", before=name)
            break
        try:
            PARTS[name](session)
        except Exception as error:  # noqa: BLE001 - the other parts are still measured
            session.add("failed", part=name, error=first_line(error))
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    session.add("end", seconds=round(time.monotonic() - session.began, 1))
