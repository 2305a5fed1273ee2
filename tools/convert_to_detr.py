"""Convert a pre-training checkpoint of Siamese DETR's codebase, with the flags of its own tool of this name.

    python tools/convert_to_detr.py --ckpt OSS_CKPT --export SAVE_DIR [--deform]

Writes SAVE_DIR/detr_NAME, or the file SAVE_DIR if that ends in .pth. `finetune_main.py --pretrain` and that codebase's
fine-tuning code read it.

Backbone, transformer, input projections, queries, box head and `patch2query` are converted. Class head, `feature_align`
and `enc_head` are dropped, since fine-tuning does not use them. The two query tables of that codebase's Deformable DETR
become the single one of every other codebase.

`--pretrain` also reads the original file. `tools/convert_checkpoint.py` converts it without dropping anything.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

# `python tools/NAME.py` must work from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from util.checkpoints.architecture import infer_detector
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.conversion import OURS, convert, infer_codebase
from util.checkpoints.parameter_check import check_parameters
from util.errors import UserError
from util.logger import log
from util.runs.session import run_script
from util.settings import HelpFormatter

DROPPED_PREFIXES = ("class_embed.", "feature_align.", "enc_head.")


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.convert_to_detr",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="OSS_CKPT",
        help="pre-training checkpoint: path or URL",
    )
    parser.add_argument(
        "--export",
        "--out",
        dest="export",
        type=Path,
        default=Path("."),
        metavar="SAVE_DIR",
        help="output folder, for the file detr_NAME, or output file ending in .pth (default: current folder)",
    )
    parser.add_argument(
        "--deform",
        action="store_true",
        help="the checkpoint is of Deformable DETR; not needed, since the file shows it",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    checkpoint = load_checkpoint(args.ckpt)
    check_parameters(checkpoint, build_model)
    detector = infer_detector(checkpoint.model)
    if infer_codebase(checkpoint) != "siamese":
        raise UserError(
            f"--ckpt {args.ckpt} is not from Siamese DETR's codebase; tools/convert_checkpoint.py tells what it is"
        )
    if args.deform and detector != "deformable_detr":
        raise UserError(
            f"--deform is for Deformable DETR, and {args.ckpt} contains the detector {detector}; omit the flag"
        )

    out = args.export
    if out.suffix != ".pth":
        out = out / f"detr_{Path(args.ckpt).name}"
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another --export")

    content, _ = convert(checkpoint, OURS)
    model = content["model"]
    content["model"] = {
        key: value for key, value in model.items() if not key.startswith(DROPPED_PREFIXES)
    }
    save_checkpoint(content, out)
    log.info(
        "wrote %s: %s, %d tensors\nfine-tune it with python finetune_main.py --coco_path DIR --pretrain %s",
        out,
        detector,
        len(content["model"]),
        out,
    )


if __name__ == "__main__":
    run_script(main, parse)
