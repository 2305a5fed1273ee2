"""COCO panoptic data: a JSON file that lists the segments of each image, and a PNG of segment ids.

Labels are category ids of things and stuff. Boxes, and masks with `--masks`, come from the PNG. Crowd segments are
objects to train on, as published.

Shapes: I annotated images, S segments of all images, N objects of an image of H x W pixels.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.evaluators.coco import GroundTruth, build_ground_truth
from datasets.evaluators.combined import CombinedEvaluator
from datasets.evaluators.detections import DetectionEvaluator
from datasets.evaluators.panoptic import PanopticEvaluator
from datasets.images.image_folder import pillow_warnings
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import (
    CocoDetection,
    coco_files,
    coco_root,
    filter_annotations,
    has_raw_ids,
    labelled_transforms,
    read_annotations,
)
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.segmentations import SegmentationTexts
from datasets.sample import BadImageError, Target
from util.checkpoints.classes import Classes
from util.coco import NUM_PANOPTIC_CLASSES
from util.errors import UserError
from util.gc_paused import gc_paused
from util.logger import log
from util.masks import encode_mask
from util.settings import Settings

Record = dict[str, Any]

MAX_ID = 2**24  # an id is R + 256 G + 65536 B
VOID = 0  # the id of pixels without a segment
PANOPTIC_FOLDER = "panoptic_eval"  # of predicted segments in a run's folder; the published name


@dataclass(kw_only=True)
class PanopticAnnotations:
    """The segments of all images in a panoptic file. Those of image i are offsets[i] to offsets[i + 1] - 1.

    Attributes:
        source: the file.
        image_ids: int64 [I], sorted.
        file_names: [I], of the PNG files.
        offsets: int64 [I + 1].
        ids, category_ids: int64 [S].
        crowds: bool [S].
        boxes_xywh: float64 [S, 4], as in the file.
        areas: float64 [S], in pixels; NaN if the file does not say.
    """

    source: str
    image_ids: np.ndarray
    file_names: PackedStrings
    offsets: np.ndarray
    ids: np.ndarray
    category_ids: np.ndarray
    crowds: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray

    def index_of(self, image_id: int) -> int:
        """Return the index of an image.

        Raises:
            KeyError: the file has no annotation of it.
        """
        index = int(np.searchsorted(self.image_ids, image_id))
        if index == len(self.image_ids) or self.image_ids[index] != image_id:
            raise KeyError(image_id)
        return index

    def file_name_of(self, image_id: int) -> str:
        """Return the name of the PNG file of an image."""
        return self.file_names[self.index_of(image_id)]

    def segments_info_of(self, image_id: int) -> list[Record]:
        """Return the segments of an image, with the keys of the file: id, category_id, iscrowd, bbox and area."""
        index = self.index_of(image_id)
        segments = []
        for row in range(self.offsets[index], self.offsets[index + 1]):
            area = float(self.areas[row])
            segments.append(
                {
                    "id": int(self.ids[row]),
                    "category_id": int(self.category_ids[row]),
                    "iscrowd": int(self.crowds[row]),
                    "bbox": [_as_written(value) for value in self.boxes_xywh[row].tolist()],
                    **({} if np.isnan(area) else {"area": _as_written(area)}),
                }
            )
        return segments


def _as_written(value: float) -> float | int:
    return int(value) if value.is_integer() else value


class CocoPanoptic(CocoDetection):
    """Images with a PNG of segment ids.

    Attributes:
        things: category id -> whether it is a thing; otherwise it is stuff.
        panoptic_folder: of the PNG files.
        panoptic_annotations: all segments in the file.
    """

    things: dict[int, bool]
    panoptic_folder: str
    panoptic_annotations: PanopticAnnotations
    settings: Settings
    image_set: str

    def segments_info_of(self, image_id: int) -> list[Record]:
        """Return the segments that the file lists for an image."""
        return self.panoptic_annotations.segments_info_of(image_id)

    def segments(self, index: int) -> tuple[np.ndarray, list[Record]]:
        """Return (segment ids int32 [H, W], 0 where there is none; the segments that the file lists).

        Raises:
            BadImageError: the PNG can't be read.
        """
        ids = read_segment_ids(self.panoptic_path(index))
        return ids, self.segments_info_of(int(self.annotations.image_ids[index]))

    def _segments_of_image(self, image_id: int) -> tuple[np.ndarray, list[Record]]:
        """Return `segments` of an image for evaluation.

        An image whose PNG can't be read has no pixels of its segments. Loading it fails too, so it gets no prediction,
        and its segments count as missed.
        """
        index = int(np.searchsorted(self.annotations.image_ids, image_id))
        try:
            return self.segments(index)
        except BadImageError:  # reported when the image is loaded
            return np.zeros((1, 1), np.int32), self.segments_info_of(image_id)

    def evaluator(self, settings: Settings) -> DetectionEvaluator | CombinedEvaluator:
        """Build an evaluator of boxes and, with masks, of instance masks and panoptic segments."""
        coco = super().evaluator(settings)
        if not settings.masks:
            return coco
        folder = Path(settings.output_dir) / PANOPTIC_FOLDER if settings.output_dir else None
        image_ids = self.annotations.image_ids.tolist()
        panoptic = PanopticEvaluator(
            self.things, self.class_names, self._segments_of_image, image_ids, folder
        )
        return CombinedEvaluator(coco, panoptic)

    def panoptic_path(self, index: int) -> str:
        """Return the path of the PNG of an image."""
        image_id = int(self.annotations.image_ids[index])
        return os.path.join(self.panoptic_folder, self.panoptic_annotations.file_name_of(image_id))

    def target(self, index: int, size_hw: tuple[int, int]) -> Target:
        """Return the target of an image from its PNG, before transforms. Segments without pixels are dropped.

        Raises:
            BadImageError: the PNG can't be read, or has another size than the image.
        """
        ids = read_segment_ids(self.panoptic_path(index))  # [H, W]
        if ids.shape != size_hw:
            raise BadImageError(
                f"{size_hw[1]} x {size_hw[0]} pixels, but {self.panoptic_path(index)} has {ids.shape[1]} x "
                f"{ids.shape[0]}"
            )
        rows = np.arange(self.annotations.offsets[index], self.annotations.offsets[index + 1])
        masks = ids == self.annotations.ids[rows].astype(np.int32)[:, None, None]  # [N, H, W]
        found = masks.any((1, 2))  # [N]
        masks = masks[found]
        boxes = boxes_of_masks(masks, published=self.settings.reproduce_published)
        target = self.annotations.target_of_rows(index, rows[found], boxes, size_hw)
        if self.settings.masks:
            target["masks"] = torch.from_numpy(masks.view(np.uint8))
        return target

    def validate(self, image_set: str) -> None:
        super().validate(image_set)
        ids, names = self.annotations.findings.get(NO_PNG, (None, ()))
        if ids is None:
            return
        image_id = int(ids[0, 1])
        reason = self.annotations.image_notes[NO_PNG][image_id]
        what = f"{len(names)} images of {self.annotation_file} have no segments: image {image_id}, {reason}"
        if image_set != "train":
            raise UserError(f"{what}: add the files or remove the images from the annotations")
        log.warning("%s: they are skipped", what)

    @functools.cached_property
    def ground_truth(self) -> GroundTruth:
        """Boxes, and masks with `--masks`: of COCO's instance annotations if they are there, else of the things."""
        _, instances = coco_files(coco_root(self.settings), self.image_set)
        if os.path.exists(instances):
            _, ground_truth = read_annotations(instances, "val", self.settings, self.image_folder)
            selected = _select_images(ground_truth, self.annotations.image_ids)
            if len(selected["images"]) == len(self):
                return selected
            log.info("%s lacks images of %s: not used", instances, self.annotation_file)
        log.info("COCO metrics: the ground truth is the things of %s", self.annotation_file)
        segmentations = SegmentationTexts() if self.settings.masks else None
        return build_ground_truth(self._things_as_coco(), segmentations)

    def _things_as_coco(self) -> Record:
        """Return the content of a COCO detection file with the thing segments, crowds included."""
        images, annotations = [], []
        for index, image_id in enumerate(self.annotations.image_ids.tolist()):
            height, width = self.annotations.sizes_hw[index].tolist()
            ids = self._ids_or_none(index) if self.settings.masks else None
            if ids is not None:
                height, width = ids.shape
            images.append({"id": image_id, "height": height, "width": width})
            for segment in self.segments_info_of(image_id):
                if not self.things.get(segment["category_id"], False):
                    continue
                if ids is not None:
                    rle = encode_mask(ids == segment["id"])
                    segment["segmentation"] = {**rle, "counts": rle["counts"].decode()}
                annotations.append({**segment, "image_id": image_id})
        categories = [
            {"id": label, "name": name}
            for label, name in self.class_names.items()
            if self.things.get(label, False)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _ids_or_none(self, index: int) -> np.ndarray | None:
        try:
            return read_segment_ids(self.panoptic_path(index))
        except BadImageError:  # reported when the image is loaded
            return None


NO_PNG = "no panoptic segments"  # a kind of finding


def _select_images(ground_truth: GroundTruth, image_ids: np.ndarray) -> GroundTruth:
    """Return the ground truth of some images."""
    kept = set(image_ids.tolist())
    selected = {
        "images": [image for image in ground_truth["images"] if image["id"] in kept],
        "annotations": [item for item in ground_truth["annotations"] if item["image_id"] in kept],
    }
    return type(ground_truth)({**ground_truth, **selected})


def build_coco_panoptic(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> CocoPanoptic:
    """Build the dataset of the "train" or "val" images, with `settings.coco_panoptic_path` or COCO's own folder.

    Args:
        classes: meaning of the class head in a checkpoint, None for a new head.

    Raises:
        UserError: files are missing, or contain something that makes training or evaluation wrong.
    """
    if classes is not None and not has_raw_ids(classes):
        raise UserError(
            f"{classes.source} numbers its classes without gaps, --dataset_file coco_panoptic uses the ids unchanged: "
            "train a detector on panoptic data first"
        )
    root = coco_root(settings)
    image_folder, _ = coco_files(root, image_set)
    panoptic_root = settings.coco_panoptic_path or root
    name = f"panoptic_{image_set}2017"
    path = os.path.join(panoptic_root, "annotations", f"{name}.json")
    folder = os.path.join(panoptic_root, name)
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} is not a folder: --coco_panoptic_path takes one with annotations, panoptic_train2017 and "
            "panoptic_val2017"
        )
    annotations, segments, things = read_panoptic(path)
    annotations = filter_annotations(annotations, image_folder, image_set, settings)
    dataset = CocoPanoptic(
        image_folder,
        _drop_missing_pngs(annotations, segments, folder),
        labelled_transforms(image_set, settings),
        num_classes=NUM_PANOPTIC_CLASSES,
        seed=settings.seed,
    )
    dataset.things, dataset.panoptic_folder = things, folder
    dataset.panoptic_annotations = segments
    dataset.settings, dataset.image_set = settings, image_set
    return dataset


# ------------------------------------------------------------------------------------------------------------ PNG files


def read_segment_ids(path: str) -> np.ndarray:
    """Read a PNG of segment ids, int32 [H, W].

    Raises:
        BadImageError: there is no such file, or it is not an RGB image.
    """
    try:
        with pillow_warnings(), Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise BadImageError(
                    f"{path} is not an RGB image, but of Pillow's mode {image.mode}"
                )
            colors = np.asarray(image)[..., :3]  # [H, W, 3]
    except FileNotFoundError as error:
        raise BadImageError(f"{path} does not exist") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # Pillow raises all of these for damaged files
        raise BadImageError(f"{path} can't be decoded") from error
    # R + 256 G + 65536 B are the bytes of a little-endian integer.
    padded = np.zeros((*colors.shape[:2], 4), np.uint8)  # [H, W, 4]
    padded[..., :3] = colors
    return padded.view("<i4")[..., 0]


def boxes_of_masks(masks: np.ndarray, published: bool = False) -> np.ndarray:
    """Return the boxes around masks, float32 [N, 4], (x0, y0, x1, y1) in pixels.

    Args:
        masks: bool [N, H, W]; each has a pixel.
        published: as in the published code, a box ends at its last pixel instead of after it: it is one pixel short,
            and has no area around a line.
    """
    height, width = masks.shape[1:]
    columns, rows = masks.any(1), masks.any(2)  # [N, W], [N, H]
    short = int(published)
    edges = [
        columns.argmax(1),
        rows.argmax(1),
        width - columns[:, ::-1].argmax(1) - short,
        height - rows[:, ::-1].argmax(1) - short,
    ]
    return np.stack(edges, axis=1).astype(np.float32)


def _drop_missing_pngs(
    annotations: Annotations, segments: PanopticAnnotations, folder: str
) -> Annotations:
    """Return the annotations of the images with a PNG. The others are listed in `findings`.

    Raises:
        UserError: no image has one.
    """
    existing = set(os.listdir(folder))
    notes = {}
    for image_id in annotations.image_ids.tolist():
        try:
            name = segments.file_name_of(image_id)
        except KeyError:
            notes[image_id] = "it is not among 'annotations'"
            continue
        if name not in existing and not os.path.exists(os.path.join(folder, name)):
            notes[image_id] = f"{os.path.join(folder, name)} does not exist"
    if not notes:
        return annotations

    missing = np.isin(annotations.image_ids, list(notes))  # [I]
    if missing.all():
        image_id, reason = next(iter(notes.items()))
        raise UserError(
            f"none of {len(notes)} images of {annotations.source} has segments: image {image_id}, {reason}: put the "
            "PNG files there"
        )
    ids = np.column_stack([np.full(len(notes), -1), annotations.image_ids[missing]])  # [K, 2]
    names = PackedStrings(annotations.file_names[i] for i in np.flatnonzero(missing))
    selected = annotations.select(np.flatnonzero(~missing))
    return replace(
        selected,
        findings={**annotations.findings, NO_PNG: (ids, names)},
        image_notes={**annotations.image_notes, NO_PNG: notes},
    )


# -------------------------------------------------------------------------------------------------------- the JSON file


def read_panoptic(path: str) -> tuple[Annotations, PanopticAnnotations, dict[int, bool]]:
    """Read a panoptic file and return (objects as of a COCO file, all segments, category id -> whether it is a thing).

    Raises:
        UserError: the file does not exist or is malformed.
    """
    with gc_paused():
        content = read_json(path)
        if not isinstance(content, dict) or not _are_records(content.get("annotations")):
            raise UserError(
                f"{path} has no list 'annotations' of objects: give COCO's panoptic annotations, or files with the "
                "same entries"
            )
        records = sorted(content["annotations"], key=lambda item: _image_id(item, path))
        things = _parse_things(content.get("categories"), path)
        segments = _parse_segments(records, path)
        coco_style = {
            "images": _images(content.get("images"), records, path),
            "annotations": [
                _widen(segment) for item in records for segment in item["segments_info"]
            ],
            "categories": content["categories"],
        }
        return parse_coco(coco_style, path, keep_crowds=True), segments, things


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _image_id(record: Record, path: str) -> int:
    image_id = record.get("image_id")
    if not isinstance(image_id, int) or isinstance(image_id, bool):
        raise UserError(f"{path}: image_id {str(image_id)[:40]!r} is not an integer: correct it")
    return image_id


def _parse_things(categories: Any, path: str) -> dict[int, bool]:
    if not _are_records(categories):
        raise UserError(
            f"{path} has no list 'categories' of objects: add id, name and isthing of each class"
        )
    things = {}
    for category in categories:
        if category.get("isthing") not in (0, 1):
            raise UserError(
                f"{path}: category {category.get('id')} has isthing {category.get('isthing')!r}: it must be 1 for "
                "things and 0 for stuff"
            )
        things[category.get("id")] = bool(category["isthing"])
    return things


def _parse_segments(records: list[Record], path: str) -> PanopticAnnotations:
    """Check the annotations of the images, sorted by image id, and return their segments.

    Each segment gets the `image_id`, as the annotations of a COCO detection file have it.
    """
    for before, record in zip([None, *records], records, strict=False):
        if before is not None and before["image_id"] == record["image_id"]:
            raise UserError(f"{path}: two annotations of image {record['image_id']}: remove one")
        _check_segments(record, path)
    all_segments = [segment for record in records for segment in record["segments_info"]]
    boxes = [segment["bbox"] for segment in all_segments]
    areas = [segment.get("area") for segment in all_segments]
    counts = [len(record["segments_info"]) for record in records]
    return PanopticAnnotations(
        source=path,
        image_ids=np.array([record["image_id"] for record in records], dtype=np.int64),
        file_names=PackedStrings(record["file_name"] for record in records),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.array([segment["id"] for segment in all_segments], dtype=np.int64),
        category_ids=np.array([segment["category_id"] for segment in all_segments], dtype=np.int64),
        crowds=np.array([bool(segment.get("iscrowd")) for segment in all_segments], dtype=bool),
        boxes_xywh=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas=np.array([np.nan if area is None else area for area in areas], dtype=np.float64),
    )


def _check_segments(record: Record, path: str) -> None:
    """Check the annotation of an image, and write its id into its segments.

    Raises:
        UserError: a field is missing or malformed.
    """
    image_id, segments = record["image_id"], record.get("segments_info")
    if not isinstance(record.get("file_name"), str) or not _are_records(segments):
        raise UserError(
            f"{path}: the annotation of image {image_id} needs file_name, that of its PNG, and the list segments_info"
        )
    seen = set()
    for segment in segments:
        segment_id, box, area = segment.get("id"), segment.get("bbox"), segment.get("area", 0)
        where = f"{path}: segment {str(segment_id)[:40]} of image {image_id}"
        if type(segment_id) is not int or not VOID < segment_id < MAX_ID:
            raise UserError(
                f"{where}: its id must be R + 256 G + 65536 B of its color, from 1 to {MAX_ID - 1}"
            )
        if segment_id in seen:
            raise UserError(f"{where} is listed twice: remove one")
        if type(segment.get("category_id")) is not int:
            raise UserError(
                f"{where} has category_id {segment.get('category_id')!r}: it must be an integer"
            )
        is_box = isinstance(box, list) and len(box) == 4
        if not is_box or not all(type(value) in (int, float) for value in (*box, area)):
            raise UserError(
                f"{where}: bbox must be [x, y, width, height] in pixels, and area a number"
            )
        seen.add(segment_id)
        segment["image_id"] = image_id


def _images(images: Any, records: list[Record], path: str) -> list[Record]:
    """Return the list of images. A name that is missing is that of the PNG, with the extension .jpg."""
    names = {record["image_id"]: f"{PurePath(record['file_name']).stem}.jpg" for record in records}
    if images is None:
        return [{"id": image_id, "file_name": name} for image_id, name in names.items()]
    if not _are_records(images):
        raise UserError(f"{path}: 'images' must be a list of objects: correct or remove it")
    return [{"file_name": names.get(image.get("id")), **image} for image in images]


def _widen(segment: Record) -> Record:
    """Return a segment whose box has at least one pixel, which boxes around lines lack in some files."""
    x, y, width, height = segment["bbox"]
    if width >= 1 and height >= 1:
        return segment
    return {**segment, "bbox": [x, y, max(width, 1), max(height, 1)]}
