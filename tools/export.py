"""Export a trained detector: ONNX, a torch.export archive, or safetensors weights.

    python tools/export.py --checkpoint outputs/coco/checkpoint.pth --out detector.onnx
    python tools/export.py --checkpoint outputs/coco/checkpoint.pth --out detector.pt2
    python tools/export.py --checkpoint outputs/coco/checkpoint.pth --out detector.safetensors

The ending of --out is the format. ONNX files and archives have dynamic batch and image size, and before anything is
written their outputs are compared with the model's on images of other sizes than the recorded one. Class names and
settings are in the metadata of each format. See docs/export.md.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python tools/NAME.py` must work from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from predictor import Predictor
from tools.exports.check import OTHER_SHAPES, TOLERANCE, check
from tools.exports.formats import (
    ONNX_PACKAGES,
    check_packages,
    run_archive,
    run_onnx,
    to_archive,
    to_onnx,
)
from tools.exports.graph import build_graph, record
from util.checkpoints.adoption import is_pretext
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.classes import infer_classes
from util.checkpoints.hub_models import HUB_MODELS, published_url
from util.checkpoints.parameter_check import check_parameters
from util.checkpoints.safetensors_file import describe_weights, save_safetensors
from util.errors import UserError
from util.files import to_json, write_atomically
from util.logger import log
from util.runs.session import run_script
from util.settings import HelpFormatter

SAFETENSORS = ".safetensors"
# Ending -> (content of a recorded graph, function that runs the content).
GRAPH_FORMATS: dict[str, tuple[Callable[..., bytes], Callable[..., Any]]] = {
    ".onnx": (to_onnx, run_onnx),
    ".pt2": (to_archive, run_archive),
}


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools/export.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH|URL|NAME",
        help="a trained detector, ours or a published one, or the name of a published model such as detr_resnet50; for "
        "safetensors also one from pre-training",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=f"new file; its ending is the format: {', '.join([*GRAPH_FORMATS, SAFETENSORS])}",
    )
    parser.add_argument(
        "--preprocessing",
        action="store_true",
        help="take uint8 images, and normalize them inside (resizing stays outside)",
    )
    parser.add_argument(
        "--postprocessing",
        action="store_true",
        help="return scores, labels and boxes in pixels, best first, instead of logits and relative boxes",
    )
    args = parser.parse_args(argv)
    endings = [*GRAPH_FORMATS, SAFETENSORS]
    if args.out.suffix not in endings:
        parser.error(f"--out {args.out}: the ending must be one of {', '.join(endings)}")
    if args.out.suffix == SAFETENSORS and (args.preprocessing or args.postprocessing):
        parser.error("--preprocessing and --postprocessing: a safetensors file has weights only")
    return args


def export_graph(
    checkpoint: Checkpoint, out: Path, *, preprocessing: bool, postprocessing: bool
) -> None:
    """Write a detector with dynamic batch and image size, after comparing its outputs with the model's.

    Raises:
        UserError: it is from pre-training, a package is missing, or the outputs differ.
    """
    serialize, load = GRAPH_FORMATS[out.suffix]
    if out.suffix == ".onnx":
        check_packages(*ONNX_PACKAGES)
    # Recorded on the CPU, in float32 and not compiled, however it was trained.
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", amp="no", compile=False)
    graph = build_graph(predictor, preprocessing=preprocessing, postprocessing=postprocessing)
    log.info("recording the graph, which takes up to some minutes")
    content = serialize(record(graph), _metadata(checkpoint, predictor))
    difference = check(graph, load(content), OTHER_SHAPES, f"the {out.suffix} export")
    write_atomically(out, lambda file: file.write(content))
    log.info(
        "wrote %s: %.1f MB, inputs %s, outputs %s; differs from the model by at most %.1e on images of other sizes "
        "(%.0e is allowed)",
        *(out, len(content) / 1e6, ", ".join(graph.inputs((1, 3, 8, 8)))),
        *(", ".join(graph.output_names), difference, TOLERANCE),
    )


def _metadata(checkpoint: Checkpoint, predictor: Predictor) -> dict[str, str]:
    """Return class names, settings and what a caller needs to prepare an image: name -> JSON."""
    classes = predictor.classes
    resize = predictor.transforms.transforms[0]
    return {
        **describe_weights(checkpoint),
        "class_names": to_json(classes.names),
        "category_ids": to_json(classes.category_ids),
        "normalization": to_json(predictor.model.normalization),
        "resize": to_json({"short_side": resize.sizes[0], "long_side": resize.max_size}),
    }


def export_weights(checkpoint: Checkpoint, out: Path) -> None:
    """Write the weights, with class names and settings, as a file that stands for the checkpoint.

    Raises:
        UserError: the weights are those of no known detector, or safetensors is not installed.
    """
    check_parameters(checkpoint, build_model)
    if not is_pretext(checkpoint) and not checkpoint.class_names:
        checkpoint.class_names = infer_classes(checkpoint).names
    save_safetensors(checkpoint.model, out, describe_weights(checkpoint))
    log.info(
        "wrote %s: %.1f MB, %d tensors; it is read like a checkpoint, by --pretrain, --eval --resume, tools/predict.py "
        "and Predictor",
        *(out, out.stat().st_size / 1e6, len(checkpoint.model)),
    )


def main(args: Namespace) -> None:
    if args.out.exists():
        raise UserError(f"--out {args.out} exists and is not overwritten; give another name")
    source = args.checkpoint
    checkpoint = load_checkpoint(published_url(source) if source in HUB_MODELS else source)
    if args.out.suffix == SAFETENSORS:
        export_weights(checkpoint, args.out)
        return
    export_graph(
        checkpoint,
        args.out,
        preprocessing=args.preprocessing,
        postprocessing=args.postprocessing,
    )


if __name__ == "__main__":
    run_script(main, parse)
