"""Finds objects on images without annotations, with any trained detector.

    python tools/predict.py --checkpoint outputs/own/checkpoint_best.pth --images photographs --output_dir predictions

Writes `predictions.json` (COCO's results, with file and class names), `drawn/` (each image with its boxes) and
`predictions.png`, a page of the first images. Everything that evaluation takes from the checkpoint is taken from it
here too.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from datasets.collate import normalize
from datasets.images.image_folder import ImageFile, ImageFolder, open_image
from datasets.prediction import build_prediction_loader
from engine import autocast
from models import build_model
from models.postprocess import PostProcess
from util.checkpoints.checkpoint import load_exactly
from util.checkpoints.classes import Classes, classes_of, stored_names
from util.errors import UserError
from util.files import check_apart, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.plots.boxes import draw_boxes
from util.plots.pages import found_page
from util.runs.session import prepare_checkpoint, run_script, start_session
from util.settings.arguments import Parser, make_parser
from util.settings.flags import FINETUNE

SHARED_FLAGS = (
    "device",
    "batch_size",
    "image_size",
    "max_size",
    "num_workers",
    "amp",
)  # as finetune_main.py declares them
RESULTS, PAGE, DRAWN = "predictions.json", "predictions.png", "drawn"
ON_PAGE = 12


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/predict.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH|URL", help="of a trained detector, ours or a published one"
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|FILE|LIST",
        help="folder tree, one image, or text file with a path a line",
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="where predictions are written")
    parser.add_argument("--threshold", type=_share, default=0.5, help="lowest score of an object that is kept (0.5)")
    parser.add_argument("--no_draw", action="store_true", help="no drawn images and no page")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions in --output_dir")
    for action in make_parser(FINETUNE)._actions:
        if action.dest in SHARED_FLAGS:
            parser._add_action(action)
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"scores lie between 0 and 1, got {text}")
    return value


@dataclass
class Detector:
    """model and postprocess as in evaluation; mean and std belong to the backbone."""

    model: torch.nn.Module
    postprocess: PostProcess
    classes: Classes
    device: torch.device
    amp: bool
    mean: tuple
    std: tuple


def load_detector(args: Namespace) -> tuple[Detector, Namespace]:
    """The detector of `args.checkpoint`, and the settings with which `finetune_main.py --eval` would run it.

    Raises:
        UserError: the file holds no trained detector.
    """
    settings = make_parser(FINETUNE).parse_args(["--eval", "--resume", args.checkpoint])
    for name in SHARED_FLAGS:
        setattr(settings, name, getattr(args, name))
    settings.batch_size = (
        settings.batch_size or 1
    )  # padding changes what is found, so that an image's neighbours would matter
    device = start_session(settings)
    checkpoint = prepare_checkpoint(settings)
    classes = classes_of(checkpoint)
    if not stored_names(checkpoint):
        log.info(
            "%s holds no class names: %s",
            args.checkpoint,
            "COCO's are used" if classes.names else "objects have numbers only",
        )
    settings.num_classes = classes.count
    model, _, postprocessors = build_model(settings)
    load_exactly(model, checkpoint)
    model.to(device, memory_format=torch.channels_last).eval()
    backbone = model.backbone[0]
    return Detector(
        model, postprocessors["bbox"], classes, device, settings.amp == "bf16", backbone.mean, backbone.std
    ), settings


@torch.no_grad()
def find(detector: Detector, samples, sizes_hw: Tensor) -> list[dict[str, Tensor]]:
    """`scores` [K], `labels` [K] and `boxes` [K, 4] (x0, y0, x1, y1 in pixels of the file, cut at its border) of each
    image, best first.
    """
    samples = normalize(samples.to(detector.device, non_blocking=True), detector.mean, detector.std)
    with autocast(detector.device, detector.amp):
        outputs = detector.model(samples)
    found = []
    for result, (height, width) in zip(
        detector.postprocess(outputs, sizes_hw.to(detector.device)), sizes_hw.tolist(), strict=True
    ):
        result = {name: values.cpu() for name, values in result.items()}
        result["boxes"] = torch.minimum(result["boxes"].clamp(min=0), torch.tensor([width, height] * 2))
        order = result["scores"].argsort(descending=True, stable=True)
        found.append({name: values[order] for name, values in result.items()})
    return found


@dataclass
class Predictions:
    """What was found so far. rows: entries of predictions.json; page: (title, image, boxes) of the first images."""

    rows: list[dict] = field(default_factory=list)
    page: list[tuple] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    with_objects: int = 0
    best_score: float = 0.0


def entries(result: dict[str, Tensor], image_id: int, name: str, classes: Classes, threshold: float) -> Iterator[dict]:
    """One image's entries of predictions.json: COCO's results and the names of file and class."""
    for score, label, (x0, y0, x1, y1) in zip(
        *(result[key].tolist() for key in ("scores", "labels", "boxes")), strict=True
    ):
        if score >= threshold:
            yield {
                "image_id": image_id,
                "file_name": name,
                "category_id": classes.ids.get(label, label),
                "category_name": classes.names.get(label, f"class {label}"),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }


def predict(detector: Detector, images: ImageFolder, args: Namespace, settings: Namespace) -> Predictions:
    """Goes over all images; draws as it goes, so that memory does not grow with them."""
    done, bar = Predictions(), Progress(len(images), "predict")
    for samples, packed, problems in build_prediction_loader(images, settings):
        for path, reason in problems:
            log.warning("left out %s: %s", path, reason)
        done.problems += problems
        targets = packed.unpack() if packed is not None else []
        results = find(detector, samples, torch.stack([target["orig_size"] for target in targets])) if targets else []
        for target, result in zip(targets, results, strict=True):
            number = int(target["image_id"])
            found = list(entries(result, number, images.name(number - 1), detector.classes, args.threshold))
            done.rows += found
            done.with_objects += bool(found)
            done.best_score = max(done.best_score, float(result["scores"].max()))
            if not args.no_draw:
                _draw(
                    images.file(number - 1), images.name(number - 1), number, found, args.output_dir / DRAWN, done.page
                )
        bar.step(f"{len(done.rows)} objects", len(targets) + len(problems))
    if len(done.problems) == len(images):
        path, reason = done.problems[0]
        raise UserError(f"none of the {len(images)} images can be read, the first is {path}: {reason}")
    return done


def _draw(file: ImageFile, name: str, number: int, found: list[dict], folder: Path, page: list[tuple]) -> None:
    """Writes NUMBER_NAME.jpg: names alone may repeat in a tree of folders."""
    image = np.asarray(open_image(file))
    boxes = np.array([row["bbox"] for row in found], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes_of = {
        "boxes": boxes,
        "labels": [row["category_name"] for row in found],
        "scores": [row["score"] for row in found],
    }
    drawn, content = Image.fromarray(draw_boxes(image, boxes, boxes_of["labels"], boxes_of["scores"])), BytesIO()
    drawn.save(content, format="JPEG", quality=92)
    write_atomically(folder / f"{number:06d}_{Path(name).stem}.jpg", lambda out: out.write(content.getvalue()))
    if len(page) < ON_PAGE:
        page.append((Path(name).name, image, boxes_of))


def earlier_predictions(args: Namespace) -> list[Path]:
    """The drawn images of an earlier run, which this one replaces.

    Raises:
        UserError: the folder can't be written, lies among the images, or holds predictions and `--overwrite` was not
            given.
    """
    folder = args.output_dir
    check_apart(folder, args.images)
    drawn = sorted((folder / DRAWN).glob("[0-9]*_*.jpg"))
    found = [path for path in (folder / RESULTS, folder / PAGE, *drawn) if path.exists()]
    if found and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} holds predictions already ({found[0].name}): choose another folder, or --overwrite"
        )
    make_folder(folder)
    return drawn


def summary(done: Predictions, images: int, args: Namespace) -> str:
    """One line: how many objects of which classes in how many images."""
    counts = Counter(row["category_name"] for row in done.rows).most_common()
    by_class = ", ".join(f"{name} {count}" for name, count in counts[:8]) + (", ..." if len(counts) > 8 else "")
    text = f"{len(done.rows)} objects in {done.with_objects} of {images} images (score from {args.threshold:g})"
    text += f": {by_class}" if counts else f"; the best score is {done.best_score:.2f}, see --threshold"
    text += f"; unreadable: {len(done.problems)}" if done.problems else ""
    return f"{text}; in {args.output_dir / RESULTS}"


def main(args: Namespace) -> None:
    earlier = earlier_predictions(args)
    images = ImageFolder(args.images)
    detector, settings = load_detector(args)
    for path in earlier:
        path.unlink()
    done = predict(detector, images, args, settings)
    if not args.no_draw:
        found_page(done.page, args.output_dir / PAGE)
    write_text(args.output_dir / RESULTS, json.dumps(done.rows))
    log.info(summary(done, len(images), args))


if __name__ == "__main__":
    run_script(main, parse)
