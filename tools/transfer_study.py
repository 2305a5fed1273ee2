"""Measures whether pre-training helps: fine-tunes after each pretext task and without, over seeds and label fractions.

    python tools/transfer_study.py prepare --dataset_file voc --voc_path data/pascal/VOCdevkit --image_size 128 \\
        --output_dir data/study
    python tools/transfer_study.py run --data data/study --preset cpu --detectors deformable_detr \\
        --output_dir outputs/study
    python tools/transfer_study.py report outputs/study --output outputs/transfer.md

`run` can be stopped at any time; the same command resumes it. See docs/transfer_study.md.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

# Makes `python tools/NAME.py` work from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.study.prepare import DATA_FLAGS, prepare
from tools.study.presets import ABLATIONS, NO_PRETRAINING, PRESETS
from util.errors import UserError
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags, usable_cores
from util.settings.registry import DETECTORS, PRETEXTS
from util.settings.value_types import fraction, non_negative, positive

OPTIONAL_PACKAGES = ("pandas", "psutil")


def parse(argv: list[str]) -> Namespace:
    """Parse the command line; `--help` shows the flags of all three commands."""
    parser = argparse.ArgumentParser(
        "tools/transfer_study.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="prepare|run|report", parser_class=Parser
    )
    subparsers = [_add_prepare(commands), _add_run(commands), _add_report(commands)]

    parser.epilog = "\n".join(subparser.format_help() for subparser in subparsers)
    return parser.parse_args(argv)


def label_fraction(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    value = fraction(text)
    # `fraction` also accepts DETReg's -1 for "all", which names no split here.
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def val_fraction(text: str) -> float:
    """Parse 0, or a number above 0 and below 1."""
    value = 0.0 if float(text) == 0 else label_fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 leaves no training image; give less than 1")
    return value


def _add_fractions(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--fractions",
        type=label_fraction,
        nargs="+",
        default=[1.0, 0.1],
        metavar="FRACTION",
        help=f"{text}, each above 0 and at most 1 (default: 1 0.1)",
    )


def _add_prepare(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("prepare", help="write resized images, boxes and fixed splits")
    _add_prepared_images(parser)
    _add_splits(parser)
    add_flags(parser, FINETUNE, DATA_FLAGS)
    return parser


def _add_prepared_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the study's data; give it to `run` as --data (required)",
    )
    add(
        "--unlabelled",
        nargs="*",
        default=[],
        metavar="DIR",
        help="folders of images to pre-train on, in addition to the training images (default: none)",
    )
    add(
        "--no_labelled_images",
        action="store_true",
        help="pre-train on --unlabelled only, without the training images (default: off)",
    )
    add(
        "--image_size",
        type=positive(),
        default=160,
        metavar="PIXELS",
        help="short side of resized images in pixels; smaller images keep their size (default: 160)",
    )
    add(
        "--quality",
        type=positive(),
        default=82,
        help="JPEG quality of resized images, up to 95 as in Pillow (default: 82)",
    )


def _add_splits(parser: argparse.ArgumentParser) -> None:
    """Add what decides which images and classes are in which split."""
    add = parser.add_argument
    add(
        "--val_share",
        type=val_fraction,
        default=0.15,
        metavar="FRACTION",
        help="fraction of the training images to split off as val, 0 for none (default: 0.15)",
    )
    add(
        "--max_unlabelled",
        type=positive(),
        metavar="N",
        help="number of images to draw at random from all --unlabelled folders (default: all)",
    )
    _add_fractions(parser, "fractions of the labels to draw subsets for")
    add(
        "--split_seed",
        type=int,
        default=42,
        metavar="SEED",
        help="random seed of val, label fractions and --max_unlabelled (default: 42)",
    )
    add(
        "--min_objects",
        type=non_negative(),
        default=0,
        metavar="N",
        help="drop classes with fewer objects than this in train or test (default: 0)",
    )
    add(
        "--one_class",
        action="store_true",
        help='give all boxes one class, "object": the study then measures finding alone (default: off)',
    )


def _add_run(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("run", help="pre-train, fine-tune and evaluate; resumes")
    _add_run_folders(parser)
    _add_run_rows(parser)
    _add_run_repeats(parser)
    _add_run_settings(parser)
    _add_run_execution(parser)
    parser.set_defaults(cores=usable_cores())
    return parser


def _add_run_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder that `prepare` wrote (required)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the study, with one folder per run in it (required)",
    )


def _add_run_rows(parser: argparse.ArgumentParser) -> None:
    """Add what decides which rows the tables of a study have."""
    add = parser.add_argument
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="cpu",
        help="model size, steps and learning rates (default: cpu)",
    )
    add(
        "--detectors",
        nargs="+",
        choices=tuple(DETECTORS),
        default=["conditional_detr"],
        metavar="DETECTOR",
        help=f"one table each: {', '.join(DETECTORS)} (default: conditional_detr)",
    )
    add(
        "--pretexts",
        nargs="+",
        choices=(NO_PRETRAINING, *PRETEXTS),
        default=[NO_PRETRAINING, *PRETEXTS],
        metavar="PRETEXT",
        help=f"pretext tasks to compare: {', '.join(PRETEXTS)}, or {NO_PRETRAINING} for no pre-training (default: all)",
    )
    add(
        "--ablations",
        nargs="+",
        choices=tuple(ABLATIONS),
        default=[],
        metavar="ROW",
        help=f"additional rows that change one thing about a pretext task: {', '.join(ABLATIONS)} (default: none)",
    )
    add(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="additional rows that start from these checkpoints (default: none)",
    )


def _add_run_repeats(parser: argparse.ArgumentParser) -> None:
    """Add what decides which runs each row has."""
    add = parser.add_argument
    _add_fractions(parser, "fractions of the labels to fine-tune on, among those of `prepare`")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="SEED",
        help="random seeds of fine-tuning, one run each (default: 1 2 3)",
    )
    add(
        "--pretrain_seeds",
        type=int,
        nargs="+",
        default=[1],
        metavar="SEED",
        help="random seeds of pre-training, one run each; the fine-tuning seeds start from them in turn (default: 1)",
    )


def _add_run_settings(parser: argparse.ArgumentParser) -> None:
    """Add settings of all runs."""
    add = parser.add_argument
    add(
        "--lr",
        type=positive(float),
        help="learning rate of fine-tuning, for all rows (default: the preset's)",
    )
    add(
        "--evaluate_on",
        choices=("test", "val"),
        default="test",
        help="split to evaluate on; val is for choosing settings (default: test)",
    )
    add("--backbone", help="backbone of all models, as in finetune_main.py (default: the preset's)")
    add(
        "--backbone_weights",
        metavar="swav|imagenet|none|PATH|URL",
        help="initial weights of the backbone (default: the preset's)",
    )
    add(
        "--edge_model",
        metavar="FILE",
        help="edge detection model for EdgeBoxes, see docs/proposals.md (default: image gradients)",
    )


def _add_run_execution(parser: argparse.ArgumentParser) -> None:
    """Add what decides how the runs are executed; none of it changes a result."""
    add = parser.add_argument
    add(
        "--jobs",
        type=positive(),
        default=1,
        metavar="N",
        help="number of runs at once; each uses 1/N of the CPU cores (default: 1)",
    )
    add(
        "--num_workers",
        type=non_negative(),
        metavar="N",
        help="dataloader workers per process (default: by CPU cores and --jobs)",
    )
    add("--device", help="cuda or cpu (default: cuda if available)")
    add(
        "--time_limit",
        type=positive(float),
        metavar="MINUTES",
        help="stop after this many minutes with exit status 143; the same command resumes (default: none)",
    )
    add(
        "--keep_checkpoints",
        action="store_true",
        help="keep checkpoints of finished runs that no other run needs (default: off)",
    )
    add(
        "--list",
        action="store_true",
        help="print all runs with their states and commands, and exit (default: off)",
    )


def _add_report(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("report", help="write tables, curves and a CSV file")
    parser.add_argument(
        "study", type=Path, metavar="STUDY", help="the --output_dir of `run` (required)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="report to write; the CSV file and the curves go next to it (default: STUDY/transfer.md)",
    )
    return parser


def main(args: Namespace) -> None:
    # pandas and psutil are optional, and `--help` has to work without them.
    try:
        from tools.study.report import write_report
        from tools.study.runner import run_study
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
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
