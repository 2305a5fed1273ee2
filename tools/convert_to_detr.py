"""Converts a pre-training checkpoint of Siamese DETR's code base, with the flags of its own tool of this name.

    python tools/convert_to_detr.py --ckpt OSS_CKPT --export SAVE_DIR [--deform]

Writes SAVE_DIR/detr_NAME (or the file SAVE_DIR, where that ends in .pth), which `finetune_main.py --pretrain` and that
code base's fine-tuning code read. Kept: backbone, transformer, input projections, queries, box head, `patch2query`.
Left out, as fine-tuning does not use them: class head, `feature_align`, `enc_head`. In Deformable DETR the two tables
of queries become the one that every other code base has. `--pretrain` reads the original file too;
`tools/convert_checkpoint.py` converts without leaving anything out.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory
from models import build_model
from util.checkpoints.architecture import infer_detector
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.conversion import OURS, convert, infer_codebase
from util.checkpoints.parameter_check import check_parameters
from util.errors import UserError
from util.logger import log
from util.runs.session import run_script

LEFT_OUT = ("class_embed.", "feature_align.", "enc_head.")


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.convert_to_detr", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="OSS_CKPT",
        help="checkpoint of the pre-training: path or address",
    )
    parser.add_argument(
        "--export",
        "--out",
        dest="export",
        type=Path,
        default=Path("."),
        metavar="SAVE_DIR",
        help="folder of the new file detr_NAME, or its name with .pth (default: here)",
    )
    parser.add_argument(
        "--deform", action="store_true", help="it is Deformable DETR; the file says so by itself"
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    checkpoint = load_checkpoint(args.ckpt)
    check_parameters(checkpoint, build_model)
    kind, origin = infer_detector(checkpoint.model), infer_codebase(checkpoint)
    if origin != "siamese":
        raise UserError(
            f"--ckpt {args.ckpt} is not of Siamese DETR's code base; tools/convert_checkpoint.py tells what it is"
        )
    if args.deform and kind != "deformable_detr":
        raise UserError(
            f"--deform is for Deformable DETR, and {args.ckpt} holds {kind}: leave it out"
        )
    out = (
        args.export
        if args.export.suffix == ".pth"
        else args.export / f"detr_{Path(args.ckpt).name}"
    )
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: give another --export")
    content, _ = convert(checkpoint, OURS)
    content["model"] = {
        key: value for key, value in content["model"].items() if not key.startswith(LEFT_OUT)
    }
    save_checkpoint(content, out)
    log.info(
        "wrote %s: %s, %d tensors\nfine-tune it by python finetune_main.py --coco_path DIR --pretrain %s",
        out,
        kind,
        len(content["model"]),
        out,
    )


if __name__ == "__main__":
    run_script(main, parse)
