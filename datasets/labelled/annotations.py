"""Boxes and labels of a whole dataset in a few arrays: workers share them, where Python objects would be copied."""

import contextlib
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from datasets.images.packed_strings import PackedStrings
from util.errors import UserError
from util.logger import log

Record = dict[str, Any]
# kind (a key of datasets.labelled.checks.KINDS) -> (ids int64 [K, 2]: annotation, -1 where there is none, and image;
# file names [K])
Findings = dict[str, tuple[np.ndarray, PackedStrings]]
ID_LIMIT = 2**53  # evaluators keep ids in float64
# The value of such a key ends at the last bracket before the next key or the end of its object. A text can't hold the
# key: its quotes would be escaped.
SEGMENTATION = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')
BOX_TOLERANCE = (
    1.0  # pixels that a box may stand over its image unnoticed: published boxes are rounded
)


@dataclass
class Annotations:
    """Images in the order of their ids; the objects of image i are rows offsets[i] to offsets[i + 1].

    image_ids int64 [I]; sizes_hw int64 [I, 2], 0 where the file does not say; boxes_xyxy_abs float32 [A, 4], not
    clipped; labels int64 [A]; areas float32 [A] in pixels. Crowds and boxes without area are not among the objects.
    findings: what is wrong with entries of the file, skipped or not. difficult: bool [A], None where the format has no
    such mark.
    subset: which part of the images this is, empty: all of them. ids: int64 [A], those that the file gives
    its objects (in VOC their numbers in their files), -1 where it has none.
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

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def image_indices(self) -> np.ndarray:
        """Index of its image for each object, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def target(self, index: int, size_hw: tuple[int, int]) -> Record:
        """The target of an image of this size before transforms: boxes (x0, y0, x1, y1) in pixels, clipped to it."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        height, width = size_hw
        boxes = np.clip(
            self.boxes_xyxy_abs[rows], 0, np.array([width, height, width, height], dtype=np.float32)
        )
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        size = torch.tensor(size_hw)
        return {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.from_numpy(self.labels[rows][kept]),
            "image_id": torch.tensor([int(self.image_ids[index])]),
            "area": torch.from_numpy(self.areas[rows][kept]),
            "iscrowd": torch.zeros(int(kept.sum()), dtype=torch.int64),
            "orig_size": size,
            "size": size.clone(),
        }

    def select(self, images: np.ndarray) -> "Annotations":
        """Only these images (indices [J], in this order)."""
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images] or [np.arange(0)]
        )
        counts = np.diff(self.offsets)[images]
        return replace(
            self,
            file_names=PackedStrings(self.file_names[i] for i in images),
            image_ids=self.image_ids[images],
            sizes_hw=self.sizes_hw[images],
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            boxes_xyxy_abs=self.boxes_xyxy_abs[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            difficult=None if self.difficult is None else self.difficult[rows],
            ids=None if self.ids is None else self.ids[rows],
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.file_names.digest().encode())
        for array in (
            self.image_ids,
            self.offsets,
            self.boxes_xyxy_abs,
            self.labels,
            self.difficult,
        ):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        drawn = f"{self.subset}, " if self.subset else ""
        return f"{drawn}{len(self)} images, {len(self.labels)} boxes, {digest.hexdigest()[:16]}"

    def to_coco(self) -> Record:
        """The content of a COCO detection file with the same images, objects and classes; labels are the category
        ids.
        """
        image_indices = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
        boxes = self.boxes_xyxy_abs.astype(np.float64)
        rows = zip(
            image_indices, self.labels.tolist(), boxes.tolist(), self.areas.tolist(), strict=True
        )
        return {
            "images": [
                {"id": number, "file_name": self.file_names[i], "height": height, "width": width}
                for i, (number, (height, width)) in enumerate(
                    zip(self.image_ids.tolist(), self.sizes_hw.tolist(), strict=True)
                )
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area,
                    "iscrowd": 0,
                }
                for i, (image, label, (x0, y0, x1, y1), area) in enumerate(rows, start=1)
            ],
            "categories": [
                {"id": label, "name": name} for label, name in sorted(self.class_names.items())
            ],
        }


def read_coco(path: str) -> Annotations:
    """Reads a COCO detection file.

    Raises:
        UserError: no such file, not JSON, or what makes training wrong (see `parse_coco`).
    """
    with gc_paused():
        return parse_coco(read_json(path), path)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Python's collector of cycles looks at all objects again and again while millions are made, and none of JSON's is
    in a cycle: for COCO with its polygons that is three quarters of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: str) -> Any:
    """The content of a JSON file in UTF-8, or in the UTF-16 and with the byte order mark that some programs write.

    Polygons, which are two thirds of COCO's file and which nothing here looks at, become empty lists before they become
    objects.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        with open(path, "rb") as file, gc_paused():
            try:
                return json.loads(SEGMENTATION.sub(b'"segmentation":[]', file.read()))
            except ValueError:  # once more, so that the message counts bytes as the file does
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): is the download complete?") from error


def parse_coco(content: Record, source: str) -> Annotations:
    """Arrays from the content of a COCO detection file; `source` names it in messages.

    Labels are the raw category ids. A missing `iscrowd` counts as 0, a missing `area` is that of the box. Crowds are
    skipped. Skipped with a warning and their number: boxes that are not finite, without area or outside their image,
    and annotations of unlisted images.

    Raises:
        UserError: parts are missing, entries are no objects, ids are no integers from 0 on or not unique, a file name,
            size, bbox or iscrowd is malformed.
    """
    images, annotations, categories = (
        _records(content, key, source) for key in ("images", "annotations", "categories")
    )
    images = sorted(images, key=lambda image: _parse_id(image, "id", source))
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    same = image_ids[1:][image_ids[1:] == image_ids[:-1]]
    if len(same):
        raise UserError(
            f"{source}: two images have the same id {same[0]}: ids must be unique; correct or remove one"
        )
    file_names = PackedStrings(_parse_file_name(image, source) for image in images)
    sizes = np.array([_parse_size_hw(image, source) for image in images], dtype=np.int64).reshape(
        -1, 2
    )
    columns = _parse_columns(annotations, source)
    return annotations_from_columns(
        columns, source, file_names, image_ids, sizes, _parse_class_names(categories, source)
    )


def _parse_class_names(categories: Sequence[Record], source: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        number = _parse_id(category, "id", source)
        name = str(category.get("name", number))
        if names.setdefault(number, name) != name:
            raise UserError(
                f"{source}: the categories '{names[number]}' and '{name}' have the same id {number}: ids must be "
                "unique; correct or remove one"
            )
    return names


def annotations_from_columns(
    columns: dict[str, np.ndarray],
    source: str,
    file_names: PackedStrings,
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    class_names: dict[int, str],
) -> Annotations:
    """From one array a field, a row an object: `id` (for messages) and `image` int64, its id; `label` int64; `crowd`
    bool; `box` float32 [A, 4], (x0, y0, x1, y1) in pixels; `area` float32; `difficult` bool where the format has it.

    image_ids int64 [I] sorted, sizes_hw int64 [I, 2] and file_names [I] are of the images. Objects are skipped as in
    `parse_coco`.
    """
    listed = np.array(list(class_names), dtype=np.int64)
    rows, findings = _filter_rows(columns, image_ids, sizes_hw, file_names, listed, source)
    columns = {key: column[rows] for key, column in columns.items()}
    counts = (
        np.bincount(columns["image"], minlength=len(image_ids))
        if len(rows)
        else np.zeros(len(image_ids), int)
    )
    return Annotations(
        source,
        file_names,
        image_ids,
        sizes_hw,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        columns["box"],
        columns["label"],
        columns["area"],
        _add_unlisted_classes(class_names, columns["label"], source),
        findings,
        columns.get("difficult"),
        ids=columns["id"],
    )


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
    return repr(value)[:80]


def _is_number(value: Any) -> bool:
    """Whether it is a number that arrays can hold: JSON has integers of any length."""
    return isinstance(value, float) or isinstance(value, int) and abs(value) < 2**63


def _parse_size_hw(image: Record, source: str) -> tuple[int, int]:
    """(height, width), 0 where the file does not say."""
    size = image.get("height") or 0, image.get("width") or 0
    for name, value in zip(("height", "width"), size, strict=True):
        if not _is_number(value) or not 0 <= value < 2**31:
            raise UserError(
                f"{source}: image {image['id']} has {name} {_shorten(value)}: it must be in pixels; correct it"
            )
    return int(size[0]), int(size[1])


def _parse_id(record: Record, key: str, source: str) -> int:
    value = record.get(key)
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
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: image {image['id']} has the file_name {_shorten(name)}, which no file can have: correct it"
        ) from error
    return name


def _parse_columns(annotations: Sequence[Record], source: str) -> dict[str, np.ndarray]:
    """One array a field, rows as in the file; boxes as (x0, y0, x1, y1), added up in float32 as published."""
    boxes_xywh = [_parse_bbox(annotation, source) for annotation in annotations]
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is skipped as such
        box = np.array(boxes_xywh, dtype=np.float32).reshape(-1, 4)
    box_area = box[:, 2] * box[:, 3]
    area = np.array(
        [_parse_number(annotation.get("area"), np.nan) for annotation in annotations],
        dtype=np.float32,
    )
    box[:, 2:] += box[:, :2]
    return {
        "id": np.array(
            [_parse_annotation_id(annotation) for annotation in annotations], dtype=np.int64
        ),
        "image": np.array([_parse_id(a, "image_id", source) for a in annotations], dtype=np.int64),
        "label": np.array(
            [_parse_id(a, "category_id", source) for a in annotations], dtype=np.int64
        ),
        "crowd": np.array([_parse_iscrowd(a, source) for a in annotations], dtype=bool),
        "box": box,
        "area": np.where(np.isnan(area), box_area, area).astype(np.float32),
    }


def _parse_number(value: Any, default: float) -> float:
    return value if _is_number(value) else default


def _parse_iscrowd(annotation: Record, source: str) -> bool:
    """Crowds are skipped without a warning, so that a text such as "0" must not pass for one."""
    value = annotation.get("iscrowd") or 0
    if value not in (0, 1):
        raise UserError(
            f"{source}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has iscrowd "
            f"{_shorten(value)}: it must be 0 or 1"
        )
    return bool(value)


def _parse_annotation_id(annotation: Record) -> int:
    """Only for messages: -1 where there is none."""
    number = annotation.get("id")
    return number if isinstance(number, int) and _is_number(number) else -1


def _parse_bbox(annotation: Record, source: str) -> Sequence[float]:
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(
            f"{source}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has bbox "
            f"{_shorten(bbox)}: it must be [x, y, width, height] in pixels"
        )
    return bbox


def _filter_rows(
    columns: dict[str, np.ndarray],
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    file_names: PackedStrings,
    listed_ids: np.ndarray,
    source: str,
) -> tuple[np.ndarray, Findings]:
    """(rows to train on, grouped by image in the order of the file; what was found). Turns column `image` from ids into
    indices.
    """
    if not len(columns["id"]):
        return np.arange(0), {}
    ids = np.column_stack([columns["id"], columns["image"]])
    order = np.searchsorted(image_ids, columns["image"]).clip(max=max(len(image_ids) - 1, 0))
    listed = image_ids[order] == columns["image"] if len(image_ids) else np.zeros(len(order), bool)
    finite = np.isfinite(columns["box"]).all(1)
    usable = listed & finite & ~columns["crowd"]
    sizes = sizes_hw[order] if len(sizes_hw) else np.zeros((len(order), 2))
    with_area = has_visible_area(columns["box"], sizes)
    _warn_skipped(~listed, "of images that the file does not list", ids, source)
    _warn_skipped(listed & ~finite, "with a box that is not finite", ids, source)
    _warn_skipped(
        usable & ~with_area, "with a box without area, or outside its image,", ids, source
    )
    flat = ~(columns["box"][:, 2:] > columns["box"][:, :2]).all(1)
    found = {
        "image not listed": ~listed,
        "box not finite": listed & ~finite,
        "box without area": usable & flat,
        "box outside image": usable & ~with_area & ~flat,
        "box partly outside": usable & with_area & _exceeds_image(columns["box"], sizes),
        "category not listed": usable & ~np.isin(columns["label"], listed_ids),
    }
    findings = {}
    for kind, mask in found.items():
        if mask.any():
            names = PackedStrings(
                file_names[order[i]] if listed[i] else "" for i in np.flatnonzero(mask)
            )
            findings[kind] = (ids[mask], names)
    columns["image"] = order
    rows = np.flatnonzero(usable & with_area)
    return rows[np.argsort(order[rows], kind="stable")], findings


def _warn_skipped(dropped: np.ndarray, what: str, ids: np.ndarray, source: str) -> None:
    if dropped.any():
        annotation, image = ids[np.flatnonzero(dropped)[0]]
        log.warning(
            "%s: %d annotations %s are skipped, the first is annotation %d of image %d",
            source,
            dropped.sum(),
            what,
            annotation,
            image,
        )


def _exceeds_image(boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Whether a box ends more than BOX_TOLERANCE outside its image (size 0: not known, no limit)."""
    limit = np.where(sizes_hw > 0, sizes_hw, np.inf)[:, ::-1]
    return (boxes_xyxy_abs[:, :2] < -BOX_TOLERANCE).any(1) | (
        boxes_xyxy_abs[:, 2:] > limit + BOX_TOLERANCE
    ).any(1)


def has_visible_area(boxes_xyxy_abs: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """Whether something of the box is left inside its image (size 0: not known, no limit)."""
    limit = np.where(sizes_hw > 0, sizes_hw, np.inf)[:, ::-1]
    low = np.clip(boxes_xyxy_abs[:, :2], 0, limit)
    high = np.clip(boxes_xyxy_abs[:, 2:], 0, limit)
    return (high > low).all(1)


def _add_unlisted_classes(names: dict[int, str], labels: np.ndarray, source: str) -> dict[int, str]:
    unnamed = sorted(set(np.unique(labels).tolist()) - set(names))
    if unnamed:
        log.warning(
            "%s: category ids %s are used but not listed: they are trained but not evaluated",
            source,
            unnamed,
        )
    return {**names, **{label: str(label) for label in unnamed}}
