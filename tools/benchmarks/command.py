"""The command line of `tools/benchmark.py`: measure one subject, and add the run to the results."""

import argparse
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tools.benchmarks import (
    evaluation,
    gpu,
    inference,
    kernels,
    loader,
    matching,
    report,
    results,
    step,
    work,
)
from tools.benchmarks.measure import Comparison, measure
from tools.benchmarks.peers import first_line
from tools.benchmarks.worker import Checkout, commit
from util.errors import UserError
from util.logger import log
from util.settings.registry import PRETEXTS

ROOT = Path(__file__).resolve().parent.parent.parent
# A subject's module has `add_arguments(parser)` and `comparisons(args, bench)`.
SUBJECTS: dict[str, ModuleType] = {
    "step": step,
    "inference": inference,
    "loader": loader,
    "evaluation": evaluation,
    "matching": matching,
    "kernels": kernels,
}
TAKES_FLAGS = ("step", "inference", "loader")  # also accept flags of the training scripts


class Bench:
    """What the subjects share: a folder for files, and the process of the other checkout.

    Attributes:
        scratch: folder that is deleted at the end.
        checkout: of `--against`, or None.
    """

    def __init__(self, scratch: Path, checkout: Checkout | None) -> None:
        self.scratch, self.checkout = scratch, checkout

    def add_variants(
        self,
        comparison: Comparison,
        subject: str,
        case: dict[str, Any],
        args: argparse.Namespace,
        tolerance: float,
    ) -> None:
        """Add ours with the flags of each `--variant`, then the code of `--against` with the flags of ours."""
        build: Callable[[dict[str, Any]], Any] = SUBJECTS[subject].build
        script = work.script_of(case["flags"])
        for variant in args.variant:
            name = f"ours {variant}"
            flags = {**case["flags"], **work.parse_flags(variant, script)}
            try:
                comparison.contenders[name] = build({**case, "flags": flags})
            except UserError as error:
                comparison.skipped[name] = str(error)
            comparison.tolerances[name] = max(tolerance, comparison.tolerance)
        if self.checkout is not None:
            name = f"commit {self.checkout.name}"
            try:
                self.checkout.drop()
                comparison.contenders[name] = self.checkout.build(name, subject, case)
            except RuntimeError as error:
                comparison.skipped[name] = first_line(error)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/benchmark.py",
        description="Measure speed: ours, ours with single flags, another checkout, and other packages, in turns.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in SUBJECTS.items():
        aliases = ["ms_deform_attn"] if name == "kernels" else []
        sub = subparsers.add_parser(
            name,
            aliases=aliases,
            help=_headline(module),
            description=_headline(module),
            epilog="All flags of the training scripts that change model or training are accepted too."
            if name in TAKES_FLAGS
            else None,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        _common_arguments(sub)
        sub.set_defaults(subject=name)
    for name, module in {"gpu": gpu, "report": report}.items():
        sub = subparsers.add_parser(
            name,
            help=_headline(module),
            description=_headline(module),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(main=module.main, subject=name)

    usages = [sub.format_usage().removeprefix("usage: ") for sub in subparsers.choices.values()]
    parser.epilog = "flags of each subject (`SUBJECT --help` explains them):\n\n" + "\n".join(
        dict.fromkeys(usages)  # an alias has the same parser
    )
    options, rest = parser.parse_known_args(_join_variants(argv))
    if rest and options.subject not in TAKES_FLAGS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.subject in TAKES_FLAGS:
        names = " ".join(options.models)
        pretrains = "/" in names or any(word in names for word in ("pretraining", *PRETEXTS))
        script = work.script_of({"pretext": pretrains})
        options.flags = work.parse_flags(rest, script)
    options.command = shlex.join(["python", "tools/benchmark.py", *_without_paths(argv)])
    for name in ("turns", "batch_size", "image_size", "images"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    return options


def _join_variants(argv: list[str]) -> list[str]:
    """Return `--variant "--compile"` as one word: argparse would take a value without a space for a flag."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--variant":
            joined[-1] = f"--variant={word}"
        else:
            joined.append(word)
    return joined


def _headline(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _without_paths(argv: list[str]) -> list[str]:
    """Return the command as it is recorded: without where its files are, and another checkout by its commit."""
    words, kept = iter(argv), []
    for word in words:
        if word == "--output":
            next(words, None)
        elif word == "--against":
            folder = next(words, "")
            kept += [word, commit(Path(folder)) or Path(folder).name]
        else:
            kept.append(word)
    return kept


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:N or cpu; a GPU if there is one",
    )
    parser.add_argument(
        "--turns", type=int, default=5, metavar="N", help="how often each contender is timed"
    )
    results.output_argument(
        parser,
        "outputs/benchmark",
        f"folder of {results.FILE}, to which the run is added; it replaces one of the same command",
    )


def main(args: argparse.Namespace) -> None:
    if args.subject in ("gpu", "report"):
        args.main(args)
        return
    run = run_subject(args)
    path = args.output / results.FILE
    results.save_run(path, run)
    log.info("%s\nadded to %s", results.run_text(run), path)


def run_subject(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one subject and return the run, see `results.make_run`.

    Raises:
        UserError: contenders disagree, or the device can't be used.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no GPU is visible to PyTorch; use --device cpu")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)

    info = results.environment(torch.device(args.device))
    rows, skipped, facts = [], {}, {}
    against = getattr(args, "against", None)
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Checkout(against, Path(scratch)) if against else None
        try:
            for comparison in SUBJECTS[args.subject].comparisons(
                args, Bench(Path(scratch), checkout)
            ):
                rows += measure(comparison, args.turns)
                facts[comparison.name] = comparison.finish()
                for name, reason in comparison.skipped.items():
                    skipped[f"{name}, {comparison.name}"] = reason
        finally:
            if checkout is not None:
                checkout.close()
    return results.make_run(args.command, args.subject, info, rows, skipped, facts, commit(ROOT))


def run_words(words: list[str]) -> dict[str, Any]:
    """Measure the subject of a command line without `tools/benchmark.py`."""
    return run_subject(parse(words))
