"""Does pre-training help? The same fine-tuning after each pretext and after none, over seeds and label fractions.

    python tools/transfer_study.py prepare --dataset_file voc --voc_path data/pascal/VOCdevkit --output_dir data/study
    python tools/transfer_study.py run --data data/study --preset cpu --output_dir outputs/study
    python tools/transfer_study.py report outputs/study --output outputs/transfer.md

`run` may be stopped at any moment; the same command continues. See docs/transfer_study.md.
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path

# Before PyTorch is imported: the tool itself computes nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from tools.study.presets import ABLATIONS, NONE, PRESETS
from util.errors import UserError
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags, usable_cores
from util.settings.kinds import at_least_zero, fraction, positive
from util.settings.registry import DETECTORS, PRETEXTS

EXTRAS = ("pandas", "psutil")


def parse(argv: list[str]) -> Namespace:
    """`--help` shows the flags of all three commands."""
    parser = argparse.ArgumentParser(
        "tools/transfer_study.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="prepare|run|report", parser_class=Parser
    )
    parts = [_add_prepare(commands), _add_run(commands), _add_report(commands)]
    parser.epilog = "\n".join(part.format_help() for part in parts)
    return parser.parse_args(argv)


def label_fraction(text: str) -> float:
    """A number above 0, at most 1."""
    value = fraction(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def val_fraction(text: str) -> float:
    """0, or a number below 1."""
    value = 0.0 if float(text) == 0 else label_fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 leaves no training image")
    return value


def _add_prepare(commands) -> argparse.ArgumentParser:
    from tools.study.prepare import DATA_FLAGS

    parser = commands.add_parser("prepare", help="small copies of images, boxes, fixed splits")
    flag = parser.add_argument
    flag(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="the study's data; later --data",
    )
    flag(
        "--unlabelled",
        nargs="*",
        default=[],
        metavar="DIR",
        help="images to pre-train on, beside the training images",
    )
    flag(
        "--no_labelled_images", action="store_true", help="do not pre-train on the training images"
    )
    flag(
        "--image_size",
        type=positive(),
        default=160,
        metavar="PIXELS",
        help="short side of all images (160)",
    )
    flag("--quality", type=positive(), default=82, help="of the JPEG files (82)")
    flag(
        "--val_share",
        type=val_fraction,
        default=0.15,
        help="fraction of the training images kept for val (0.15)",
    )
    flag(
        "--max_unlabelled",
        type=positive(),
        metavar="N",
        help="images of --unlabelled, drawn at random (all)",
    )
    labels = {"type": label_fraction, "nargs": "+", "default": [1.0, 0.1], "metavar": "FRACTION"}
    flag("--fractions", **labels, help="of the labels (1 0.1)")
    flag(
        "--split_seed",
        type=int,
        default=42,
        help="random seed of val, fractions and unlabelled images (42)",
    )
    flag(
        "--min_objects",
        type=at_least_zero(),
        default=0,
        metavar="N",
        help="drop classes with fewer objects (0)",
    )
    add_flags(parser, FINETUNE, DATA_FLAGS)
    return parser


def _add_run(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("run", help="pre-training, fine-tuning, evaluation")
    flag = parser.add_argument
    flag("--data", type=Path, required=True, metavar="DIR", help="of `prepare`")
    flag(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="the study, with a folder for each run",
    )
    flag(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="model, steps and learning rates (cpu)",
    )
    flag(
        "--detectors",
        nargs="+",
        choices=tuple(DETECTORS),
        default=["conditional_detr"],
        help="(conditional_detr)",
    )
    flag(
        "--pretexts", nargs="+", choices=(NONE, *PRETEXTS), default=[NONE, *PRETEXTS], help="(all)"
    )
    flag("--ablations", nargs="+", choices=tuple(ABLATIONS), default=[], help="more rows (none)")
    flag(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="more rows that start from these checkpoints",
    )
    labels = {"type": label_fraction, "nargs": "+", "default": [1.0, 0.1], "metavar": "FRACTION"}
    flag("--fractions", **labels, help="of the labels (1 0.1)")
    flag(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="SEED",
        help="of fine-tuning (1 2 3)",
    )
    text = "of pre-training; the n-th fine-tuning seed starts from the n-th, in turn (1)"
    flag("--pretrain_seeds", type=int, nargs="+", default=[1], metavar="SEED", help=text)
    flag("--lr", type=positive(float), help="learning rate of fine-tuning (the preset's)")
    flag(
        "--evaluate_on",
        choices=("test", "val"),
        default="test",
        help="val: to choose settings (test)",
    )
    flag("--backbone", help="replaces the preset's")
    flag("--backbone_weights", metavar="swav|imagenet|none|PATH|URL", help="replaces the preset's")
    flag(
        "--edge_model",
        metavar="FILE",
        help="for EdgeBoxes, see docs/proposals.md; without it edges are gradients",
    )
    flag(
        "--jobs",
        type=positive(),
        default=1,
        metavar="N",
        help="runs at once; each has cores / N threads (1)",
    )
    flag(
        "--num_workers",
        type=at_least_zero(),
        help="dataloader workers of a run (by cores and --jobs)",
    )
    flag("--device", help="cuda or cpu (cuda if available)")
    flag(
        "--time_limit",
        type=positive(float),
        metavar="MINUTES",
        help="then stop with exit status 143",
    )
    flag(
        "--keep_checkpoints",
        action="store_true",
        help="also those of finished runs that nothing needs any more",
    )
    flag(
        "--list", action="store_true", help="show all runs with their states and commands, and exit"
    )
    parser.set_defaults(cores=usable_cores())
    return parser


def _add_report(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("report", help="tables, curves, CSV")
    parser.add_argument("study", type=Path, metavar="STUDY", help="the --output_dir of `run`")
    text = "with .csv and curves beside it (STUDY/transfer.md)"
    parser.add_argument("--output", type=Path, metavar="FILE.md", help=text)
    return parser


def main(args: Namespace) -> None:
    try:
        from tools.study.prepare import prepare
        from tools.study.report import write_report
        from tools.study.runner import run_study
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise UserError(
            f"a study needs {error.name}: pip install {error.name} (in requirements-extras.txt)"
        ) from error
    if args.command == "prepare":
        prepare(args)
    elif args.command == "run":
        run_study(args)
    else:
        write_report(args.study, args.output or args.study / "transfer.md")


if __name__ == "__main__":
    run_script(main, parse)
