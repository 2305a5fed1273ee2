"""Detect objects in images with a trained detector; no annotations are needed.

    python tools/predict.py --checkpoint outputs/custom/checkpoint_best.pth --images images --output_dir predictions

Writes `predictions.json` (COCO's results format plus file and class names), `drawn/` (each image with its boxes, and
masks of a detector with a mask head) and `predictions.png`, a page of the first images. A panoptic detector also writes
`panoptic.json` and `panoptic/` (COCO's panoptic format). Architecture, image size and class names come from the
checkpoint.
"""

import argparse
import contextlib
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.images.image_folder import ImageFolder
from predictor import FileResult, Panoptic, Prediction, Predictor
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.files import check_outside_images, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.masks import ids_to_png
from util.plots.boxes import draw_boxes, label_color
from util.plots.fonts import class_text
from util.plots.masks import draw_masks, draw_segments, masks_to_draw
from util.plots.pages import detection_page
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags
from util.settings.value_types import AUTO

RESULTS, PAGE, DRAWN = "predictions.json", "predictions.png", "drawn"
SEGMENTS, SEGMENT_IDS = "panoptic.json", "panoptic"
# Ends of the names of pictures. An image has one number, so that no two names are equal.
OBJECTS_SUFFIX, SEGMENTS_SUFFIX = ".jpg", "_panoptic.jpg"
# Flags of finetune_main.py with other defaults here.
HELP = {
    "batch_size": "images per batch (default: 1; padding in a batch changes predictions slightly)",
    "image_size": "short side to which images are resized, in pixels (default: as in the checkpoint, else 800)",
    "max_size": "maximum long side of resized images, in pixels (default: as in the checkpoint, else 1333)",
    "amp": "run the network in bfloat16 (bf16) or float32 (default: as in the checkpoint, else no)",
    "exif": "EXIF orientation of images: apply or ignore it (default: as in training, else ignore)",
}
IMAGES_ON_PAGE = 12
CLASSES_IN_SUMMARY = 8  # the most frequent ones
NUM_WORKERS = 2
JPEG_QUALITY = 92  # of drawn images
# Such as a full disk, a name that the file system refuses, or an image with more pixels than a JPEG can have.
DRAWING_ERRORS = (UserError, OSError, ValueError, MemoryError)
DEFAULT_NAME_BYTES = 255  # of a file name, where the file system does not say


def set_num_workers_default(parser: Parser) -> None:
    """Give `--num_workers` the default of the tools that predict, instead of that of training."""
    parser.set_defaults(num_workers=NUM_WORKERS)
    for action in parser._actions:
        if action.dest == "num_workers":
            action.help = f"number of dataloader workers (default: {NUM_WORKERS})"


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/predict.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH|URL|NAME",
        help="a trained detector, ours or a published one, or the name of a published model such as detr_resnet50 "
        "(hubconf.py lists them)",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|FILE|LIST",
        help="folder of images (with subfolders), one image, or a text file with one path per line",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the predictions",
    )
    parser.add_argument(
        "--threshold",
        type=score_value,
        default=0.5,
        metavar="SCORE",
        help="lowest score of an object, from 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--no_draw",
        action="store_true",
        help="draw no images, write results only (default: images are drawn)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace earlier predictions in --output_dir (default: off)",
    )
    flags = (
        *("device", "batch_size", "image_size", "max_size"),
        *("num_workers", "amp", "compile", "exif"),
    )
    add_flags(parser, FINETUNE, flags)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    set_num_workers_default(parser)
    args = parser.parse_args(argv)
    if args.batch_size == AUTO:
        parser.error("argument --batch_size: auto measures training steps; give a number")
    return args


def score_value(text: str) -> float:
    """Return a score in [0, 1] of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a score is between 0 and 1, got {text}")
    return value


@dataclass
class Predictions:
    """What was found so far.

    Attributes:
        rows: the entries of predictions.json.
        images, segmentations: the entries of panoptic.json; empty without a panoptic detector.
        page: (title, image, objects) of the first images, for the page.
        problems: (path, reason) of each image that could not be read.
        rotated: paths of the images whose EXIF orientation is ignored, though no `--exif` says so.
        num_images_with_objects: images with at least one object above the threshold.
        best_score: highest score of all images, also below the threshold.
        not_drawn: (path, reason) of each picture that could not be written, segment ids included.
    """

    rows: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    segmentations: list[dict] = field(default_factory=list)
    page: list[tuple] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    num_images_with_objects: int = 0
    best_score: float = 0.0
    not_drawn: list[tuple[str, str]] = field(default_factory=list)


def predict(predictor: Predictor, images: ImageFolder, args: Namespace) -> Predictions:
    """Detect objects in all images. Images are drawn one by one, so that memory does not grow with their number."""
    predictions, bar = Predictions(), Progress(len(images), "predict", unit=" images")
    results = predictor.predict_files(
        images,
        threshold=args.threshold,
        # One image by default: padding changes predictions slightly, so neighbors in a batch would matter.
        batch_size=args.batch_size or 1,
        num_workers=args.num_workers,
    )
    for result in results:
        _add_result(result, images, args, predictions)
        bar.step(f"{len(predictions.rows)} objects")

    if len(predictions.problems) == len(images):
        path, reason = predictions.problems[0]
        raise UserError(
            f"none of the {len(images)} images can be read, the first is {path}: {reason}; give other --images"
        )
    if predictions.rotated:
        log.warning(
            "%d images have an EXIF orientation, the first is %s: boxes are in the pixels as stored, not as viewers "
            "show them; give --exif apply or --exif ignore",
            len(predictions.rotated),
            predictions.rotated[0],
        )
    return predictions


def _add_result(
    result: FileResult, images: ImageFolder, args: Namespace, predictions: Predictions
) -> None:
    """Add the objects of one file, and draw them."""
    if result.prediction is None or result.image is None:
        path, reason = images.path(result.index), result.error or ""
        log.warning("skipped %s: %s", path, reason)
        predictions.problems.append((path, reason))
        return

    if result.ignored_orientation > 1:
        predictions.rotated.append(images.path(result.index))
    prediction, name, image_id = result.prediction, images.name(result.index), result.index + 1
    predictions.best_score = max(predictions.best_score, prediction.best_score)
    predictions.rows += [{"file_name": name, **row} for row in prediction.to_coco(image_id)]
    predictions.num_images_with_objects += len(prediction) > 0

    if prediction.panoptic is not None:
        path = picture_path(args.output_dir / SEGMENT_IDS, image_id, name, ".png")
        with _counting_failures(path, predictions):
            _write_segment_ids(prediction.panoptic, path)
            _add_segmentation(prediction.panoptic, image_id, name, path, predictions)
    if not args.no_draw:
        _draw_result(result.image, prediction, image_id, name, args, predictions)


@contextlib.contextmanager
def _counting_failures(path: Path, predictions: Predictions) -> Iterator[None]:
    """Count a picture that fails. Detections are worth more than pictures: it must not end the loop."""
    try:
        yield
    except DRAWING_ERRORS as error:
        predictions.not_drawn.append((str(path), str(error)))


def _write_segment_ids(panoptic: Panoptic, path: Path) -> None:
    content = ids_to_png(panoptic.ids.numpy())
    write_atomically(path, lambda file: file.write(content))


def _add_segmentation(
    panoptic: Panoptic, image_id: int, name: str, path: Path, predictions: Predictions
) -> None:
    """Add an image to panoptic.json. `file_name` is the image in `images` and its segment ids in `annotations`."""
    height, width = panoptic.ids.shape
    predictions.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    predictions.segmentations.append(
        {"image_id": image_id, "file_name": path.name, "segments_info": panoptic.segments}
    )


def panoptic_content(predictions: Predictions, classes: Classes) -> dict[str, Any]:
    """Return the content of panoptic.json, in COCO's panoptic format."""
    things = classes.things or {}
    categories = [
        {
            "id": classes.category_ids.get(row, row),
            "name": name,
            "isthing": int(things.get(row, False)),
        }
        for row, name in classes.names.items()
    ]
    return {
        "images": predictions.images,
        "annotations": predictions.segmentations,
        "categories": categories,
    }


def picture_path(
    folder: Path, image_id: int, name: str, suffix: str = OBJECTS_SUFFIX, kind: str = ""
) -> Path:
    """Return the file of a picture. File names may repeat in a tree of folders; the id in front is unique.

    A name that would be too long for the file system is shortened.
    """
    try:
        limit = os.pathconf(folder.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, or a file system that does not say
        limit = DEFAULT_NAME_BYTES
    prefix = f"{kind}{image_id:06d}_"
    space = limit - len(f".{prefix}{suffix}.tmp")  # `write_atomically` first writes .NAME.tmp
    stem = os.fsencode(Path(name).stem)
    if len(stem) > space:
        # Cut between characters: half of one is no valid name on some systems.
        stem = stem[:space].decode("utf-8", "ignore").encode()
    return folder / f"{prefix}{os.fsdecode(stem)}{suffix}"


def _draw_result(
    image: Tensor,
    prediction: Prediction,
    image_id: int,
    name: str,
    args: Namespace,
    predictions: Predictions,
) -> None:
    """Draw the objects, and the segments of a panoptic detector, and keep what the page needs."""
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, 3]
    folder = args.output_dir / DRAWN
    path = picture_path(folder, image_id, name)
    with _counting_failures(path, predictions):
        _write_jpeg(draw_objects(pixels, prediction), path)
    if prediction.panoptic is not None:
        path = picture_path(folder, image_id, name, SEGMENTS_SUFFIX)
        with _counting_failures(path, predictions):
            _write_jpeg(_draw_panoptic(pixels, prediction.panoptic), path)

    if len(predictions.page) < IMAGES_ON_PAGE:
        predictions.page.append(_page_row(Path(name).name, pixels, prediction))


def draw_objects(pixels: np.ndarray, prediction: Prediction) -> np.ndarray:
    """Return a copy of the image, uint8 [H, W, 3], with the boxes of a prediction, and its masks if it has any."""
    colors = [label_color(name) for name in prediction.names]
    if prediction.rles is not None:
        masks = masks_to_draw(prediction.rles, prediction.size_hw)
        pixels = draw_masks(pixels, masks, colors)
    names = _names_to_draw(prediction)
    return draw_boxes(pixels, prediction.boxes, names, prediction.scores, colors)


def _draw_panoptic(pixels: np.ndarray, panoptic: Panoptic) -> np.ndarray:
    names = {segment["category_id"]: segment["name"] for segment in panoptic.segments}
    return draw_segments(pixels, panoptic.ids.numpy(), panoptic.segments, names)


def _write_jpeg(pixels: np.ndarray, path: Path) -> None:
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=JPEG_QUALITY)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _page_row(title: str, pixels: np.ndarray, prediction: Prediction) -> tuple:
    """Return a row of `util.plots.pages.detection_page`."""
    row = {
        "boxes": prediction.boxes,
        "labels": _names_to_draw(prediction),
        "scores": prediction.scores,
        "masks": prediction.rles,
    }
    panoptic = prediction.panoptic
    if panoptic is not None:
        row["panoptic"] = {"ids": panoptic.ids, "segments_info": panoptic.segments}
    return title, pixels, row


def _names_to_draw(prediction: Prediction) -> list[str]:
    pairs = zip(prediction.names, prediction.category_ids, strict=True)
    return [class_text(name, category_id) for name, category_id in pairs]


def find_earlier_predictions(args: Namespace) -> list[Path]:
    """Create the output folder; return those files of an earlier run that this one may not replace.

    Raises:
        UserError: the folder can't be written, is among the images, or has predictions and `--overwrite` is not given.
    """
    folder = args.output_dir
    check_outside_images(folder, args.images)
    earlier = [
        *sorted((folder / DRAWN).glob("[0-9]*_*.jpg")),
        *sorted((folder / SEGMENT_IDS).glob("[0-9]*_*.png")),
        *(folder / name for name in (PAGE, SEGMENTS) if (folder / name).exists()),
    ]
    found = [path for path in (folder / RESULTS, *earlier) if path.exists()]
    if found and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} already has predictions ({found[0].name}): choose another folder, or add "
            "--overwrite to replace them"
        )
    make_folder(folder)
    return earlier


def summary(predictions: Predictions, num_images: int, args: Namespace) -> str:
    """Return one line: how many objects of which classes in how many images, and where they are."""
    num_objects = len(predictions.rows)
    text = (
        f"{num_objects} objects in {predictions.num_images_with_objects} of {num_images} images "
        f"(threshold {args.threshold:g})"
    )
    counts = Counter(row["category_name"] for row in predictions.rows).most_common()
    if counts:
        classes = [f"{name} {count}" for name, count in counts[:CLASSES_IN_SUMMARY]]
        if len(counts) > CLASSES_IN_SUMMARY:
            classes.append("...")
        text += f": {', '.join(classes)}"
    else:
        text += f"; the best score is {predictions.best_score:.2f}: lower --threshold to see more"
    if predictions.problems:
        text += f"; {len(predictions.problems)} unreadable images skipped"
    if predictions.not_drawn:
        text += f"; {len(predictions.not_drawn)} pictures not drawn"
    text += f"; written to {args.output_dir / RESULTS}"
    if predictions.segmentations:
        text += f" and {SEGMENTS}"
    return text if args.no_draw else f"{text}, drawn in {args.output_dir / DRAWN}"


def write_results(results: Mapping[str, Any], predictions: Predictions, folder: Path) -> None:
    """Write predictions.json, and panoptic.json if there is one: the content by file name.

    If the disk is full of pictures, they are removed: the results are worth more.

    Raises:
        UserError: they can't be written without the pictures either.
    """
    contents = {folder / name: json.dumps(content) for name, content in results.items()}
    try:
        for path, content in contents.items():
            write_text(path, content)
    except UserError as error:
        pictures = sorted((folder / DRAWN).glob("[0-9]*_*.jpg"))
        if not pictures:
            raise
        for picture in pictures:
            picture.unlink()
        predictions.not_drawn += [(str(picture), str(error)) for picture in pictures]
        for path, content in contents.items():
            write_text(path, content)


def draw_page(predictions: Predictions, path: Path) -> None:
    """Write the page of the first images."""
    with _counting_failures(path, predictions):
        detection_page(predictions.page, path)


def warn_of_failures(predictions: Predictions) -> None:
    """Log how many pictures could not be written."""
    if predictions.not_drawn:
        first, reason = predictions.not_drawn[0]
        log.warning(
            "%d pictures can't be drawn, the first is %s: %s; their objects are in %s",
            len(predictions.not_drawn),
            first,
            reason,
            RESULTS,
        )


def main(args: Namespace) -> None:
    earlier = find_earlier_predictions(args)
    images = ImageFolder(args.images)
    names = ("device", "amp", "compile", "image_size", "max_size", "exif")
    options = {name: getattr(args, name) for name in names}
    predictor = Predictor.from_checkpoint(args.checkpoint, **options)

    # Removed only now: if the checkpoint can't be loaded, the earlier predictions stay.
    for path in earlier:
        path.unlink()
    predictions = predict(predictor, images, args)
    results = {RESULTS: predictions.rows}
    if "panoptic" in predictor.postprocessors:
        results[SEGMENTS] = panoptic_content(predictions, predictor.classes)
    write_results(results, predictions, args.output_dir)
    if not args.no_draw:
        draw_page(predictions, args.output_dir / PAGE)
    warn_of_failures(predictions)
    log.info("%s", summary(predictions, len(images), args))


if __name__ == "__main__":
    run_script(main, parse)
