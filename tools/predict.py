"""Detects objects in images without annotations, with any trained detector.

    python tools/predict.py --checkpoint outputs/own/checkpoint_best.pth --images images --output_dir predictions

Writes `predictions.json` (COCO's results, with file and class names), `drawn/` (each image with its boxes) and
`predictions.png`, a page of the first images. Everything that an evaluation takes from the checkpoint is taken from it
here too.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from datasets.images.image_folder import ImageFolder
from predictor import FileResult, Prediction, Predictor
from util.errors import UserError
from util.files import check_outside_images, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.plots.boxes import draw_boxes
from util.plots.pages import detection_page
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags

RESULTS, PAGE, DRAWN = "predictions.json", "predictions.png", "drawn"
IMAGES_ON_PAGE = 12
NUM_WORKERS = 2


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/predict.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH|URL|NAME",
        help="a trained detector, ours or a published one; or the name of a published model, see hubconf.py",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|FILE|LIST",
        help="folder tree, one image, or text file of paths",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="where predictions are written",
    )
    parser.add_argument(
        "--threshold", type=_score, default=0.5, help="lowest score of an object (default: 0.5)"
    )
    parser.add_argument("--no_draw", action="store_true", help="no drawn images and no page")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier predictions in --output_dir"
    )
    add_flags(
        parser, FINETUNE, ("device", "batch_size", "image_size", "max_size", "num_workers", "amp")
    )
    return parser.parse_args(argv)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"scores lie between 0 and 1, got {text}")
    return value


@dataclass
class Predictions:
    """What was found so far. rows: entries of predictions.json; page: (title, image, boxes) of the first images."""

    rows: list[dict] = field(default_factory=list)
    page: list[tuple] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    with_objects: int = 0
    best_score: float = 0.0


def predict(predictor: Predictor, images: ImageFolder, args: Namespace) -> Predictions:
    """Goes over all images; draws as it goes, so that memory does not grow with them."""
    done, bar = Predictions(), Progress(len(images), "predict")
    workers = NUM_WORKERS if args.num_workers is None else args.num_workers
    # A batch of one by default: padding changes what is found, so that an image's neighbours would matter.
    for result in predictor.predict_files(
        images, threshold=0, batch_size=args.batch_size or 1, num_workers=workers
    ):
        _add_result(result, images, args, done)
        bar.step(f"{len(done.rows)} objects")
    if len(done.problems) == len(images):
        path, reason = done.problems[0]
        raise UserError(
            f"none of the {len(images)} images can be read, the first is {path}: {reason}"
        )
    return done


def _add_result(
    result: FileResult, images: ImageFolder, args: Namespace, done: Predictions
) -> None:
    """Adds what was found in one file, and draws it."""
    if result.prediction is None or result.image is None:
        path, reason = images.path(result.index), result.error or ""
        log.warning("skipped %s: %s", path, reason)
        done.problems.append((path, reason))
        return
    if len(result.prediction):
        done.best_score = max(done.best_score, float(result.prediction.scores[0]))
    prediction, name, number = (
        result.prediction.above(args.threshold),
        images.name(result.index),
        result.index + 1,
    )
    done.rows += [{"file_name": name, **row} for row in prediction.to_coco(number)]
    done.with_objects += len(prediction) > 0
    if not args.no_draw:
        _draw(
            result.image,
            prediction,
            args.output_dir / DRAWN / f"{number:06d}_{Path(name).stem}.jpg",
        )
        if len(done.page) < IMAGES_ON_PAGE:
            boxes = {
                "boxes": prediction.boxes,
                "labels": prediction.names,
                "scores": prediction.scores,
            }
            done.page.append((Path(name).name, result.image.permute(1, 2, 0).numpy(), boxes))


def _draw(image: Tensor, prediction: Prediction, path: Path) -> None:
    """Names of files have the image's number, since names alone may repeat in a tree of folders."""
    drawn = draw_boxes(
        image.permute(1, 2, 0).numpy(), prediction.boxes, prediction.names, prediction.scores
    )
    content = BytesIO()
    Image.fromarray(drawn).save(content, format="JPEG", quality=92)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def find_earlier_predictions(args: Namespace) -> list[Path]:
    """The drawn images of an earlier run, which this one replaces.

    Raises:
        UserError: the folder can't be written, lies among the images, or holds predictions and `--overwrite` was not
            given.
    """
    folder = args.output_dir
    check_outside_images(folder, args.images)
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
    by_class = ", ".join(f"{name} {count}" for name, count in counts[:8]) + (
        ", ..." if len(counts) > 8 else ""
    )
    text = f"{len(done.rows)} objects in {done.with_objects} of {images} images (score from {args.threshold:g})"
    text += (
        f": {by_class}" if counts else f"; the best score is {done.best_score:.2f}, see --threshold"
    )
    text += f"; unreadable: {len(done.problems)}" if done.problems else ""
    return f"{text}; in {args.output_dir / RESULTS}"


def main(args: Namespace) -> None:
    earlier = find_earlier_predictions(args)
    images = ImageFolder(args.images)
    options = {name: getattr(args, name) for name in ("device", "amp", "image_size", "max_size")}
    predictor = Predictor.from_checkpoint(args.checkpoint, **options)
    for path in earlier:
        path.unlink()
    done = predict(predictor, images, args)
    if not args.no_draw:
        detection_page(done.page, args.output_dir / PAGE)
    write_text(args.output_dir / RESULTS, json.dumps(done.rows))
    log.info(summary(done, len(images), args))


if __name__ == "__main__":
    run_script(main, parse)
