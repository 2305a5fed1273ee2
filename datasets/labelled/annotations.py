"""Boxes and labels of a whole dataset in a few NumPy arrays, and the parser of COCO annotation files.

Dataloader workers share arrays with the main process. Python objects would be copied into each worker, since reading
one writes to its reference count.

Shapes: I images, A annotated objects (boxes) of all images.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.box_formats import Misfits, exceeds_image
from datasets.labelled.segmentations import SegmentationTexts, decode_segmentations, find_empty
from util.errors import UserError
from util.gc_paused import gc_paused
from util.logger import log

Record = dict[str, Any]

# Kind of finding (a key of `datasets.labelled.checks.KINDS`) -> (ids, file names) of K findings.
# ids: int64 [K, 2], annotation id and image id; -1 if there is no annotation id. file names: [K].
Findings = dict[str, tuple[np.ndarray, PackedStrings]]

ID_LIMIT = 2**53  # evaluators store ids in float64, which has 53 bits for integers

# Matches a "segmentation" whose value is a list. The match ends at the last bracket before the next key or the end of
# the object. It cannot start inside a string: quotes in a JSON string are escaped.
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')

# COCO marks 1.2 % of its objects as crowds. More than this fraction are probably single objects: some programs write
# `iscrowd` 1 for every mask that is run-length encoded.
MAX_CROWD_FRACTION = 0.1

# `area` is that of the mask, which is drawn on whole pixels and may be a little larger than the box. Beyond this factor
# it is a mistake.
MAX_AREA_RATIO = 2.0


@dataclass(kw_only=True)
class Annotations:
    """Images, sorted by id, with their objects. The objects of image i are the rows offsets[i] to offsets[i + 1] - 1.

    Crowds, objects to be ignored and boxes without area are not among the objects; crowds of panoptic data are.

    Attributes:
        source: file or folder that error messages name.
        file_names: [I], relative to the image folder.
        image_ids: int64 [I].
        sizes_hw: int64 [I, 2], (height, width) in pixels; 0 if the file does not say.
        offsets: int64 [I + 1], first row of each image.
        boxes_xyxy_abs: float32 [A, 4], (x0, y0, x1, y1) in pixels, not clipped to the image.
        labels: int64 [A].
        areas: float32 [A], in square pixels.
        class_names: label -> name.
        findings: what is wrong with entries of the file, whether they were skipped or not.
        difficult: bool [A]; None if the format has no such mark.
        subset: which part of the images this is, as text; empty for all images.
        ids: int64 [A], annotation ids of the file (VOC: the number of the object in its XML file); -1 if it has none.
        image_notes: kind of finding -> image id -> what was found, for findings in images that need a text.
        segmentations: int64 [A], the number of each object's text in `segmentation_texts`; -1 if it has no
            segmentation. None: masks were not read.
        segmentation_texts: JSON of the segmentations, see `datasets.labelled.segmentations`.
        crowds: bool [A]; None if crowds are not among the objects.
        misfits: boxes of the whole file that do not fit into their images.
    """

    source: str
    file_names: PackedStrings
    image_ids: np.ndarray
    sizes_hw: np.ndarray
    offsets: np.ndarray
    boxes_xyxy_abs: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    class_names: dict[int, str]
    findings: Findings = field(default_factory=dict)
    difficult: np.ndarray | None = None
    subset: str = ""
    ids: np.ndarray | None = None
    image_notes: dict[str, dict[int, str]] = field(default_factory=dict)
    segmentations: np.ndarray | None = None
    segmentation_texts: PackedStrings = field(default_factory=lambda: PackedStrings([]))
    crowds: np.ndarray | None = None
    misfits: Misfits = field(default_factory=Misfits)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def image_indices(self) -> np.ndarray:
        """Image index of each object, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def target(self, index: int, size_hw: tuple[int, int]) -> Record:
        """Return the target of one image, before transforms, with the keys of DETR.

        Args:
            size_hw: (height, width) of the decoded image in pixels.

        Returns:
            For N objects: `boxes` float32 [N, 4], (x0, y0, x1, y1) in pixels, clipped to the image; `labels` int64 [N];
            `area` float32 [N]; `iscrowd` int64 [N]; `image_id` int64 [1]; `orig_size` and `size` int64 [2]; `masks`
            uint8 [N, H, W], if masks were read.

        Raises:
            SegmentationError: a segmentation can't be decoded.
        """
        rows = slice(self.offsets[index], self.offsets[index + 1])
        height, width = size_hw
        limit = np.array([width, height, width, height], dtype=np.float32)
        boxes = np.clip(self.boxes_xyxy_abs[rows], 0, limit)  # [N, 4]

        # If the file gives no image size, only now is it known which boxes are outside their image.
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)  # [N]
        kept = np.arange(rows.start, rows.stop)[keep]
        target = self.target_of_rows(index, kept, boxes[keep], size_hw)
        if self.segmentations is not None:
            masks = decode_segmentations(self.texts_of(kept), boxes[keep], size_hw, self.ids[kept])
            target["masks"] = torch.from_numpy(masks)  # [N, H, W]
        return target

    def target_of_rows(
        self, index: int, rows: np.ndarray, boxes_xyxy_abs: np.ndarray, size_hw: tuple[int, int]
    ) -> Record:
        """Return the target of one image with some of its objects: their rows [N] and boxes float32 [N, 4]."""
        size = torch.tensor(size_hw)
        crowds = np.zeros(len(rows), bool) if self.crowds is None else self.crowds[rows]
        return {
            "boxes": torch.from_numpy(boxes_xyxy_abs),
            "labels": torch.from_numpy(self.labels[rows]),
            "image_id": torch.tensor([int(self.image_ids[index])]),
            "area": torch.from_numpy(self.areas[rows]),
            "iscrowd": torch.from_numpy(crowds.astype(np.int64)),
            "orig_size": size,
            "size": size.clone(),
        }

    def texts_of(self, rows: np.ndarray) -> list[str | None]:
        """Return the JSON text of the segmentation of some objects; None for an object without one."""
        numbers = self.segmentations[rows].tolist()
        return [self.segmentation_texts[number] if number >= 0 else None for number in numbers]

    def select(self, images: np.ndarray) -> "Annotations":
        """Return the annotations of some images: their indices [J], in this order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        rows = np.concatenate(spans or [np.arange(0)])  # np.concatenate needs at least one array
        counts = np.diff(self.offsets)[images]  # [J]
        return replace(
            self,
            file_names=PackedStrings(self.file_names[i] for i in images),
            image_ids=self.image_ids[images],
            sizes_hw=self.sizes_hw[images],
            offsets=np.concatenate([[0], np.cumsum(counts)]),  # [J + 1]
            boxes_xyxy_abs=self.boxes_xyxy_abs[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            difficult=None if self.difficult is None else self.difficult[rows],
            ids=None if self.ids is None else self.ids[rows],
            segmentations=None if self.segmentations is None else self.segmentations[rows],
            crowds=None if self.crowds is None else self.crowds[rows],
        )

    def fingerprint(self) -> str:
        """Return a line that changes whenever images, boxes or labels change. Each run records it."""
        digest = hashlib.sha256(self.file_names.digest().encode())
        for array in (
            self.image_ids,
            self.offsets,
            self.boxes_xyxy_abs,
            self.labels,
            self.difficult,
            self.segmentations,
        ):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        if self.segmentations is not None:
            digest.update(self.segmentation_texts.digest().encode())

        subset = f"{self.subset}, " if self.subset else ""
        return f"{subset}{len(self)} images, {len(self.labels)} boxes, {digest.hexdigest()[:16]}"

    def to_coco(self) -> Record:
        """Return the content of a COCO detection file with the same images, objects and classes.

        Labels become category ids. Annotations are numbered from 1.
        """
        image_id_of_object = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
        boxes = self.boxes_xyxy_abs.astype(np.float64).tolist()
        objects = zip(
            image_id_of_object, self.labels.tolist(), boxes, self.areas.tolist(), strict=True
        )
        images = zip(self.image_ids.tolist(), self.sizes_hw.tolist(), strict=True)
        return {
            "images": [
                {"id": image_id, "file_name": self.file_names[i], "height": height, "width": width}
                for i, (image_id, (height, width)) in enumerate(images)
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area,
                    "iscrowd": 0,
                }
                for i, (image_id, label, (x0, y0, x1, y1), area) in enumerate(objects, start=1)
            ],
            "categories": [
                {"id": label, "name": name} for label, name in sorted(self.class_names.items())
            ],
        }


# ------------------------------------------------------------------------------------------------------ reading a file


def read_coco(path: str) -> Annotations:
    """Read a COCO detection file.

    Raises:
        UserError: the file does not exist, is not JSON, or is malformed (see `parse_coco`).
    """
    with gc_paused():
        return parse_coco(read_json(path), path)


def read_json(path: str, segmentations: SegmentationTexts | None = None) -> Any:
    """Return the content of a JSON file in UTF-8 or UTF-16, with or without a byte order mark.

    Segmentations are two thirds of COCO's file and would become millions of Python objects, so they are replaced before
    parsing.

    Args:
        segmentations: collects their texts, which are replaced by their numbers. None: polygons become empty lists.

    Raises:
        UserError: the file does not exist or is not JSON.
    """
    try:
        with open(path, "rb") as file, gc_paused():
            try:
                if segmentations is not None:
                    return json.loads(segmentations.replace_in(file.read()))
                return json.loads(POLYGONS.sub(b'"segmentation":[]', file.read()))
            except ValueError:
                # Parse the unchanged file again, so that the error gives positions in the file itself.
                if segmentations is not None:
                    segmentations.clear()
                file.seek(0)
                return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: put the COCO annotations there") from error
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    # Deeply nested brackets exceed Python's recursion limit.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): is the download complete?") from error


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


def annotations_from_columns(
    columns: dict[str, np.ndarray],
    *,
    source: str,
    file_names: PackedStrings,
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    class_names: dict[int, str],
    segmentation_texts: PackedStrings | None = None,
) -> Annotations:
    """Build `Annotations` from one array per field. Objects are skipped as in `parse_coco`.

    Args:
        columns: `id` int64 [A], annotation id, for messages; `image` int64 [A], image id; `label` int64 [A]; `crowd`
            bool [A]; `box` float32 [A, 4], (x0, y0, x1, y1) in pixels; `area` float32 [A], in square pixels;
            `difficult` bool [A], if the format has it. For findings, also optional, bool [A]: `ignored`, crowds that
            the file calls `ignore`; `rotated`, boxes around a rotated rectangle; `bad_area`, areas that were replaced.
            With masks also `segmentation` int64 [A], numbers in `segmentation_texts`. Crowds that are objects are
            marked in `kept_crowd` bool [A] instead of `crowd`.
        file_names, image_ids, sizes_hw: of the images, as in `Annotations`; sorted by id.
    """
    if segmentation_texts is not None:
        unsegmented = find_empty(segmentation_texts, columns["segmentation"])  # [A]
        columns["unsegmented"] = unsegmented
        columns["segmentation"] = np.where(unsegmented, -1, columns["segmentation"])
    category_ids = np.array(list(class_names), dtype=np.int64)
    columns, findings, misfits = _filter_objects(
        columns, image_ids, sizes_hw, file_names, category_ids, source
    )
    if len(columns["id"]):
        counts = np.bincount(columns["image"], minlength=len(image_ids))  # [I]
    else:
        counts = np.zeros(len(image_ids), int)

    return Annotations(
        source=source,
        file_names=file_names,
        image_ids=image_ids,
        sizes_hw=sizes_hw,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),  # [I + 1]
        boxes_xyxy_abs=columns["box"],
        labels=columns["label"],
        areas=columns["area"],
        class_names=_add_unlisted_classes(class_names, columns["label"], source),
        findings=findings,
        misfits=misfits,
        difficult=columns.get("difficult"),
        ids=columns["id"],
        crowds=columns.get("kept_crowd"),
        segmentations=None if segmentation_texts is None else columns["segmentation"],
        segmentation_texts=PackedStrings([]) if segmentation_texts is None else segmentation_texts,
    )


# --------------------------------------------------------------------------------------------------- fields of an entry


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


def _shorten(value: Any) -> str:
    """Return a value as text for a one-line message."""
    return repr(value)[:80]


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that fits into an array. JSON has integers of any length."""
    if isinstance(value, float):  # first, since almost all of the millions of values are
        return True
    # `true` is an int in Python, but no number in JSON.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


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


def _parse_rotation(annotation: Record) -> float:
    """Return CVAT's angle in degrees, 0 if there is none."""
    attributes = annotation.get("attributes")
    value = attributes.get("rotation") if isinstance(attributes, dict) else None
    return value if _is_number(value) and np.isfinite(value) else 0.0


def _parse_annotation_id(annotation: Record) -> int:
    """Return the annotation id, -1 if there is none. Only messages use it, so any value is accepted."""
    value = annotation.get("id")
    return value if isinstance(value, int) and _is_number(value) else -1


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


def _parse_bbox(annotation: Record, source: str) -> Sequence[float]:
    """Return [x, y, width, height] in pixels."""
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(
            f"{source}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has bbox "
            f"{_shorten(bbox)}: it must be [x, y, width, height] in pixels, numbers without quotes"
        )
    return bbox


# ------------------------------------------------------------------------------------------------- objects to train on


def _filter_objects(
    columns: dict[str, np.ndarray],
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    file_names: PackedStrings,
    category_ids: np.ndarray,
    source: str,
) -> tuple[dict[str, np.ndarray], Findings, Misfits]:
    """Return (columns of the objects to train on, findings, boxes that do not fit into their images).

    Log a warning for each kind of skipped object.

    The returned objects are grouped by image. Their column `image` has image indices instead of ids.
    """
    if not len(columns["id"]):
        return columns, {}, Misfits()

    ids = np.column_stack([columns["id"], columns["image"]])  # [A, 2]
    boxes = columns["box"]

    # searchsorted returns I for ids above the last one: clip it to a valid index, then compare the ids.
    image = np.searchsorted(image_ids, columns["image"]).clip(max=max(len(image_ids) - 1, 0))  # [A]
    if len(image_ids):
        listed = image_ids[image] == columns["image"]  # [A]
        sizes = sizes_hw[image]  # [A, 2]
    else:
        listed = np.zeros(len(image), bool)
        sizes = np.zeros((len(image), 2))

    finite = np.isfinite(boxes).all(1)  # [A]
    candidate = listed & finite & ~columns["crowd"]
    visible = has_visible_area(boxes, sizes)
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    _warn_skipped(~listed, "of images that the file does not list", ids, source)
    _warn_skipped(listed & ~finite, "with a box that is not finite", ids, source)
    _warn_skipped(
        candidate & ~visible, "with a box without area, or outside its image,", ids, source
    )

    ignored, rotated, bad_area, unsegmented = (
        columns.get(name, np.zeros(len(image), bool))
        for name in ("ignored", "rotated", "bad_area", "unsegmented")
    )
    crowd = listed & columns["crowd"] & ~ignored
    crowd_kind = "many crowds" if _are_many_crowds(crowd, columns["label"]) else "crowd"
    masks = {
        "image not listed": ~listed,
        "box not finite": listed & ~finite,
        "box without area": candidate & flat,
        "box outside image": candidate & ~visible & ~flat,
        "box partly outside": candidate & visible & exceeds_image(boxes, sizes),
        "category not listed": candidate & ~np.isin(columns["label"], category_ids),
        crowd_kind: crowd,
        "marked ignore": listed & ignored,
        "rotated box": candidate & visible & rotated,
        "area unusable": candidate & visible & bad_area,
        "no segmentation": candidate & visible & unsegmented,
    }
    findings = {}
    for kind, mask in masks.items():
        if mask.any():
            names = (file_names[image[i]] if listed[i] else "" for i in np.flatnonzero(mask))
            findings[kind] = (ids[mask], PackedStrings(names))

    skipped = listed & ~columns["crowd"] & ~(finite & visible)
    misfit = skipped | masks["box partly outside"]
    misfits = Misfits(
        total=int((listed & ~columns["crowd"]).sum()),
        skipped=skipped[misfit],
        boxes_xyxy_abs=boxes[misfit],
        sizes_hw=sizes[misfit],
        ids=ids[misfit],
        files=PackedStrings(file_names[image[i]] for i in np.flatnonzero(misfit)),
    )

    # A stable sort keeps the objects of an image in the order of the file.
    rows = np.flatnonzero(candidate & visible)
    rows = rows[np.argsort(image[rows], kind="stable")]
    columns = {key: column[rows] for key, column in {**columns, "image": image}.items()}
    return columns, findings, misfits


def _are_many_crowds(crowd: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether more objects are marked as crowds than in COCO: of all, or of one class.

    Args:
        crowd: bool [A].
        labels: int64 [A].
    """
    if not crowd.any():
        return False
    classes, inverse = np.unique(labels, return_inverse=True)  # [C], [A]
    objects = np.bincount(inverse, minlength=len(classes))  # [C]
    crowds = np.bincount(inverse[crowd], minlength=len(classes))  # [C]
    most_of_a_class = (
        (crowds > objects / 2) & (crowds > 1)
    ).any()  # a rare class may have one crowd
    return bool(crowd.mean() > MAX_CROWD_FRACTION or most_of_a_class)


def _warn_skipped(skipped: np.ndarray, what: str, ids: np.ndarray, source: str) -> None:
    if skipped.any():
        annotation_id, image_id = ids[np.flatnonzero(skipped)[0]]
        count = int(skipped.sum())
        log.warning(
            "%s: %d %s %s %s skipped, the first is annotation %d of image %d",
            source,
            count,
            "annotation" if count == 1 else "annotations",
            what,
            "is" if count == 1 else "are",
            annotation_id,
            image_id,
        )


def has_visible_area(boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Return whether a part of each box is inside its image, bool [A].

    Args:
        boxes_xyxy_abs: [A, 4], (x0, y0, x1, y1) in pixels.
        sizes_hw: [A, 2], size of each box's image. A size of 0 is unknown: there is no upper limit.
    """
    limit = np.where(sizes_hw > 0, sizes_hw, np.inf)[:, ::-1]  # [A, 2], (width, height)
    low = np.clip(boxes_xyxy_abs[:, :2], 0, limit)
    high = np.clip(boxes_xyxy_abs[:, 2:], 0, limit)
    return (high > low).all(1)


def _add_unlisted_classes(names: dict[int, str], labels: np.ndarray, source: str) -> dict[int, str]:
    """Add the categories that are used but not listed. Their name is their id."""
    unlisted = sorted(set(np.unique(labels).tolist()) - set(names))
    if unlisted:
        log.warning(
            "%s: category ids %s are used but not listed: they are trained but not evaluated",
            source,
            unlisted,
        )
    return {**names, **{label: str(label) for label in unlisted}}
