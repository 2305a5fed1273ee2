"""The parser of COCO annotation files.

Shapes: I images, A annotated objects (boxes) of all images.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_json import read_json
from datasets.labelled.object_filter import annotations_from_columns
from datasets.labelled.segmentations import SegmentationTexts
from util.errors import UserError
from util.gc_paused import gc_paused

Record = dict[str, Any]
ID_LIMIT = 2**53  # evaluators store ids in float64, which has 53 bits for integers
# `area` is that of the mask, which is drawn on whole pixels and may be a little larger than the box. Beyond this factor
# it is a mistake.
MAX_AREA_RATIO = 2.0


def read_coco(path: str) -> Annotations:
    """Read a COCO detection file.

    Raises:
        UserError: the file does not exist, is not JSON, or is malformed (see `parse_coco`).
    """
    with gc_paused():
        return parse_coco(read_json(path), path)


def parse_coco(
    content: Record,
    source: str,
    segmentations: SegmentationTexts | None = None,
    *,
    keep_crowds: bool = False,
) -> Annotations:
    """Build `Annotations` from the content of a COCO detection file.

    Labels are the raw category ids. A missing `iscrowd` or `ignore` means 0. A missing `area`, or one that can't be
    right (`is_usable_area`), is the area of the box. A box with CVAT's `attributes.rotation` becomes the one around the
    rotated rectangle. Crowds and objects with `ignore` 1 are skipped. Also skipped, with a warning that gives their
    number: boxes that are not finite, have no area or are outside their image, and annotations of unlisted images.

    Args:
        source: name of the file in messages.
        segmentations: the texts that `read_json` collected from the file. None: masks are not read.
        keep_crowds: crowds are objects, too.

    Raises:
        UserError: a list is missing, an entry is not an object, an id is not an integer of at least 0 or not unique, or
            a file name, size, bbox or iscrowd is malformed.
    """
    images, annotations, categories = (
        _records(content, key, source) for key in ("images", "annotations", "categories")
    )

    # Sorted by id, so that np.searchsorted can look up ids.
    images = sorted(images, key=lambda image: _parse_id(image, "id", source))
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)  # [I]
    repeated = image_ids[1:][image_ids[1:] == image_ids[:-1]]
    if len(repeated):
        raise UserError(
            f"{source}: two images have the same id {repeated[0]}: ids must be unique; correct or remove one"
        )

    file_names = PackedStrings(_parse_file_name(image, source) for image in images)
    sizes = [_parse_size_hw(image, source) for image in images]
    columns = _parse_columns(annotations, source)
    if keep_crowds:
        columns["kept_crowd"] = columns["crowd"]
        columns["crowd"] = np.zeros(len(annotations), bool)
    if segmentations is not None:
        numbers = [segmentations.number(item.get("segmentation")) for item in annotations]
        columns["segmentation"] = np.array(numbers, dtype=np.int64)
    return annotations_from_columns(
        columns,
        source=source,
        file_names=file_names,
        image_ids=image_ids,
        sizes_hw=np.array(sizes, dtype=np.int64).reshape(-1, 2),  # [I, 2], also without images
        class_names=_parse_class_names(categories, source),
        segmentation_texts=None if segmentations is None else segmentations.pack(),
    )


def _parse_columns(annotations: Sequence[Record], source: str) -> dict[str, np.ndarray]:
    """Return one array per field, with the rows in the order of the file (see `annotations_from_columns`)."""
    boxes_xywh = np.array(
        [_parse_bbox(annotation, source) for annotation in annotations], dtype=np.float64
    ).reshape(-1, 4)  # [A, 4]
    rotated, boxes_xywh = rotate_boxes(annotations, boxes_xywh)
    given, areas = parse_areas(annotations)
    usable = is_usable_area(areas, boxes_xywh)
    # Values too large for float32 become infinite. Such boxes are skipped later.
    with np.errstate(over="ignore", invalid="ignore"):
        box = boxes_xywh.astype(np.float32)  # [A, 4], x, y, width, height
        box_area = box[:, 2] * box[:, 3]  # [A]
        box[:, 2:] += box[:, :2]  # x0, y0, x1, y1; added in float32, as published

    image_ids = [_parse_id(annotation, "image_id", source) for annotation in annotations]
    labels = [_parse_id(annotation, "category_id", source) for annotation in annotations]
    crowd, ignored = (_parse_marks(annotations, key, source) for key in ("iscrowd", "ignore"))
    ids = [_parse_annotation_id(annotation) for annotation in annotations]
    return {
        "id": np.array(ids, dtype=np.int64),
        "image": np.array(image_ids, dtype=np.int64),
        "label": np.array(labels, dtype=np.int64),
        "crowd": crowd | ignored,
        "ignored": ignored,
        "box": box,
        "rotated": rotated,
        "area": np.where(usable, areas, box_area).astype(np.float32),
        "bad_area": given & ~usable,
    }


# ----------------------------------------------------------------------------------------------- images and categories


def _records(content: Record, key: str, source: str) -> list[Record]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(
            f"{source} has no list {key!r}: a COCO detection file has the lists images, annotations and categories"
        )
    for index, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise UserError(
                f"{source}: entry {index} of {key!r} is {_shorten(entry)}: it must be an object in braces; correct "
                f"or remove it"
            )
    return content[key]


def _parse_id(record: Record, key: str, source: str) -> int:
    value = record.get(key)
    # `True` is an int in Python, but not an id.
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(
            f"{source}: {key} of {_shorten(record)} is {_shorten(value)}: it must be an integer; correct it"
        )
    if not 0 <= value < ID_LIMIT:
        raise UserError(
            f"{source}: {key} of {_shorten(record)} is {_shorten(value)}: it must be at least 0 and less than 2^53; "
            f"correct it"
        )
    return value


def _parse_file_name(image: Record, source: str) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{source}: image {image['id']} has no file_name: add it or remove the image"
        )
    try:
        if "\0" in os.fsdecode(os.fsencode(name)):
            raise ValueError("a null character")
    except ValueError as error:  # such as half of a surrogate pair, which JSON can express
        raise UserError(
            f"{source}: image {image['id']} has the file_name {_shorten(name)}, which is not a valid file name: "
            "correct it"
        ) from error
    return name


def _parse_size_hw(image: Record, source: str) -> tuple[int, int]:
    """Return (height, width) in pixels, 0 if the file does not say."""
    size = image.get("height") or 0, image.get("width") or 0
    for name, value in zip(("height", "width"), size, strict=True):
        if not _is_number(value) or not 0 <= value < 2**31:
            raise UserError(
                f"{source}: image {image['id']} has {name} {_shorten(value)}: it must be in pixels, a number "
                "without quotes; correct it"
            )
    return int(size[0]), int(size[1])


def class_name(category: Record) -> str:
    """Return the name of a category; its id if it has none."""
    name = category.get("name")
    return str(category["id"] if name is None else name)


def _parse_class_names(categories: Sequence[Record], source: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        category_id = _parse_id(category, "id", source)
        name = class_name(category)
        # The same category may be listed twice, but not two names with one id.
        if names.setdefault(category_id, name) != name:
            raise UserError(
                f"{source}: the categories '{names[category_id]}' and '{name}' have the same id {category_id}: ids "
                "must be unique; correct or remove one"
            )
    return names


# --------------------------------------------------------------------------------------------------------- annotations


def _parse_annotation_id(annotation: Record) -> int:
    """Return the annotation id, -1 if there is none. Only messages use it, so any value is accepted."""
    value = annotation.get("id")
    return value if isinstance(value, int) and _is_number(value) else -1


def _parse_bbox(annotation: Record, source: str) -> Sequence[float]:
    """Return [x, y, width, height] in pixels."""
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(
            f"{source}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has bbox "
            f"{_shorten(bbox)}: it must be [x, y, width, height] in pixels, numbers without quotes"
        )
    return bbox


def _parse_marks(annotations: Sequence[Record], key: str, source: str) -> np.ndarray:
    """Return `iscrowd` or `ignore` of each annotation, bool [A]; False if there is none."""
    values = [annotation.get(key) or 0 for annotation in annotations]
    for annotation, value in zip(annotations, values, strict=True):
        # Such objects are not trained on. A text such as "0", which is true in Python, must not drop one.
        if value and value not in (0, 1):
            raise UserError(
                f"{source}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has {key} "
                f"{_shorten(value)}: it must be 0 or 1"
            )
    return np.array(values, dtype=bool)


def is_ignored_region(annotation: Record) -> bool:
    """Return whether an annotation is a crowd or to be ignored: not trained on, and not counted in AP either way."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def parse_areas(annotations: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each annotation has an `area`, bool [A], and the areas, float64 [A]; NaN for what is no number."""
    values = [annotation.get("area") for annotation in annotations]
    given = np.array([value is not None for value in values], dtype=bool)
    areas = [value if _is_number(value) else np.nan for value in values]
    return given, np.array(areas, dtype=np.float64)


def is_usable_area(areas: np.ndarray, boxes_xywh: np.ndarray) -> np.ndarray:
    """Return which areas can be those of the object in each box, bool [A]: above 0, and not much above the box's.

    COCO's metrics skip an object whose area is in none of their ranges: negative, NaN, or above 10^10. That of a whole
    image makes each object large.

    Args:
        areas: [A], in square pixels.
        boxes_xywh: [A, 4], (x, y, width, height) in pixels.
    """
    # Two pixels more than the box: a mask covers each pixel that its outline touches.
    with np.errstate(over="ignore", invalid="ignore"):
        limits = MAX_AREA_RATIO * (boxes_xywh[:, 2:] + 2).prod(1)  # [A]
        return (areas > 0) & (areas <= limits)


def rotate_boxes(
    annotations: Sequence[Record], boxes_xywh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which boxes CVAT's `attributes.rotation` rotates, bool [A], and all boxes, [A, 4], with these replaced.

    CVAT writes a rotated rectangle as `bbox` before the rotation, and the angle.
    """
    degrees = np.array(
        [
            _parse_rotation(annotation) if "attributes" in annotation else 0
            for annotation in annotations
        ],
        dtype=np.float64,
    )
    return degrees % 180 != 0, box_around_rotated(boxes_xywh, degrees)


def _parse_rotation(annotation: Record) -> float:
    """Return CVAT's angle in degrees, 0 if there is none."""
    attributes = annotation.get("attributes")
    value = attributes.get("rotation") if isinstance(attributes, dict) else None
    return value if _is_number(value) and np.isfinite(value) else 0.0


def box_around_rotated(boxes_xywh: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Return the boxes around rectangles that are rotated about their centers, float64 [A, 4].

    Args:
        boxes_xywh: [A, 4], before the rotation, (x, y, width, height) in pixels.
        degrees: [A], in either direction: the box is the same.
    """
    rotated = degrees % 180 != 0
    if not rotated.any():
        return boxes_xywh
    angles = np.deg2rad(degrees[rotated])[:, None]  # [R, 1], of R rotated boxes
    # Boxes that are not finite are skipped later.
    with np.errstate(over="ignore", invalid="ignore"):
        corners, sizes = np.split(boxes_xywh[rotated], 2, axis=1)  # [R, 2], [R, 2]
        around = sizes * abs(np.cos(angles)) + sizes[:, ::-1] * abs(np.sin(angles))  # [R, 2]
        replaced = boxes_xywh.copy()
        replaced[rotated] = np.hstack([corners + (sizes - around) / 2, around])
    return replaced


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that fits into an array. JSON has integers of any length."""
    if isinstance(value, float):  # first, since almost all of the millions of values are
        return True
    # `true` is an int in Python, but no number in JSON.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _shorten(value: Any) -> str:
    """Return a value as text for a one-line message."""
    return repr(value)[:80]
