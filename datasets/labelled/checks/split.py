"""One split of a dataset, as the checks see it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from datasets.images.image_folder import NO_SIZE, ImageFile, ImageFiles
from datasets.images.image_info import ImageInfo, inspect_header
from datasets.labelled.annotations import Annotations
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.mask_faults import MaskFault
from datasets.sample import SampleDataset

# Images of each split whose size is that of the file at the start of a run, if the annotations do not list it.
SAMPLED_SIZES = 64


class ImagePaths(Sequence[str]):
    """Paths of the images of a dataset, made when they are asked for: most of them never are."""

    def __init__(self, images: SampleDataset | ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images.path(index)


@dataclass
class Split:
    """The images of "train" or "val", with what the checks need to know of the detector.

    Attributes:
        num_queries, num_classes: the most objects and classes that the detector can predict.
        image_infos: one per image; empty if not all of them were decoded.
        sample_infos: image index -> info, of a sample; only if `image_infos` is empty.
        mask_faults: of each image; empty if the masks were not decoded.
    """

    name: str
    images: SampleDataset | ImageFiles
    num_queries: int = 0
    num_classes: int = 0
    image_infos: list[ImageInfo] = field(default_factory=list)
    sample_infos: dict[int, ImageInfo] = field(default_factory=dict)
    mask_faults: list[list[MaskFault]] = field(default_factory=list)

    @cached_property
    def annotations(self) -> Annotations | None:
        """Annotations of the images; None for unlabelled images."""
        found = getattr(self.images, "annotations", None)
        return found if isinstance(found, Annotations) else None

    @property
    def _files(self) -> Any:
        """The images themselves: those of a pretext's dataset are in its attribute `images`."""
        return getattr(self.images, "images", self.images)

    @cached_property
    def sizes_hw(self) -> np.ndarray:
        """(height, width) of the images in pixels, int64 [I, 2]; 0 if unknown.

        A size that the annotations do not list is that of the file: of each image if `image_infos` are known, else of
        those in the sample, and of others until SAMPLED_SIZES are known.
        """
        sizes = self.annotations.sizes_hw.copy()  # [I, 2]
        unlisted = np.flatnonzero(~sizes.all(1))
        infos = dict(enumerate(self.image_infos)) or dict(self.sample_infos)
        sampled = [index for index in unlisted.tolist() if index in infos]
        num_others = max(SAMPLED_SIZES - len(sampled), 0)
        for index in unlisted[evenly_spaced(len(unlisted), num_others)].tolist():
            if index not in infos:
                infos[index] = inspect_header(self.file(index), self.exif, self.listed_hw(index))
                sampled.append(index)
        for index in sampled:
            sizes[index] = infos[index].size_hw
        return sizes

    def file(self, index: int) -> ImageFile:
        """Return what to decode: a path, or a member of a tar file."""
        if isinstance(self._files, ImageFiles):
            return self._files.file(index)
        return self.images.path(index)

    @property
    def exif(self) -> str | None:
        """`--exif` of the images."""
        return getattr(self._files, "exif", None)

    def listed_hw(self, index: int) -> tuple[int, int]:
        """Return the (height, width) of an image in the annotations; 0 if they do not say."""
        if self.annotations is None:
            return NO_SIZE
        height, width = self.annotations.sizes_hw[index].tolist()
        return height, width

    @property
    def paths(self) -> ImagePaths:
        """Paths of all images."""
        return ImagePaths(self.images)

    def finding(self, index: int, detail: str = "") -> Finding:
        """Return a finding in one image. Its kind is empty; `run_checks` adds it."""
        image_id = int(self.annotations.image_ids[index]) if self.annotations is not None else None
        return Finding("", self.name, self.images.path(index), detail, image_id)

    def box_finding(self, row: int, detail: str = "") -> Finding:
        """Return a finding of one object, with its box."""
        annotations = self.annotations
        index = int(np.searchsorted(annotations.offsets, row, side="right")) - 1
        annotation_id = -1 if annotations.ids is None else int(annotations.ids[row])
        finding = self.finding(index, f"{format_bbox(annotations.boxes_xyxy_abs[row])}{detail}")
        return finding._replace(annotation_id=annotation_id if annotation_id >= 0 else None)


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly spaced from the first to the last one."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def format_bbox(box_xyxy: np.ndarray) -> str:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return f"bbox [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"
