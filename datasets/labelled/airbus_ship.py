"""Ships in satellite images: the Airbus Ship Detection competition, with its run-length encoded masks (RLE).

Each line of `train_ship_segmentations_v2.csv` is one ship in one image: pairs (first pixel, length). Pixels are
numbered from 1, down the columns. An image without ships has one line without pairs.

Shapes: I images, N ships, R runs of all ships.
"""

import csv
import os
import warnings

import numpy as np
from PIL import Image

from datasets.images.image_folder import pillow_warnings
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from datasets.labelled.file_names import match_files, remedy
from datasets.labelled.object_filter import annotations_from_columns
from datasets.labelled.segmentations import pairs_text
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.files import read_lines
from util.settings import Settings

IMAGE_FOLDER = "train_v2"
RLE_FILE = "train_ship_segmentations_v2.csv"
HEADER = "ImageId,EncodedPixels"
DELIMITERS = ",;\t|"
NO_RUNS = {
    "nan",
    "none",
    "null",
    "na",
}  # what programs write for the empty runs of an image without ships
CLASS_NAMES = {0: "ship"}

# The same images are held out for validation in every run, regardless of --seed.
VAL_FRACTION = 0.1
VAL_SEED = 42


def build_airbus_ship(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> ConvertedDetection:
    """Build the dataset of `--airbus_path`, including images without ships. A tenth of the images is "val".

    Raises:
        UserError: the folder or the CSV file is missing or malformed.
    """
    root = airbus_root(settings)
    image_folder = os.path.join(root, IMAGE_FOLDER)
    annotations = read_rle_csv(os.path.join(root, RLE_FILE), image_folder, settings.masks)

    in_val = val_mask(len(annotations))  # [I]
    selected = in_val if image_set == "val" else ~in_val
    annotations = annotations.select(np.flatnonzero(selected))
    return ConvertedDetection(
        image_folder,
        filter_annotations(annotations, image_folder, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(CLASS_NAMES),
        seed=settings.seed,
    )


def val_mask(num_images: int) -> np.ndarray:
    """Return which images, sorted by name, are in the validation set, bool [I]; at least one."""
    num_val = max(round(num_images * VAL_FRACTION), 1)
    chosen = np.random.default_rng(VAL_SEED).choice(num_images, num_val, replace=False)
    return np.isin(np.arange(num_images), chosen)


def airbus_root(settings: Settings) -> str:
    """Return the folder with the images and the CSV file.

    Raises:
        UserError: the folder does not exist.
    """
    root = settings.airbus_path or os.path.join(settings.data_root or "", "airbus-ship-detection")
    images = os.path.join(root, IMAGE_FOLDER)
    if not os.path.isdir(images):
        raise UserError(
            f"{images} is not a folder: --airbus_path takes one with {IMAGE_FOLDER} and {RLE_FILE}"
        )
    return root


def read_rle_csv(path: str, image_folder: str, masks: bool = False) -> Annotations:
    """Read the CSV file. Images are sorted by name and numbered from 1; `area` is the number of pixels of a ship.

    All images have the same size. It is read from the first one that exists.

    Args:
        masks: whether to keep the masks, too.

    Raises:
        UserError: the file is missing, has another header, or has runs that are not pairs of numbers inside the image.
    """
    names, runs, numbers = _read_csv(path)
    unusable = [i for i, name in enumerate(names) if "\0" in name]
    if unusable:
        i = unusable[0]
        raise UserError(
            f"{path}, line {numbers[i]}: {names[i][:60]!r} is not a valid file name: correct it"
        )
    images = sorted(set(names))
    if not images:
        raise UserError(f"{path} lists no images: is the download complete?")
    height, width = _read_size_hw(image_folder, images)

    rows = [row for row, text in enumerate(runs) if text]  # lines with a ship
    line_numbers = np.array(numbers, dtype=np.int64)[rows]
    boxes, areas = rle_to_boxes(
        [runs[row] for row in rows], height, width, [f"{path}, line {n}" for n in line_numbers]
    )

    image_ids = {name: i for i, name in enumerate(images, start=1)}
    columns = {
        "id": line_numbers,
        "image": np.array([image_ids[names[row]] for row in rows], dtype=np.int64),
        "label": np.zeros(len(rows), np.int64),
        "crowd": np.zeros(len(rows), bool),
        "box": boxes,
        "area": areas,
    }
    texts = None
    if masks:
        texts = PackedStrings(pairs_text(runs[row]) for row in rows)
        columns["segmentation"] = np.arange(len(rows))
    return annotations_from_columns(
        columns,
        source=path,
        file_names=PackedStrings(images),
        image_ids=np.arange(1, len(images) + 1),
        sizes_hw=np.tile(np.array([height, width]), (len(images), 1)),  # [I, 2]
        class_names=CLASS_NAMES,
        segmentation_texts=texts,
    )


def _read_csv(path: str) -> tuple[list[str], list[str], list[int]]:
    """Return (image names, runs as text, line numbers) of each line after the header.

    Programs that rewrite the file quote its fields, separate them by semicolons or tabs, or add columns.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: put the competition's file there") from error

    if lines and lines[0].strip() == HEADER and not any('"' in line for line in lines):
        # The competition's own file. The csv module would take several times as long.
        parts = [(i, *line.partition(",")) for i, line in enumerate(lines[1:], 2) if line.strip()]
        return (
            [name.strip() for _, name, _, _ in parts],
            [text.strip() for *_, text in parts],
            [number for number, *_ in parts],
        )
    try:
        return _parse_csv(lines, path)
    except csv.Error as error:  # such as quotes that are never closed
        raise UserError(f"{path} is not a CSV file ({error}): is the download complete?") from error


def _parse_csv(lines: list[str], path: str) -> tuple[list[str], list[str], list[int]]:
    wanted = HEADER.split(",")
    for delimiter in DELIMITERS:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [field.strip() for field in next(reader, [])]
        if set(wanted) <= set(header):
            break
    else:
        raise UserError(f"{path}: its first line is not {HEADER}: is it the competition's file?")

    name_column, runs_column = map(header.index, wanted)
    names, runs, numbers = [], [], []
    for row in reader:
        name, text = (
            row[column].strip() if len(row) > column else ""
            for column in (name_column, runs_column)
        )
        if name:
            names.append(name)
            runs.append("" if text.lower() in NO_RUNS else text)
            numbers.append(reader.line_num)
        elif text:
            raise UserError(f"{path}, line {reader.line_num}: no ImageId: correct it")
    return names, runs, numbers


def _read_size_hw(image_folder: str, names: list[str]) -> tuple[int, int]:
    """Return (height, width) in pixels of the first image that exists."""
    for name in names:
        try:
            with pillow_warnings(), Image.open(os.path.join(image_folder, name)) as image:
                return image.height, image.width
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(
                f"{image_folder}: the image {name} can't be decoded: replace it, the size of all images is read from it"
            ) from error

    # The names may be spelled a little differently; `filter_annotations` reports that.
    matches = match_files(names, range(len(names)), image_folder)
    if matches.files:
        return _read_size_hw(image_folder, list(matches.files.values()))
    advice = remedy(
        matches.suggestions.get(0),
        matches.example,
        f"put the competition's {IMAGE_FOLDER} there",
    )
    raise UserError(f"none of {len(names)} images is in {image_folder}, not {names[0]}: {advice}")


def rle_to_boxes(
    texts: list[str], height: int, width: int, locations: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounding boxes float32 [N, 4], (x0, y0, x1, y1) in pixels, and areas float32 [N] of RLE masks.

    Args:
        texts: the runs of each ship, as in the CSV file.
        height, width: of the images, in pixels.
        locations: file and line of each ship, for messages.

    Raises:
        UserError: runs that are not pairs of numbers inside the image.
    """
    # All numbers are parsed and checked at once, which is fast. Only if something is wrong, each line is checked.
    num_words = np.array([len(text.split()) for text in texts], dtype=np.int64)  # [N]
    numbers = _parse_integers(" ".join(texts))
    if numbers is None or len(numbers) != num_words.sum() or (num_words % 2).any():
        raise UserError(_explain_bad_rle(texts, height, width, locations))
    pairs = numbers.reshape(-1, 2)  # [R, 2], first pixel and length
    in_image = (pairs >= 1).all() and (pairs <= height * width).all()
    if not in_image or (pairs.sum(1) > height * width + 1).any():
        raise UserError(_explain_bad_rle(texts, height, width, locations))
    if not len(texts):
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)

    # Pixel p, counted from 0, is in column p // height and row p % height.
    first, last = pairs[:, 0] - 1, pairs.sum(1) - 2  # [R], [R]
    # A run over the end of a column contains the last pixel of that column and the first pixel of the next one.
    wraps = last // height > first // height
    top = np.where(wraps, 0, first % height)
    bottom = np.where(wraps, height - 1, last % height)

    starts = np.concatenate([[0], np.cumsum(num_words // 2)[:-1]])  # [N], first run of each ship
    boxes = np.stack(
        [
            np.minimum.reduceat(first // height, starts),
            np.minimum.reduceat(top, starts),
            np.maximum.reduceat(last // height, starts) + 1,  # + 1: a box ends after its last pixel
            np.maximum.reduceat(bottom, starts) + 1,
        ],
        axis=1,
    )  # [N, 4]
    areas = np.add.reduceat(pairs[:, 1], starts)  # [N]
    return boxes.astype(np.float32), areas.astype(np.float32)


def _parse_integers(text: str) -> np.ndarray | None:
    """Return all integers of a text; None if it contains anything else."""
    if not text:
        return np.zeros(0, np.int64)
    with warnings.catch_warnings():
        # At a word that is not a number, `fromstring` only warns and returns the numbers before it.
        warnings.simplefilter("error")
        try:
            return np.fromstring(text, dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _explain_bad_rle(texts: list[str], height: int, width: int, locations: list[str]) -> str:
    """Return the message for the first bad line."""
    for text, location in zip(texts, locations, strict=True):
        words = text.split()
        if len(words) % 2 or not all(word.isascii() and word.isdigit() for word in words):
            return f"{location}: {text[:60]!r} is not a list of pairs (first pixel, length): correct it"
        for first, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
            if first < 1 or length < 1 or first + length - 1 > height * width:
                return (
                    f"{location}: the run {first} {length} is not inside an image of {width} x {height} pixels, the "
                    "size of the first image, which all share: correct it"
                )
    return f"{locations[0]}: a number is too large: correct it"
