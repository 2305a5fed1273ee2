"""A training step: forward, matching, losses, backward, gradient clipping and optimizer, on one batch.

Loading the batch, its copy to the device and its normalization are not in it.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine
import trainer
from datasets import build_loader
from datasets.collate import to_device
from tools.benchmarks import roof, work
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import BF16_TOLERANCE, Case

TOLERANCE = 1e-3
PARTS = ("forward", "matching and losses", "backward", "clipping", "optimizer")


class Step:
    """A training step of this project.

    Attributes:
        run: model, criterion and optimizer, as `trainer.build_run` makes them.
        samples, targets: the batch, on the device.
    """

    def __init__(self, case: Case) -> None:
        self.device = torch.device(case["device"])
        model, criterion, _, settings = work.build_calibrated(case)
        loader = build_loader(work.load_samples(case), settings, train=True)
        self.run = trainer.build_run(settings, model, criterion, loader, self.device, folder=None)
        self.run.loader.batch_sampler.set_epoch(0)
        samples, packed = next(iter(self.run.loader))
        self.samples, self.targets = to_device(
            samples, packed, self.device, **self.run.normalization
        )

    def step(self) -> dict[str, float]:
        values, _ = engine.train_step(self.run, self.samples, self.targets, False)
        return values

    def train(self) -> None:
        self.run.model.train()
        self.run.criterion.train()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return class logits, boxes and total loss of the batch, without dropout."""
        self.run.model.eval()
        self.run.criterion.eval()
        outputs, _, total = engine.forward_losses(
            self.run.model, self.run.criterion, self.samples, self.targets, self.run.amp
        )
        self.train()
        return [outputs["pred_logits"].float(), outputs["pred_boxes"].float(), total.float()]

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.run.model.parameters() if p.requires_grad)

    def parts(self, turns: int) -> dict[str, float]:
        """Return the median milliseconds of each part. The device finishes a part before the next one begins."""
        times: dict[str, list[float]] = {name: [] for name in PARTS}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            self._wait()
            start = time.perf_counter()
            result = call()
            self._wait()
            times[name].append(1000 * (time.perf_counter() - start))
            return result

        run, optimizer = self.run, self.run.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(turns):
            outputs = timed(
                PARTS[0], lambda: engine.forward(run.model, self.samples, self.targets, run.amp)
            )
            total = timed(
                PARTS[1],
                lambda found=outputs: run.criterion.total_loss(run.criterion(found, self.targets)),
            )
            optimizer.zero_grad(set_to_none=True)
            timed(PARTS[2], total.backward)
            timed(
                PARTS[3], lambda: torch.nn.utils.clip_grad_norm_(parameters, run.clip_max_norm or 1)
            )
            timed(PARTS[4], optimizer.step)
            del outputs, total
        return {name: sorted(values)[len(values) // 2] for name, values in times.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def build(case: Case) -> Local:
    """Return the contender of a case."""
    step = Step(case)
    step.train()
    return Local(step.step, step.outputs, step.device)


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    """Yield one comparison per model: ours, ours with each `--variant`, another checkout, transformers."""
    for model in work.expand_models(args.models):
        yield compare(model, args, bench)


def compare(model: str, args: argparse.Namespace, bench: Any) -> Comparison:
    from tools.benchmarks import peers

    flags = {**work.model_flags(model), **args.flags}
    case: Case = {
        "flags": flags,
        "device": args.device,
        "batch_size": args.batch_size,
        "size": args.size,
        "padded": args.padded,
    }
    case = work.save_case(case, bench.scratch, work.calibrated_weights(case))
    step = Step(case)
    step.train()
    height, width = args.size
    is_bf16 = flags.get("amp") == "bf16"
    comparison = Comparison(
        f"{model}, {args.batch_size} x {height} x {width}{', bfloat16' if is_bf16 else ''}",
        {"ours": Local(step.step, step.outputs, step.device)},
        BF16_TOLERANCE if is_bf16 else TOLERANCE,
        items=args.batch_size,
    )
    bench.add_variants(comparison, "step", case, args, BF16_TOLERANCE)
    uses_bf16 = is_bf16 or any("bf16" in variant for variant in args.variant)
    if not flags.get("pretext"):
        peers.add_training_peers(comparison, case, step, args.peers, uses_bf16)

    def finish() -> dict[str, Any]:
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        return {
            "trained parameters": step.trained_parameters(),
            **({"roof": roof.of_call(step.step, step.device, dtype)} if args.roof else {}),
            **({"parts": step.parts(args.turns)} if args.parts else {}),
        }

    comparison.finish = finish
    return comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["detr"],
        metavar="NAME",
        help="DETECTOR, PRETEXT/DETECTOR, `finetuning` (all detectors) or `pretraining` (all pairs)",
    )
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="images per batch")
    parser.add_argument("--parts", action="store_true", help="also time the parts of our step")
    work_arguments(parser)


def work_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `step` and `inference` share."""
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=[480, 640],
        metavar=("HEIGHT", "WIDTH"),
        help="of the batch, in pixels",
    )
    parser.add_argument(
        "--padded", action="store_true", help="all images but the first are smaller than the batch"
    )
    variant_argument(parser)
    against_argument(parser)
    parser.add_argument(
        "--no_roof", dest="roof", action="store_false", help="do not count operations and bytes"
    )
    parser.add_argument(
        "--no_peers", dest="peers", action="store_false", help="no contenders of other packages"
    )


def against_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="one more contender: the code of another checkout, such as a git worktree of an older commit",
    )


def variant_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FLAGS",
        help='one more contender: ours with these flags of the training script, such as "--amp bf16"',
    )
