"""Boxes and labels of a whole dataset in a few NumPy arrays.

Dataloader workers share arrays with the main process. Python objects would be copied into each worker, since reading
one writes to its reference count.

Shapes: I images, A annotated objects (boxes) of all images.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.box_formats import Misfits
from datasets.labelled.segmentations import decode_segmentations

Record = dict[str, Any]
# Kind of finding (a key of `datasets.labelled.checks.table.KINDS`) -> (ids, file names) of K findings.
# ids: int64 [K, 2], annotation id and image id; -1 if there is no annotation id. file names: [K].
Findings = dict[str, tuple[np.ndarray, PackedStrings]]


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
