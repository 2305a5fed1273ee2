"""Ships in satellite images: the competition "Airbus Ship Detection", whose file of runs of pixels is read as it is.

Each line of `train_ship_segmentations_v2.csv` is one ship of one image, as pairs (first pixel, length); pixels are
counted from 1 down the columns. An image without ships has one line without runs.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations, from_columns
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.settings import Settings

IMAGES, RUNS = "train_v2", "train_ship_segmentations_v2.csv"
HEADER = "ImageId,EncodedPixels"
NAMES = {0: "ship"}
VAL_FRACTION, VAL_SEED = 0.1, 42  # the same images are held out in every run, whatever --seed


def build_airbus_ship(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> ConvertedDetection:
    """Images of `--airbus_path`, with and without ships: a tenth, drawn once and for all, is held out ("val").

    Raises:
        UserError: folder or file are missing or can't be used.
    """
    root = airbus_root(settings)
    image_folder = os.path.join(root, IMAGES)
    annotations = read_runs(os.path.join(root, RUNS), image_folder)
    part = held_out(len(annotations)) if image_set == "val" else ~held_out(len(annotations))
    annotations = annotations.select(np.flatnonzero(part))
    return ConvertedDetection(
        image_folder,
        filter_annotations(annotations, image_folder, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(NAMES),
        seed=settings.seed,
    )


def held_out(count: int) -> np.ndarray:
    """bool [count]: which images, in the order of their names, are for evaluation; at least one."""
    chosen = np.random.default_rng(VAL_SEED).choice(
        count, max(round(count * VAL_FRACTION), 1), replace=False
    )
    return np.isin(np.arange(count), chosen)


def airbus_root(settings: Settings) -> str:
    """The folder that holds images and runs.

    Raises:
        UserError: it does not exist.
    """
    root = settings.airbus_path or os.path.join(settings.data_root or "", "airbus-ship-detection")
    if not os.path.isdir(os.path.join(root, IMAGES)):
        raise UserError(
            f"{os.path.join(root, IMAGES)} is no folder: --airbus_path takes one with {IMAGES} and {RUNS}"
        )
    return root


def read_runs(path: str, image_folder: str) -> Annotations:
    """Images in the order of their names, which gives their ids from 1 on; `area` is the number of a ship's pixels.

    All images have one size, which the first in the folder tells.

    Raises:
        UserError: missing, another header, or runs that are no pairs of numbers inside the image.
    """
    names, runs = _read_lines(path)
    images = sorted(set(names))
    if not images:
        raise UserError(f"{path} lists no image")
    height, width = _size_hw(image_folder, images)
    rows = [row for row, text in enumerate(runs) if text]
    boxes, areas = decode_runs(
        [runs[row] for row in rows], height, width, [f"{path}, line {row + 2}" for row in rows]
    )
    numbers = {name: number for number, name in enumerate(images, start=1)}
    columns = {
        "id": np.array(rows, dtype=np.int64) + 2,
        "image": np.array([numbers[names[row]] for row in rows], dtype=np.int64),
        "label": np.zeros(len(rows), np.int64),
        "crowd": np.zeros(len(rows), bool),
        "box": boxes,
        "area": areas,
    }
    sizes = np.tile(np.array([height, width]), (len(images), 1))
    return from_columns(
        columns, path, PackedStrings(images), np.arange(1, len(images) + 1), sizes, NAMES
    )


def _read_lines(path: str) -> tuple[list[str], list[str]]:
    """(image names, runs) of each line behind the first."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: put the competition's file there") from error
    if not lines or lines[0].strip() != HEADER:
        raise UserError(f"{path}: its first line is not {HEADER}: is it the competition's file?")
    parts = [line.partition(",") for line in lines[1:] if line.strip()]
    return [name.strip() for name, _, _ in parts], [text.strip() for _, _, text in parts]


def _size_hw(image_folder: str, names: list[str]) -> tuple[int, int]:
    for name in names:
        try:
            with Image.open(os.path.join(image_folder, name)) as image:
                return image.height, image.width
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(
                f"{os.path.join(image_folder, name)} can't be decoded: replace it, all sizes are told by it"
            ) from error
    raise UserError(
        f"none of {len(names)} images is in {image_folder}: put the competition's {IMAGES} there"
    )


def decode_runs(
    texts: list[str], height: int, width: int, places: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs of each ship -> boxes float32 [N, 4], (x0, y0, x1, y1) in pixels, and areas float32 [N] in pixels.

    places: what messages call each ship.

    Raises:
        UserError: runs that are no pairs of numbers inside the image.
    """
    counts = np.array([len(text.split()) for text in texts], dtype=np.int64)
    numbers = _numbers(" ".join(texts))
    pairs = (
        None
        if numbers is None or len(numbers) != counts.sum() or (counts % 2).any()
        else numbers.reshape(-1, 2)
    )
    if (
        pairs is None
        or ((pairs < 1) | (pairs > height * width)).any()
        or (pairs.sum(1) > height * width + 1).any()
    ):
        raise UserError(_first_bad(texts, height, width, places))
    if not len(texts):
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    first, last = pairs[:, 0] - 1, pairs.sum(1) - 2
    # A run over the end of a column holds its last pixel and the first of the next.
    beyond = last // height > first // height
    starts = np.concatenate([[0], np.cumsum(counts // 2)[:-1]])
    boxes = np.stack(
        [
            np.minimum.reduceat(first // height, starts),
            np.minimum.reduceat(np.where(beyond, 0, first % height), starts),
            np.maximum.reduceat(last // height, starts) + 1,
            np.maximum.reduceat(np.where(beyond, height - 1, last % height), starts) + 1,
        ],
        axis=1,
    )
    return boxes.astype(np.float32), np.add.reduceat(pairs[:, 1], starts).astype(np.float32)


def _numbers(text: str) -> np.ndarray | None:
    """All numbers of a text at once; None where something else is in it."""
    if not text:
        return np.zeros(0, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return np.fromstring(text, dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _first_bad(texts: list[str], height: int, width: int, places: list[str]) -> str:
    for text, place in zip(texts, places, strict=True):
        words = text.split()
        if len(words) % 2 or not all(word.isascii() and word.isdigit() for word in words):
            return f"{place}: {text[:60]!r} is not pairs of a pixel and a length: correct it"
        for first, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
            if first < 1 or length < 1 or first + length - 1 > height * width:
                return (
                    f"{place}: the run {first} {length} is not inside an image of {width} x {height} pixels, the size "
                    "of the first, which all share: correct it"
                )
    return f"{places[0]}: a number is too large: correct it"
