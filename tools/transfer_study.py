"""Does pre-training help? The same fine-tuning after each pretext and after none, over seeds and label fractions.

    python tools/transfer_study.py prepare --voc_path data/pascal/VOCdevkit --dataset_file voc --unlabelled
    data/ilsvrc/train \
        --output_dir data/study
    python tools/transfer_study.py run --data data/study --preset cpu --output_dir outputs/study
    python tools/transfer_study.py report outputs/study --output docs/results/transfer.md

`run` may be stopped at any moment; the same command goes on. See docs/transfer_study.md.
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path

# Before PyTorch is imported: the tool itself computes nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from tools.study.presets import ABLATIONS, NONE, PRESETS
from util.runs.session import run_script
from util.settings.arguments import Parser, make_parser, usable_cores
from util.settings.flags import FINETUNE, at_least_zero, positive, share
from util.settings.registry import DETECTORS, PRETEXTS


def parse(argv: list[str]) -> Namespace:
    """`--help` shows the flags of all three commands."""
    parser = argparse.ArgumentParser(
        "tools/transfer_study.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|run|report", parser_class=Parser)
    parts = [_add_prepare(commands), _add_run(commands), _add_report(commands)]
    parser.epilog = "\n".join(part.format_help() for part in parts)
    return parser.parse_args(argv)


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    value = share(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must lie above 0 and not above 1, got {text}")
    return value


def share_or_none(text: str) -> float:
    """0, or a number below 1."""
    value = 0.0 if float(text) == 0 else fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 leaves no training image")
    return value


def _add_prepare(commands) -> argparse.ArgumentParser:
    from tools.study.prepare import DATA_FLAGS

    parser = commands.add_parser("prepare", help="small copies of images, boxes, fixed splits")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="the study's data; later --data")
    parser.add_argument(
        "--unlabelled", nargs="*", default=[], metavar="DIR", help="images to pre-train on, beside the training images"
    )
    parser.add_argument("--no_labelled_images", action="store_true", help="do not pre-train on the training images")
    parser.add_argument(
        "--image_size", type=positive(), default=160, metavar="PIXELS", help="short side, here and in training (160)"
    )
    parser.add_argument("--quality", type=positive(), default=82, help="of the JPEG files (82)")
    parser.add_argument(
        "--val_share",
        type=share_or_none,
        default=0.15,
        help="of the training images, to choose settings on; 0: none (0.15)",
    )
    parser.add_argument(
        "--max_unlabelled", type=positive(), metavar="N", help="so many of --unlabelled, drawn by --split_seed (all)"
    )
    parser.add_argument(
        "--fractions", type=fraction, nargs="+", default=[1.0, 0.1], metavar="SHARE", help="of the labels (1 0.1)"
    )
    parser.add_argument("--split_seed", type=int, default=42, help="draws val and fractions (42)")
    parser.add_argument(
        "--min_objects",
        type=at_least_zero(),
        default=0,
        metavar="N",
        help="leave out classes with fewer objects in training or test (0)",
    )
    for action in make_parser(FINETUNE)._actions:
        if action.dest in DATA_FLAGS:
            parser._add_action(action)
    return parser


def _add_run(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("run", help="pre-training, fine-tuning, evaluation")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of `prepare`")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="the study: a folder a run")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="sizes, steps, rates (cpu)")
    parser.add_argument(
        "--detectors", nargs="+", choices=tuple(DETECTORS), default=["conditional_detr"], help="(conditional_detr)"
    )
    parser.add_argument("--pretexts", nargs="+", choices=(NONE, *PRETEXTS), default=[NONE, *PRETEXTS], help="(all)")
    parser.add_argument("--ablations", nargs="+", choices=tuple(ABLATIONS), default=[], help="more rows (none)")
    parser.add_argument(
        "--pretrained", nargs="+", default=[], metavar="NAME=FILE", help="more rows that start from these files (none)"
    )
    parser.add_argument(
        "--fractions", type=fraction, nargs="+", default=[1.0, 0.1], metavar="SHARE", help="of the labels (1 0.1)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="of fine-tuning (1 2 3)"
    )
    parser.add_argument(
        "--pretrain_seeds",
        type=int,
        nargs="+",
        default=[1],
        metavar="SEED",
        help="of pre-training; the n-th fine-tuning seed starts from the n-th, in turn (1)",
    )
    parser.add_argument("--backbone", help="in place of the preset's")
    parser.add_argument("--backbone_weights", metavar="swav|imagenet|none|PATH|URL", help="in place of the preset's")
    parser.add_argument(
        "--edge_model",
        metavar="FILE",
        help="for EdgeBoxes, see docs/proposals.md; without one edges are plain gradients",
    )
    parser.add_argument(
        "--choose",
        choices=("lr",),
        help="try the preset's rates on val first; the best over the rows of this call is kept",
    )
    parser.add_argument(
        "--jobs", type=positive(), default=1, metavar="N", help="runs at once; each has cores / N threads (1)"
    )
    parser.add_argument("--num_workers", type=at_least_zero(), help="loader processes of a run (by cores and --jobs)")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    parser.add_argument(
        "--time_limit",
        type=positive(float),
        metavar="MINUTES",
        help="then stop with status 143; the same command goes on",
    )
    parser.add_argument(
        "--keep_checkpoints", action="store_true", help="of finished runs, also those that nothing here needs any more"
    )
    parser.add_argument("--list", action="store_true", help="show the plan with states and commands, and stop")
    parser.set_defaults(cores=usable_cores())
    return parser


def _add_report(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("report", help="tables, curves, a page of predictions")
    parser.add_argument("study", type=Path, metavar="STUDY", help="the --output_dir of `run`")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.md", help="tables, with curves in a folder beside it (STUDY/transfer.md)"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="where predictions on test images are drawn (STUDY)"
    )
    return parser


def main(args: Namespace) -> None:
    if args.command == "prepare":
        from tools.study.prepare import prepare

        prepare(args)
    elif args.command == "run":
        from tools.study.runner import run_study

        run_study(args)
    else:
        from tools.study.report import write_report

        write_report(args.study, args.output or args.study / "transfer.md", args.pictures or args.study)


if __name__ == "__main__":
    run_script(main, parse)
