"""Segmentations of objects: kept as JSON text in one array, and decoded to masks when their image is loaded.

As Python objects, the polygons of COCO would take several gigabytes, and each dataloader worker would copy them.

Shapes: N objects of an image of h x w pixels, R runs of a mask.
"""

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from datasets.images.packed_strings import PackedStrings
from util.masks import RLE, decode_masks, encode_mask

Size = tuple[int, int]  # (height, width) in pixels

# Matches the key and its value: a list without strings and objects, an object without objects, or a number or word.
# It cannot start inside a string: quotes in a JSON string are escaped. COCO's run-length encoding (RLE) has no braces.
SEGMENTATION = re.compile(rb'("segmentation"\s*:\s*)(\[[^"{}]*\]|\{[^{}]*\}|[-+.\w]+)')

MIN_NUMBERS = 6  # of a polygon: three points
SHORT_TEXT = (
    256  # bytes; longer lists are not searched for a polygon of three points before they are loaded
)
MAX_CODES = 7  # of a number in compressed RLE: 35 bits
CODE_BASE = 48  # compressed RLE writes six bits as the ASCII character with the code 48 + value


class SegmentationError(Exception):
    """A segmentation that is neither a list of polygons nor the RLE of a mask of the image's size."""


class SegmentationTexts:
    """Collects the JSON texts of segmentations while a file is read. Each one is known by its number."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, text: bytes) -> int:
        """Add a text and return its number."""
        self._data += text
        self._ends.append(len(self._data))
        return len(self._ends) - 1

    def clear(self) -> None:
        """Forget all texts."""
        del self._data[:], self._ends[:]

    def replace_in(self, content: bytes) -> bytes:
        """Collect all segmentations in the text of a JSON file. Return the text with their numbers instead."""
        return SEGMENTATION.sub(lambda match: b"%b%d" % (match[1], self.add(match[2])), content)

    def number(self, value: Any) -> int:
        """Return the number of an annotation's `segmentation`; -1 if it has none.

        Args:
            value: the number that `replace_in` wrote, or what it did not match, which is added.
        """
        if value is None:
            return -1
        is_number = type(value) is int and 0 <= value < len(self)
        return value if is_number else self.add(json.dumps(value).encode())

    def text(self, value: Any) -> str | None:
        """Return the text of an annotation's `segmentation`; None if it has none. See `number`."""
        if value is None:
            return None
        if type(value) is int and 0 <= value < len(self):
            start = self._ends[value - 1] if value else 0
            return self._data[start : self._ends[value]].decode()
        return json.dumps(value)

    def pack(self) -> PackedStrings:
        """Return the texts in the order of their numbers. No more can be added then."""
        ends = np.frombuffer(self._ends, dtype=np.int64)
        return PackedStrings.from_arrays(np.frombuffer(self._data, dtype=np.uint8), ends)


def find_empty(texts: PackedStrings, numbers: np.ndarray) -> np.ndarray:
    """Return which objects have no segmentation: none at all, or polygons of fewer than three points; bool [A].

    Args:
        numbers: int64 [A], number of each object's text; -1 if it has none.
    """
    empty = numbers < 0
    if not len(texts):
        return empty
    _, ends = texts.arrays()
    lengths = np.diff(ends, prepend=0)[numbers]  # [A]; wrong where the number is -1
    for row in np.flatnonzero(~empty & (lengths < SHORT_TEXT)).tolist():
        empty[row] = _is_empty(texts[int(numbers[row])])
    return empty


def _is_empty(text: str) -> bool:
    if text == "null":
        return True
    if not text.startswith("["):
        return False
    # Of a single polygon, the commas tell the number of its points.
    if text.count("[") <= 2 and text.count(",") >= MIN_NUMBERS - 1:
        return False
    try:
        return not _usable_polygons(_parse_json(text))
    except SegmentationError:  # broken, and reported when it is loaded
        return False


def _parse_json(text: str) -> Any:
    # The text is what a pattern found in a file, which need not be JSON.
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SegmentationError(f"segmentation {text[:40]!r} is not valid JSON") from error


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_segmentations(
    texts: Sequence[str | None], boxes_xyxy_abs: np.ndarray, size_hw: Size, ids: Sequence[int]
) -> np.ndarray:
    """Return the masks of the objects of an image, uint8 [N, h, w], 0 or 1.

    The mask of an object without a segmentation is its whole box.

    Args:
        texts: [N], the JSON text of each segmentation; None if there is none.
        boxes_xyxy_abs: [N, 4], (x0, y0, x1, y1) in pixels.
        ids: [N], annotation ids, for messages.

    Raises:
        SegmentationError: see `to_rle`.
    """
    rles = []
    for text, box, annotation_id in zip(texts, boxes_xyxy_abs, ids, strict=True):
        try:
            rles.append(to_rle_or_box(text, box, size_hw))
        except SegmentationError as error:
            raise SegmentationError(f"annotation {annotation_id}: {error}") from error
    return decode_masks(rles, size_hw)


def decode_mask(text: str, size_hw: Size) -> np.ndarray | None:
    """Return a mask, uint8 [h, w]; None if there is no segmentation. See `to_rle`."""
    rle = to_rle(text, size_hw)
    return None if rle is None else decode_masks([rle])[0]


def to_rle_or_box(text: str | None, box_xyxy_abs: Sequence[float], size_hw: Size) -> RLE:
    """Return the RLE of a segmentation, or of the whole box if there is none. See `to_rle`."""
    rle = None if text is None else to_rle(text, size_hw)
    return box_to_rle(box_xyxy_abs, size_hw) if rle is None else rle


def to_rle(text: str, size_hw: Size) -> RLE | None:
    """Convert a segmentation to compressed RLE. Polygons of fewer than three points are skipped.

    Args:
        text: JSON of a list of polygons [x, y, x, y, ...], of compressed or uncompressed RLE, or of `pairs_text`.
        size_hw: (height, width) of the image.

    Returns:
        None if there is no polygon.

    Raises:
        SegmentationError: it is none of these, or does not fit into the image.
    """
    value = _parse_json(text)
    if value is None:
        return None
    if isinstance(value, list):
        return _polygons_to_rle(value, size_hw)
    if isinstance(value, dict) and "pairs" in value:
        return _pairs_to_rle(value["pairs"], size_hw)
    if isinstance(value, dict):
        return _check_rle(value, size_hw)
    raise SegmentationError(f"segmentation {text[:40]} is neither polygons nor RLE")


def box_to_rle(box_xyxy_abs: Sequence[float], size_hw: Size) -> RLE:
    """Return the RLE of all pixels that a box touches."""
    height, width = size_hw
    x0, y0, x1, y1 = box_xyxy_abs
    left, right = np.clip([np.floor(x0), np.ceil(x1)], 0, width).astype(int)
    top, bottom = np.clip([np.floor(y0), np.ceil(y1)], 0, height).astype(int)
    mask = np.zeros(size_hw, np.uint8)
    mask[top:bottom, left:right] = 1
    return encode_mask(mask)


def _polygons_to_rle(value: list, size_hw: Size) -> RLE | None:
    polygons = _usable_polygons(value)
    if not polygons:
        return None
    numbers = np.concatenate(polygons)
    # pycocotools walks along each edge, so its memory grows with the length.
    limit = max(size_hw)
    if not (np.isfinite(numbers) & (abs(numbers - limit / 2) <= 1.5 * limit)).all():
        height, width = size_hw
        raise SegmentationError(f"a polygon is far outside the image of {width} x {height} pixels")
    return coco_mask.merge(coco_mask.frPyObjects([item.tolist() for item in polygons], *size_hw))


def _usable_polygons(value: list) -> list[np.ndarray]:
    """Return the polygons of at least three points, as arrays of x, y, x, y, ...

    Raises:
        SegmentationError: a polygon is not a list of numbers.
    """
    is_flat = bool(value) and not any(isinstance(item, list) for item in value)
    # Some programs omit the outer list of a single polygon.
    polygons = [_parse_polygon(item) for item in ([value] if is_flat else value)]
    # pycocotools would take four numbers for a box.
    return [polygon for polygon in polygons if len(polygon) >= MIN_NUMBERS]


def _parse_polygon(polygon: Any) -> np.ndarray:
    try:
        numbers = np.array(polygon)
    except ValueError:  # lists of different lengths
        numbers = np.array(None)
    if isinstance(polygon, list) and not polygon:
        return numbers
    is_odd = numbers.size >= MIN_NUMBERS and numbers.size % 2
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or is_odd:
        raise SegmentationError(f"polygon {str(polygon)[:40]} is not a list [x, y, x, y, ...]")
    return numbers


def _check_rle(value: RLE, size_hw: Size) -> RLE:
    """Return compressed RLE whose runs fill the image. pycocotools checks nothing, and reads foreign memory instead."""
    height, width = size_hw
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width]:
        raise SegmentationError(f"RLE of size {str(size)[:40]}, the image has [{height}, {width}]")
    runs = decode_counts(counts) if isinstance(counts, str) else _parse_runs(counts)  # [R]
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise SegmentationError("the runs of the RLE do not add up to the pixels of the image")
    if isinstance(counts, str):
        return {"size": size, "counts": counts.encode()}
    return coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, height, width)


def _parse_runs(counts: Any) -> np.ndarray:
    runs = np.array(counts) if isinstance(counts, list) else np.array(None)
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise SegmentationError(f"counts {str(counts)[:40]} are neither compressed RLE nor runs")
    return runs


def decode_counts(text: str) -> np.ndarray:
    """Return the lengths of the runs in COCO's compressed RLE, int64 [R].

    Raises:
        SegmentationError: the text is damaged.
    """
    codes = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - CODE_BASE
    is_last = codes & 32 == 0  # the last character of a number; the others have this bit
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not is_last[-1]:
        raise SegmentationError("damaged RLE")
    ends = np.flatnonzero(is_last)  # [R]
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_CODES:
        raise SegmentationError("damaged RLE")

    # Five bits per character, the lowest first. Bit 16 of the last one is the sign.
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)  # [R]
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth run on, a number is the difference to the run before the previous one.
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def pairs_text(runs: str) -> str:
    """Return the text of a mask in the Airbus competition's encoding, see `datasets.labelled.airbus_ship`."""
    return json.dumps({"pairs": runs})


def _pairs_to_rle(runs: str, size_hw: Size) -> RLE:
    height, width = size_hw
    numbers = np.array(runs.split(), dtype=np.int64)
    first, lengths = numbers[::2] - 1, numbers[1::2]
    if (first < 0).any() or (first + lengths > height * width).any():
        raise SegmentationError(f"a run is outside the image of {width} x {height} pixels")
    # Runs may overlap and come in any order.
    change = np.zeros(height * width + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, first + lengths, -1)
    inside = (np.cumsum(change[:-1]) > 0).astype(np.uint8)  # [h * w], down the columns
    return encode_mask(inside.reshape(width, height).T)
