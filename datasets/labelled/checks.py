"""Checks of a dataset: one small function per kind of finding, listed in a table.

At its start, each run calls the checks that need only the annotations, and loads a few images. This takes less than two
seconds for COCO. `tools/check_dataset.py` also decodes every image, and lists all findings.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from datasets.images.image_folder import NO_SIZE, ImageFile, ImageFiles
from datasets.images.pixels import ROTATED
from datasets.labelled.annotations import Annotations, has_visible_area
from datasets.labelled.box_formats import exceeds_image, guess_format
from datasets.labelled.image_checks import (
    ImageInfo,
    evenly_spaced,
    find_damaged_metadata,
    find_decided_orientations,
    find_duplicate_images,
    find_evaluated_training_images,
    find_images_of_one_color,
    find_narrow_ranges,
    find_several_frames,
    find_shared_images,
    find_similar_images,
    find_size_mismatches,
    find_transparent_images,
    find_undecided_orientations,
    find_unreadable_images,
    find_unused_bits,
    inspect_header,
    sample_images,
)
from datasets.labelled.mask_checks import MaskFault, find_mask_faults
from datasets.sample import BadImageError, SampleDataset, TooFewProposalsError
from util.checkpoints.classes import fold_class_name
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRNG
from util.settings import Settings

PROBED_IMAGES = 8  # images of each split that are loaded at the start of a run
PROBE_SECONDS = 2.0  # stop loading them after this time
OTHER_PROPOSALS = "use other --proposals"
# Images of each split whose size is that of the file at the start of a run, if the annotations do not list it.
SAMPLED_SIZES = 64
MIN_BOXES_FOR_FORMAT = 10  # fewer boxes say nothing about the format of all
MIN_BOXES_TO_REFUSE = 4  # of fewer boxes, most may be unusable by chance: they are only warned of


class Finding(NamedTuple):
    """One finding.

    Attributes:
        kind: a key of KINDS.
        split: "train" or "val".
        file: image file or annotation file.
        detail: what was found, as text.
        image_id, annotation_id: ids in the annotation file, if known.
    """

    kind: str
    split: str
    file: str
    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.kind].severity

    def __str__(self) -> str:
        ids = {"image": self.image_id, "annotation": self.annotation_id}
        known = [f"{name} {value}" for name, value in ids.items() if value is not None]
        parts = [self.file, *known, self.detail]
        return ", ".join(part for part in parts if part)


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
    def paths(self) -> "ImagePaths":
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
        finding = self.finding(index, f"{_format_bbox(annotations.boxes_xyxy_abs[row])}{detail}")
        return finding._replace(annotation_id=annotation_id if annotation_id >= 0 else None)


# --------------------------------------------------------------------------------------------------------- annotations


def findings_of_parser(kind: str, split: Split) -> Iterator[Finding]:
    """Yield what `datasets.labelled.annotations` recorded while it parsed the file."""
    ids, names = split.annotations.findings.get(kind, (np.zeros((0, 2)), ()))
    notes = split.annotations.image_notes.get(kind, {})
    for (annotation_id, image_id), name in zip(ids.tolist(), names, strict=True):
        # An unlisted image has no file name: point to the annotation file instead.
        file = os.path.join(split.images.image_folder, name) if name else split.annotations.source
        known_id = annotation_id if annotation_id >= 0 else None
        known_image = image_id if image_id >= 0 else None
        yield Finding("", split.name, file, notes.get(image_id, ""), known_image, known_id)


def find_noted_images(kind: str, split: Split) -> Iterator[Finding]:
    """Yield the images of which the parser recorded a text in `image_notes`."""
    notes = split.annotations.image_notes.get(kind, {})
    if notes:
        for index in np.flatnonzero(np.isin(split.annotations.image_ids, list(notes))):
            yield split.finding(index, notes[int(split.annotations.image_ids[index])])


def find_unsegmented_objects(split: Split) -> Iterator[Finding]:
    """Yield what the parser recorded, and what only decoding shows."""
    yield from findings_of_parser("no segmentation", split)
    yield from find_mask_faults("no segmentation", split)


def _format_bbox(box_xyxy: np.ndarray) -> str:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return f"bbox [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"


def find_unlisted_sizes(split: Split) -> Iterator[Finding]:
    unlisted = ~split.annotations.sizes_hw.all(1)  # [I]
    return (split.finding(index) for index in np.flatnonzero(unlisted))


def find_boxes_outside_files(split: Split) -> Iterator[Finding]:
    """Yield the boxes that are outside their image, where only the file tells its size."""
    for row in np.flatnonzero(_outside_files(split)):
        index = np.searchsorted(split.annotations.offsets, row, side="right") - 1
        height, width = split.sizes_hw[index]
        yield split.box_finding(row, f", the file has {width} x {height} pixels")


def _outside_files(split: Split) -> np.ndarray:
    """Return which boxes are outside the pixels of their file, bool [A]. The parser skips those of listed sizes."""
    annotations = split.annotations
    return ~has_visible_area(annotations.boxes_xyxy_abs, split.sizes_hw[annotations.image_indices])


def find_boxes_partly_outside(split: Split) -> Iterator[Finding]:
    """Yield what the parser recorded, and the same where only the file tells the size of an image."""
    yield from findings_of_parser("box partly outside", split)
    for row in np.flatnonzero(_exceed_files(split) & ~_outside_files(split)):
        yield split.box_finding(row)


def _exceed_files(split: Split) -> np.ndarray:
    """Return which boxes exceed their image, where only the file tells its size, bool [A]."""
    annotations = split.annotations
    listed = annotations.sizes_hw.all(1)  # [I]
    sizes = np.where(listed[:, None], 0, split.sizes_hw)[annotations.image_indices]  # [A, 2]
    return sizes.all(1) & exceeds_image(annotations.boxes_xyxy_abs, sizes)


def find_boxes_in_another_format(split: Split) -> Iterator[Finding]:
    """Yield one finding if nearly all boxes that do not fit into their images would do so in another format.

    They may be a small part of the file. `find_corner_boxes` looks at whole files and classes.
    """
    found = _guess_format(split)
    if found and not any(find_corner_boxes(split)):
        yield Finding("", split.name, split.annotations.source, found)


def _guess_format(split: Split) -> str:
    """Return which format the boxes that do not fit into their images are probably in, as text; empty: not known."""
    annotations, misfits = split.annotations, split.annotations.misfits
    rows = np.flatnonzero(_exceed_files(split))
    boxes = np.concatenate([misfits.boxes_xyxy_abs, annotations.boxes_xyxy_abs[rows]])  # [K, 4]
    sizes = np.concatenate(
        [misfits.sizes_hw, split.sizes_hw[annotations.image_indices[rows]]]
    )  # [K, 2]
    # Only formats with corners have a mark for difficult objects.
    guess = guess_format(boxes, sizes, from_corners=annotations.difficult is not None)
    if guess is None:
        return ""
    name, fits = guess
    first = int(np.flatnonzero(fits)[0])
    count = len(misfits.boxes_xyxy_abs)
    example = _misfit(split, first) if first < count else split.box_finding(rows[first - count])
    what = f"{fits.sum()} of {len(boxes)} boxes that exceed their image or have no area"
    return f"{what} fit as {name}, such as {example}"


def _misfit(split: Split, index: int) -> Finding:
    """Return one of the boxes that do not fit into their images, as a finding."""
    misfits = split.annotations.misfits
    annotation_id, image_id = misfits.ids[index].tolist()
    box = misfits.boxes_xyxy_abs[index]
    if split.annotations.difficult is None:
        text = _format_bbox(box)
    else:  # VOC counts from 1
        text = "bndbox [" + ", ".join(f"{value:g}" for value in box + [1, 1, 0, 0]) + "]"
    height, width = misfits.sizes_hw[index].tolist()
    if height and width:
        text += f" in {width:g} x {height:g} pixels"
    return Finding(
        "",
        split.name,
        os.path.join(split.images.image_folder, misfits.files[index]),
        text,
        image_id,
        annotation_id if annotation_id >= 0 else None,
    )


def find_fraction_boxes(split: Split) -> Iterator[Finding]:
    return (split.box_finding(row) for row in np.flatnonzero(_in_fractions(split.annotations)))


def _in_fractions(annotations: Annotations) -> np.ndarray:
    """Return which boxes are fractions of the image, bool [A]; 1 may be rounded up.

    Those of XML files end within the first pixel. Of `bbox` all four numbers do, whether they mean the upper left
    corner, the center, or two corners.
    """
    first, last = np.split(annotations.boxes_xyxy_abs, 2, axis=1)  # [A, 2], [A, 2]
    return ((last <= 1.01) | (np.maximum(first, last - first) <= 1.01)).all(1)


def find_percent_boxes(split: Split) -> Iterator[Finding]:
    """Yield one finding if no box ends beyond 100, and enough of them are in images of at least twice that size."""
    rows, sizes_wh = _boxes_with_sizes(split)  # [N], [N, 2]
    large = (sizes_wh >= 200).all(1)  # in smaller images, boxes in pixels rarely end beyond 100
    if large.sum() < MIN_BOXES_FOR_FORMAT or _in_fractions(split.annotations).all():
        return
    if (split.annotations.boxes_xyxy_abs[rows, 2:] <= 100.5).all():
        width, height = sizes_wh[large].min(0)
        detail = (
            f"no box ends beyond 100, {large.sum()} of them in images of at least {width} x {height} pixels, such as "
            f"{split.box_finding(rows[large][0])}"
        )
        yield Finding("", split.name, split.annotations.source, detail)


def find_corner_boxes(split: Split) -> Iterator[Finding]:
    """Yield one finding if `bbox` looks like [x0, y0, x1, y1] instead of [x, y, width, height].

    It may do so in the whole file, or in the boxes of some classes: merged files often come from several programs.
    """
    rows, sizes_wh = _boxes_with_sizes(split)  # [N], [N, 2]
    boxes = split.annotations.boxes_xyxy_abs[rows].astype(np.float64)  # [N, 4]
    # The first and the last two numbers of `bbox`.
    first = boxes[:, :2]  # [N, 2]
    second = boxes[:, 2:] - boxes[:, :2]  # [N, 2]
    are_corners = (second > first).all(1) & (second <= sizes_wh + 1).all(1)
    exceed = (boxes[:, 2:] > sizes_wh + 1).any(1)
    areas = split.annotations.areas[rows]
    between = (second - first).prod(1)
    # `area` may be rounded. That of a box at the origin is the same in both formats.
    have_area = np.isclose(areas, between, rtol=0.01, atol=1) & ~np.isclose(
        areas, second.prod(1), rtol=0.01, atol=1
    )

    def look_like_corners(part: np.ndarray) -> bool:
        """As corners, all boxes must be inside their image. Otherwise, some must exceed it, or the area be wrong."""
        return (
            len(part) >= MIN_BOXES_FOR_FORMAT
            and are_corners[part].mean() >= 0.99
            and (exceed[part].mean() >= 0.1 or have_area[part].mean() >= 0.9)
        )

    everything = np.arange(len(rows))
    found = everything if look_like_corners(everything) else everything[:0]
    if not len(found) and are_corners.any():
        labels = split.annotations.labels[rows]  # [N]
        order = np.argsort(labels, kind="stable")
        classes = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        found = np.concatenate([everything[:0], *filter(look_like_corners, classes)])
    if len(found):
        detail = f"{len(found)} boxes, such as {split.box_finding(rows[found[0]])}"
        yield Finding("", split.name, split.annotations.source, detail)


def _boxes_with_sizes(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [N] of the objects in images of known size, and these sizes, (width, height), [N, 2]."""
    sizes_wh = split.sizes_hw[split.annotations.image_indices, ::-1]  # [A, 2]
    rows = np.flatnonzero(sizes_wh.all(1))
    return rows, sizes_wh[rows]


def find_categories_without_boxes(split: Split) -> Iterator[Finding]:
    """Yield the classes of the training set that nothing can teach."""
    if split.name != "train":
        return
    names = split.annotations.class_names
    for label in np.setdiff1d(list(names), split.annotations.labels).tolist():
        yield Finding("", split.name, split.annotations.source, f"'{names[label]}'")


def find_labels_out_of_range(split: Split) -> Iterator[Finding]:
    labels = split.annotations.labels
    for row in np.flatnonzero(labels >= split.num_classes):
        detail = f"category id {labels[row]}, --num_classes {split.num_classes}"
        yield split.finding(split.annotations.image_indices[row], detail)


def find_more_objects_than_queries(split: Split) -> Iterator[Finding]:
    """Yield one finding per image, the image with the most objects first: it decides `--num_queries`."""
    counts = np.diff(split.annotations.offsets)
    over = np.flatnonzero(counts > split.num_queries)
    for index in over[np.argsort(-counts[over], kind="stable")]:
        yield split.finding(index, f"{counts[index]} objects, --num_queries {split.num_queries}")


def find_duplicate_boxes(split: Split) -> Iterator[Finding]:
    annotations = split.annotations
    # Floats are compared by their bits. Adding 0 turns -0.0, which has other bits, into 0.0.
    bits = (annotations.boxes_xyxy_abs + 0).view(np.int32)  # [A, 4]
    rows = np.column_stack([annotations.image_indices, annotations.labels, bits])  # [A, 6]

    # One hash per row, since one number sorts faster than six. Different rows may share a hash, so the loop below
    # compares whole rows.
    hashes = rows @ np.random.default_rng(0).integers(2**62, size=6)  # [A]
    _, groups, counts = np.unique(hashes, return_inverse=True, return_counts=True)

    seen: set[tuple[int, ...]] = set()
    for row in np.flatnonzero(counts[groups] > 1):
        key = tuple(rows[row].tolist())
        if key not in seen:
            seen.add(key)
            continue
        name = annotations.class_names[int(annotations.labels[row])]
        detail = f"{name}, {_format_bbox(annotations.boxes_xyxy_abs[row])}"
        yield split.finding(annotations.image_indices[row], detail)


def find_duplicate_file_names(split: Split) -> Iterator[Finding]:
    """Yield one finding per file, at the second image that lists it."""
    names = list(split.annotations.file_names)
    if len(set(names)) == len(names):
        return
    images: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        images.setdefault(name, []).append(index)

    for first, *others in images.values():
        if others:
            more = ", ..." if others[1:] else ""
            detail = f"also image {split.annotations.image_ids[first]}{more}"
            yield split.finding(others[0], detail)


def find_images_without_objects(split: Split) -> Iterator[Finding]:
    counts = np.diff(split.annotations.offsets)
    return (split.finding(index) for index in np.flatnonzero(counts == 0))


# --------------------------------------------------------------------------------------------------------- class names


def find_broken_class_names(split: Split) -> Iterator[Finding]:
    """Yield class names with half of a surrogate pair, which JSON can express. They are not valid Unicode."""
    for label, name in split.annotations.class_names.items():
        if any("\ud800" <= character <= "\udfff" for character in name):
            yield Finding("", split.name, split.annotations.source, f"class {label} is {name!a}")


def find_similar_class_names(split: Split) -> Iterator[Finding]:
    """Yield class names that are the same apart from case, spaces and the encoding of accents."""
    first: dict[str, str] = {}
    for name in split.annotations.class_names.values():
        other = first.setdefault(fold_class_name(name), name)
        if other != name:
            yield Finding("", split.name, split.annotations.source, f"{other!r} and {name!r}")


# --------------------------------------------------------------------------------------------- training and validation


def find_class_mismatches(train: Split, val: Split) -> Iterator[Finding]:
    """Yield labels with different names in the two splits, and validation classes without training boxes."""
    names, others = train.annotations.class_names, val.annotations.class_names
    for label, name in others.items():
        if names.get(label, name) != name:
            detail = (
                f"class {label} is '{names[label]}' in {train.annotations.source} and '{name}' here"
            )
            yield Finding("", val.name, val.annotations.source, detail)

    untrained = np.setdiff1d(val.annotations.labels, train.annotations.labels).tolist()
    if untrained:
        some = ", ".join(others[label] for label in untrained[:3])
        more = ", ..." if untrained[3:] else ""
        detail = (
            f"{len(untrained)} classes have boxes here and none in {train.annotations.source}: "
            f"{some}{more}"
        )
        yield Finding("", val.name, val.annotations.source, detail)


# ----------------------------------------------------------------------------------------------------------- the table


class Check(NamedTuple):
    """A row of the table.

    Attributes:
        kind: name of the finding.
        severity: "problem": wrong metrics, or data that is skipped. "warning": worth a look. "info": only counted.
        find: yields the findings of a split, or of the training and the validation split. None if the parser of the
            annotations has recorded them (`findings_of_parser`).
        meaning: what the finding means for training or evaluation, and the remedy.
    """

    kind: str
    severity: str
    find: Callable[..., Iterator[Finding]] | None
    meaning: str


IMAGE_CHECKS = (
    Check(
        kind="image unreadable",
        severity="problem",
        find=find_unreadable_images,
        meaning="can't be decoded; training uses the next image instead",
    ),
    Check(
        kind="size differs",
        severity="problem",
        find=find_size_mismatches,
        meaning="not the size in the annotations; training skips the image",
    ),
    Check(
        kind="duplicate image",
        severity="warning",
        find=find_duplicate_images,
        meaning="the same pixels twice in a split",
    ),
    Check(
        kind="rotated by EXIF",
        severity="warning",
        find=find_undecided_orientations,
        meaning="used as stored, since no size tells how it was annotated: look at samples.png, and give --exif ignore "
        "if the boxes fit, else --exif apply",
    ),
    Check(
        kind="one color",
        severity="warning",
        find=find_images_of_one_color,
        meaning="almost no contrast in 8 bits: check the files; save images of more bits, and masks, as 8 bit with "
        "their full range",
    ),
    Check(
        kind="fewer than 16 bits",
        severity="warning",
        find=find_unused_bits,
        meaning="16-bit gray whose largest value needs fewer bits, which are scaled to 8: save all images as 8 bit if "
        "brightness must be comparable",
    ),
    Check(
        kind="narrow range",
        severity="warning",
        find=find_narrow_ranges,
        meaning="16-bit gray, scaled to 8 bits by its largest value, becomes almost flat: save it as 8 bit, with the "
        "range that it uses stretched",
    ),
    Check(
        kind="transparent",
        severity="warning",
        find=find_transparent_images,
        meaning="shown on white, as in viewers: save without the fourth channel if it is something else",
    ),
    Check(
        kind="several frames",
        severity="info",
        find=find_several_frames,
        meaning="an animation or several pages: the first one is used",
    ),
    Check(
        kind="metadata damaged",
        severity="info",
        find=find_damaged_metadata,
        meaning="the pixels are read; an EXIF orientation, if there is one, may be lost",
    ),
    Check(
        kind="EXIF orientation",
        severity="info",
        find=find_decided_orientations,
        meaning="used as the sizes in the annotations or --exif say",
    ),
)
ANNOTATION_CHECKS = (
    Check(
        kind="unusable",
        severity="problem",
        find=None,
        meaning="the dataset can't be read",
    ),
    Check(
        kind="image absent",
        severity="problem",
        find=None,
        meaning="listed, but the file does not exist",
    ),
    Check(
        kind="image not listed",
        severity="problem",
        find=None,
        meaning="an annotation of an image that the file does not list",
    ),
    Check(
        kind="box not finite",
        severity="problem",
        find=None,
        meaning="NaN or infinity in a box; the box is skipped",
    ),
    Check(
        kind="box without area",
        severity="problem",
        find=None,
        meaning="width or height of 0 or less; the box is skipped",
    ),
    Check(
        kind="box outside image",
        severity="problem",
        find=None,
        meaning="the whole box is outside its image; the box is skipped",
    ),
    Check(
        kind="segmentation broken",
        severity="problem",
        find=partial(find_mask_faults, "segmentation broken"),
        meaning="with --masks, training skips the image: polygons are lists [x, y, x, y, ...] in pixels, RLE is of the "
        "size of the image",
    ),
    Check(
        kind="no panoptic segments",
        severity="problem",
        find=None,
        meaning="no PNG, or no annotation of the image; training skips it, evaluation refuses it",
    ),
    Check(
        kind="panoptic PNG unusable",
        severity="problem",
        find=partial(find_mask_faults, "panoptic PNG unusable"),
        meaning="damaged, or of another size than the image; training skips the image",
    ),
    Check(
        kind="segment without pixels",
        severity="problem",
        find=partial(find_mask_faults, "segment without pixels"),
        meaning="listed in segments_info, but not in the PNG: skipped in training",
    ),
    Check(
        kind="segment not listed",
        severity="problem",
        find=partial(find_mask_faults, "segment not listed"),
        meaning="pixels of the PNG with an id that segments_info lacks: no object in training; PQ can't be computed",
    ),
    Check(
        kind="mask empty",
        severity="warning",
        find=partial(find_mask_faults, "mask empty"),
        meaning="the mask has no pixel in the image, and is trained on as such: draw it again or remove the object",
    ),
    Check(
        kind="mask differs from box",
        severity="warning",
        find=partial(find_mask_faults, "mask differs from box"),
        meaning="the box around the mask is far from bbox: one of them may belong to another object",
    ),
    Check(
        kind="category not listed",
        severity="problem",
        find=None,
        meaning="not evaluated; --dataset_file custom refuses the file",
    ),
    Check(
        kind="category out of range",
        severity="problem",
        find=find_labels_out_of_range,
        meaning="no row in the class head: --dataset_file custom numbers the classes from 0; or a larger --num_classes",
    ),
    Check(
        kind="box in fractions",
        severity="problem",
        find=find_fraction_boxes,
        meaning="boxes look like fractions: bbox is in pixels, so scale them by the width and height of the image",
    ),
    Check(
        kind="boxes in percent",
        severity="problem",
        find=find_percent_boxes,
        meaning="boxes look like percentages: bbox is in pixels, so scale them by the image's size / 100",
    ),
    Check(
        kind="boxes as corners",
        severity="problem",
        find=find_corner_boxes,
        meaning="boxes look like [x0, y0, x1, y1]: bbox is [x, y, width, height], so subtract x0 and y0",
    ),
    Check(
        kind="box outside file",
        severity="problem",
        find=find_boxes_outside_files,
        meaning="no image size is listed, and the box is outside the pixels of the file: it is skipped in training "
        "and counts as missed in evaluation; boxes must be in pixels of the image file",
    ),
    Check(
        kind="many crowds",
        severity="warning",
        find=None,
        meaning="iscrowd 1: not trained on and not counted in AP. Single objects, such as CVAT's masks, need iscrowd 0",
    ),
    Check(
        kind="marked ignore",
        severity="warning",
        find=None,
        meaning="ignore 1: treated as a crowd, not trained on and not counted in AP",
    ),
    Check(
        kind="rotated box",
        severity="warning",
        find=None,
        meaning="attributes.rotation of CVAT: the upright box around the rotated rectangle is used",
    ),
    Check(
        kind="area unusable",
        severity="warning",
        find=None,
        meaning="not finite, 0 or less, or larger than the box: AP by size uses the area of the box",
    ),
    Check(
        kind="no segmentation",
        severity="warning",
        find=find_unsegmented_objects,
        meaning="with --masks, the whole box of such an object is its mask, in training and in evaluation: add "
        "polygons or RLE, or remove the object",
    ),
    Check(
        kind="more objects than queries",
        severity="problem",
        find=find_more_objects_than_queries,
        meaning="needs a larger --num_queries to detect them all",
    ),
    Check(
        kind="box partly outside",
        severity="warning",
        find=find_boxes_partly_outside,
        meaning="clipped to its image in training; if there are many, is bbox [x, y, width, height] in pixels?",
    ),
    Check(
        kind="counted from 0",
        severity="warning",
        find=partial(findings_of_parser, "counted from 0"),
        meaning="boxes of XML files are read as counted from 1, so that these are one pixel off: negligible, unless "
        "objects are tiny",
    ),
    Check(
        kind="boxes in another format",
        severity="warning",
        find=find_boxes_in_another_format,
        meaning="nothing is converted: correct these boxes",
    ),
    Check(
        kind="box twice",
        severity="warning",
        find=find_duplicate_boxes,
        meaning="the same class and box twice in an image",
    ),
    Check(
        kind="file name twice",
        severity="warning",
        find=find_duplicate_file_names,
        meaning="several images list the same file: keep one entry",
    ),
    Check(
        kind="file name differs",
        severity="warning",
        find=partial(find_noted_images, "file name differs"),
        meaning="the only file that the listed name can mean is used: correct the name",
    ),
    Check(
        kind="XML names another image",
        severity="warning",
        find=partial(find_noted_images, "XML names another image"),
        meaning="the image with the XML file's own name is used: correct <filename>",
    ),
    Check(
        kind="class name broken",
        severity="warning",
        find=find_broken_class_names,
        meaning="not valid Unicode, shown with its code: correct it",
    ),
    Check(
        kind="class names alike",
        severity="warning",
        find=find_similar_class_names,
        meaning="two classes differ only in case, spaces or accents' encoding: merge them if they are one",
    ),
    Check(
        kind="image without XML file",
        severity="info",
        find=partial(findings_of_parser, "image without XML file"),
        meaning="in the image folder, but no XML file is about it; not used",
    ),
    Check(
        kind="no objects",
        severity="info",
        find=find_images_without_objects,
        meaning="an image without boxes",
    ),
    Check(
        kind="crowd",
        severity="info",
        find=None,
        meaning="iscrowd 1: not trained on, and not counted in AP",
    ),
    Check(
        kind="category without boxes",
        severity="info",
        find=find_categories_without_boxes,
        meaning="can't be learned: remove it from the categories if it is not a class",
    ),
    Check(
        kind="size not listed",
        severity="info",
        find=find_unlisted_sizes,
        meaning="no width and height, or 0: those of the file are used",
    ),
)
PAIR_CHECKS = (
    Check(
        kind="shared image",
        severity="problem",
        find=find_shared_images,
        meaning="in both splits, which makes AP too high: remove it from one",
    ),
    Check(
        kind="similar image",
        severity="warning",
        find=find_similar_images,
        meaning="looks like one of the other split: a re-encoded or resized copy, or a frame of the same video, makes "
        "AP too high: remove it from one split",
    ),
    Check(
        kind="classes differ",
        severity="warning",
        find=find_class_mismatches,
        meaning="AP means little: use the same list of categories",
    ),
)
SEVERITIES = ("problem", "warning", "info")  # the worst first
CHECKS = sorted(
    (*IMAGE_CHECKS, *ANNOTATION_CHECKS, *PAIR_CHECKS),
    key=lambda check: SEVERITIES.index(check.severity),
)
KINDS = {check.kind: check for check in CHECKS}

# What a sample of the images shows at the start of a run. `probe_images` reports unreadable images and wrong sizes.
SAMPLE_KINDS = ("rotated by EXIF", "one color", "fewer than 16 bits", "narrow range", "transparent")

# The parser logs the boxes that it skips since they can't be used. What it only records is logged here.
LOGGED_BY_PARSER = {check.kind for check in CHECKS if check.find is None} - {
    "box partly outside",
    "many crowds",
    "marked ignore",
    "rotated box",
    "area unusable",
    "crowd",
}


def run_checks(splits: Sequence[Split], checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return all findings, the worst kinds first. Image checks find nothing in a split without `image_infos`."""
    labelled = [split for split in splits if split.annotations is not None]
    findings = []
    for check in checks:
        if check in PAIR_CHECKS:
            calls = [labelled] if len(labelled) == 2 else []
        elif check in IMAGE_CHECKS:
            calls = [[split] for split in splits]
        else:
            calls = [[split] for split in labelled]

        for arguments in calls:
            if check.find is None:
                found = findings_of_parser(check.kind, *arguments)
            else:
                found = check.find(*arguments)
            findings += [finding._replace(kind=check.kind) for finding in found]
    return findings


# ----------------------------------------------------------------------------------------------- at the start of a run


def run_startup_checks(
    train: SampleDataset | None, val: SampleDataset | None, settings: Settings
) -> dict[str, object]:
    """Check the annotations and a few images, and log one line per kind of finding.

    A dataset without the attribute `annotations` only has a few images loaded.

    Args:
        train: None in evaluation.
        val: None in pre-training.

    Returns:
        Statistics of the data, which the run records in its settings file.

    Raises:
        UserError: none of the images that were loaded can be used, most boxes of a split are skipped, or the training
            set has no box in pixels of its images.
    """
    splits = [
        Split(name, dataset, settings.num_queries, getattr(dataset, "num_classes", 0))
        for name, dataset in (("train", train), ("val", val))
        if dataset is not None
    ]
    record: dict[str, object] = {split.name: {"images": len(split.images)} for split in splits}
    warned = [line for split in splits for line in probe_images(split.images, split.name)]

    logged_by_parser = 0  # kinds of findings
    for split in splits:
        split.sample_infos = sample_images(split)
        if split.annotations is not None:
            record[split.name].update(summarize_annotations(split.annotations))
            logged_by_parser += len(split.annotations.findings.keys() & LOGGED_BY_PARSER)
            _refuse_skipped_boxes(split)
            warned += _check_has_boxes(split, settings)
            if split.name == "train":
                _refuse_unusable_boxes(split)

    _log_rotations(splits, record)

    skipped = LOGGED_BY_PARSER | ({check.kind for check in IMAGE_CHECKS} - set(SAMPLE_KINDS))
    checks = [check for check in CHECKS if check.severity != "info" and check.kind not in skipped]
    for kind, group in groupby(run_checks(splits, checks), key=lambda finding: finding.kind):
        tried = _count_tried(splits, kind) if kind in SAMPLE_KINDS else 0
        warned.append(_format_findings(KINDS[kind], list(group), tried))

    if train is None and val is not None:
        shared = list(find_evaluated_training_images(splits[0], settings))
        if shared:
            kind = KINDS["shared image"]
            warned.append(_format_findings(kind, [one._replace(kind=kind.kind) for one in shared]))

    for line in warned:
        log.warning("%s", line)
    _log_summary(logged_by_parser + len(warned))
    return {**record, "warnings": warned}


def _log_rotations(splits: Sequence[Split], record: dict[str, object]) -> None:
    """Log and record that images are rotated because the annotations list their rotated size."""
    for split in splits:
        num_rotated = sum(info.rotation == ROTATED for info in split.sample_infos.values())
        if num_rotated and split.exif is None and split.annotations is not None:
            record["exif"] = "apply"
            log.info(
                "%s images are rotated as their EXIF orientation says where the annotations list the rotated size: %d "
                "of %d that were tried",
                split.name,
                num_rotated,
                len(split.sample_infos),
            )


def _count_tried(splits: Sequence[Split], kind: str) -> int:
    """Return the number of images in the samples that could show this kind of finding."""
    infos = [info for split in splits for info in split.sample_infos.values()]
    # The header of an image tells its orientation, but not what its pixels show.
    return len(infos) if kind == "rotated by EXIF" else sum(bool(info.digest) for info in infos)


def _format_findings(check: Check, findings: Sequence[Finding], tried: int = 0) -> str:
    """tried: number of images in a sample; 0: all were checked."""
    of_sample = f" of {tried} images that were tried" if tried else ""
    return f"{check.kind}: {len(findings)}{of_sample} ({check.meaning}), the first: {findings[0]}"


def _log_summary(num_warnings: int) -> None:
    if num_warnings:
        log.info(
            "data check: %d warning(s); python tools/check_dataset.py reads every image and lists all findings",
            num_warnings,
        )
    else:
        log.info("data check: no warnings")


def probe_images(dataset: SampleDataset, image_set: str = "train") -> list[str]:
    """Load a few evenly spaced images, for at most PROBE_SECONDS.

    image_set: "train" or "val", which tells what happens to images that can't be used.

    Returns:
        A warning if some of them can't be used, and one if some have too few proposals.

    Raises:
        UserError: none of them can be used.
    """
    indices = evenly_spaced(len(dataset), PROBED_IMAGES)
    start = time.monotonic()
    tried = 0
    bad: list[str] = []
    boxless: list[str] = []
    for index in indices:
        if tried and time.monotonic() - start > PROBE_SECONDS:
            break
        tried += 1
        try:
            dataset.load(index, SampleRNG.from_key(dataset.seed, 0, index))
        except TooFewProposalsError as error:
            boxless.append(f"{dataset.path(index)}: {error}")
        except BadImageError as error:
            bad.append(f"{dataset.path(index)}: {error}")

    # If the time was up after a single slow image, that image says nothing about a large dataset.
    if len(bad) + len(boxless) == tried and (tried == len(indices) or tried > 1):
        has_sizes = getattr(dataset, "annotations", None) is not None
        remedy_of_bad = f"check the image folder{' and the listed sizes' if has_sizes else ''}"
        first, remedy = (bad[0], remedy_of_bad) if bad else (boxless[0], OTHER_PROPOSALS)
        raise UserError(
            f"none of {tried} images that were tried can be used, the first is {first}; {remedy}"
        )
    warned = []
    if bad:
        is_train = image_set == "train"
        effect = "other images are used instead" if is_train else "their objects count as missed"
        warned.append(
            f"{len(bad)} of {tried} images that were tried can't be used, the first is {bad[0]}; {effect}"
        )
    if boxless:
        warned.append(
            f"{len(boxless)} of {tried} images that were tried have too few proposals, the first is {boxless[0]}; the "
            f"next image is used instead: leave them out, or {OTHER_PROPOSALS}"
        )
    return warned


def summarize_annotations(annotations: Annotations) -> dict[str, object]:
    """Return statistics of a split, which a run records."""
    counts = np.diff(annotations.offsets)  # objects of each image
    return {
        "boxes": len(annotations.labels),
        "classes": len(annotations.class_names),
        "images_without_objects": int((counts == 0).sum()),
        "most_objects_in_an_image": int(counts.max(initial=0)),
        "found": {kind: len(ids) for kind, (ids, _) in annotations.findings.items()},
    }


def _check_has_boxes(split: Split, settings: Settings) -> list[str]:
    """Return a warning if a validation set has no box.

    Raises:
        UserError: a training set has no box.
    """
    source = split.annotations.source
    if len(split.annotations.labels):
        return []
    if split.name == "train":
        raise UserError(
            f"{source} has no box that can be trained on: check its annotations, or pre-train without labels with "
            "main.py"
        )
    if settings.eval:
        return [f"{source} has no box: results.json gets the detections, there is no AP"]
    return [f"{source} has no box: AP will be -1"]


def _refuse_skipped_boxes(split: Split) -> None:
    """Check that most boxes of the whole file have an area inside their image. Otherwise the others are wrong, too.

    Raises:
        UserError: more than half of them are skipped, and they are not just a few.
    """
    annotations, misfits = split.annotations, split.annotations.misfits
    count = int(misfits.skipped.sum())
    if misfits.total < MIN_BOXES_TO_REFUSE or count <= misfits.total / 2:
        return
    if annotations.difficult is None:
        wanted = "bbox must be [x, y, width, height]"
    else:
        wanted = "<bndbox> must have the corners xmin, ymin, xmax, ymax"
    guess = _guess_format(split)
    raise UserError(
        f"{annotations.source}: {count} of {misfits.total} boxes are outside their image or have no area, the first: "
        f"{_misfit(split, int(np.flatnonzero(misfits.skipped)[0]))}; {wanted} in pixels of the image, not scaled to "
        f"0..1000 or another image size{f' ({guess})' if guess else ''}: correct the boxes, or the listed image sizes"
    )


def _refuse_unusable_boxes(split: Split) -> None:
    """Check that some boxes are in pixels of the image files.

    Raises:
        UserError: all boxes are fractions, or most are outside their files.
    """
    source, count = split.annotations.source, len(split.annotations.labels)
    if _in_fractions(split.annotations).all():
        raise UserError(
            f"{source}: all {count} boxes look like fractions, the first is {split.box_finding(0)}: bbox is in pixels, "
            "so scale them by the width and height of the image"
        )
    rows, _ = _boxes_with_sizes(split)
    outside = _outside_files(split)[rows]
    if outside.sum() > len(rows) / 2:  # then the others are in wrong places, too
        raise UserError(
            f"{source}: {outside.sum()} of {len(rows)} boxes that were tried are outside the pixels of their image "
            f"files, the first: {next(find_boxes_outside_files(split))}; give boxes in pixels of the files"
        )
