"""Checks of a dataset: one small function per kind of finding, listed in a table.

At its start, each run calls the checks that need only the annotations, and loads a few images. This takes less than two
seconds for COCO. `tools/check_dataset.py` also decodes every image, and lists all findings.
"""

import filecmp
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images.image_folder import ImageFile, ImageFiles, open_file, open_image
from datasets.labelled.annotations import Annotations
from datasets.sample import BadImageError, SampleDataset
from util.checkpoints.classes import fold_class_name
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRNG
from util.settings import Settings

PROBED_IMAGES = 8  # images of each split that are loaded at the start of a run
PROBE_SECONDS = 2.0  # stop loading them after this time
COMPARED_PAIRS = 16  # pairs of images with the same name in both splits whose files are compared
EXIF_ORIENTATION = 0x0112  # tag number in the EXIF standard


@dataclass(frozen=True)
class ImageInfo:
    """What decoding an image file shows.

    Attributes:
        size_hw: (height, width) in pixels, as `open_image` returns the image.
        digest: hash of these pixels and their size.
        orientation: EXIF orientation, which `open_image` ignores; 1 means not rotated.
        error: why the file can't be decoded; empty if it can.
    """

    size_hw: tuple[int, int] = (0, 0)
    digest: bytes = b""
    orientation: int = 1
    error: str = ""


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


@dataclass
class Split:
    """The images of "train" or "val", with what the checks need to know of the detector.

    Attributes:
        num_queries, num_classes: the most objects and classes that the detector can predict.
        image_infos: one per image; empty if only the annotations are checked.
    """

    name: str
    images: SampleDataset | ImageFiles
    num_queries: int = 0
    num_classes: int = 0
    image_infos: list[ImageInfo] = field(default_factory=list)

    @cached_property
    def annotations(self) -> Annotations | None:
        """Annotations of the images; None for unlabelled images."""
        found = getattr(self.images, "annotations", None)
        return found if isinstance(found, Annotations) else None

    def file(self, index: int) -> ImageFile:
        """Return what to decode: a path, or a member of a tar file."""
        if isinstance(self.images, ImageFiles):
            return self.images.file(index)
        return self.images.path(index)

    def finding(self, index: int, detail: str = "") -> Finding:
        """Return a finding in one image. Its kind is empty; `run_checks` adds it."""
        image_id = int(self.annotations.image_ids[index]) if self.annotations is not None else None
        return Finding("", self.name, self.images.path(index), detail, image_id)


# -------------------------------------------------------------------------------------------------------------- images


def find_unreadable_images(split: Split) -> Iterator[Finding]:
    for index, info in enumerate(split.image_infos):
        if info.error:
            yield split.finding(index, info.error)


def _readable(split: Split) -> Iterator[tuple[int, ImageInfo]]:
    return ((index, info) for index, info in enumerate(split.image_infos) if not info.error)


def find_size_mismatches(split: Split) -> Iterator[Finding]:
    if split.annotations is None:
        return
    for index, info in _readable(split):
        listed, found = tuple(split.annotations.sizes_hw[index].tolist()), info.size_hw
        # A listed size of 0 means that the annotations do not state it.
        if all(listed) and listed != found:
            rotated = info.orientation > 1 and listed == found[::-1]
            hint = " (as if rotated by EXIF: annotate or save it as stored)" if rotated else ""
            yield split.finding(
                index, f"{found[1]} x {found[0]} pixels, listed as {listed[1]} x {listed[0]}{hint}"
            )


def find_exif_rotations(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.orientation > 1:
            yield split.finding(index, f"orientation {info.orientation}")


def find_duplicate_images(split: Split) -> Iterator[Finding]:
    for first, *others in group_by_pixels(split).values():
        for other in others:
            yield split.finding(other, f"same as {split.images.path(first)}")


def group_by_pixels(split: Split) -> dict[bytes, list[int]]:
    """Return digest -> indices of the images with these pixels, in ascending order."""
    groups: dict[bytes, list[int]] = {}
    for index, info in _readable(split):
        groups.setdefault(info.digest, []).append(index)
    return groups


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
        x0, y0, x1, y1 = annotations.boxes_xyxy_abs[row].tolist()
        name = annotations.class_names[int(annotations.labels[row])]
        detail = f"{name}, bbox [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"
        yield split.finding(annotations.image_indices[row], detail)


def find_duplicate_file_names(split: Split) -> Iterator[Finding]:
    """Yield one finding per file, at the second image that lists it."""
    images: dict[str, list[int]] = {}
    for index, name in enumerate(split.annotations.file_names):
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


def find_shared_images(train: Split, val: Split) -> Iterator[Finding]:
    """Yield the validation images that are in the training set, too.

    If all images were decoded, their pixels are compared. Otherwise a few images with the same name in both splits are
    compared: many datasets number both splits from 1, so the name alone says nothing.
    """
    if train.image_infos and val.image_infos:
        pairs = _pairs_with_same_pixels(train, val)
    else:
        pairs = _pairs_with_same_file(train, val)
    for in_train, in_val in pairs:
        yield val.finding(in_val, f"same as {train.finding(in_train)}")


def _pairs_with_same_pixels(train: Split, val: Split) -> Iterator[tuple[int, int]]:
    in_train = group_by_pixels(train)
    for digest, indices in group_by_pixels(val).items():
        if digest in in_train:
            yield from ((in_train[digest][0], index) for index in indices)


def _pairs_with_same_file(train: Split, val: Split) -> Sequence[tuple[int, int]]:
    """Return (index in train, index in val) of images with the same name and file.

    Only COMPARED_PAIRS evenly spaced pairs with the same name are compared. If all of them are the same file, all pairs
    count; otherwise only those that were found to be the same.
    """
    rows = {os.path.basename(name): row for row, name in enumerate(train.annotations.file_names)}
    names = [os.path.basename(name) for name in val.annotations.file_names]
    pairs = [(rows[name], row) for row, name in enumerate(names) if name in rows]
    if not pairs:
        return []

    compared = np.unique(np.linspace(0, len(pairs) - 1, COMPARED_PAIRS).astype(int))
    same = [
        pairs[i]
        for i in compared
        if is_same_file(train.images.path(pairs[i][0]), val.images.path(pairs[i][1]))
    ]
    return pairs if len(same) == len(compared) else same


def is_same_file(first: str, second: str) -> bool:
    """Return whether two paths are the same file, or have the same content. False if one can't be read."""
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


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
        find=find_exif_rotations,
        meaning="training uses the pixels as stored: check that the boxes fit",
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
        kind="category not listed",
        severity="problem",
        find=None,
        meaning="not evaluated; --dataset_file custom refuses the file",
    ),
    Check(
        kind="category out of range",
        severity="problem",
        find=find_labels_out_of_range,
        meaning="needs a larger --num_classes",
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
        find=None,
        meaning="clipped to its image in training",
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
)
PAIR_CHECKS = (
    Check(
        kind="shared image",
        severity="problem",
        find=find_shared_images,
        meaning="in both splits, which makes AP too high: remove it from one",
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

# The parser logs what it skips. It keeps boxes that are only partly outside, and does not log them.
LOGGED_BY_PARSER = {check.kind for check in CHECKS if check.find is None} - {"box partly outside"}


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
        UserError: none of the images that were loaded can be used, or the training set has no box.
    """
    splits = [
        Split(name, dataset, settings.num_queries, getattr(dataset, "num_classes", 0))
        for name, dataset in (("train", train), ("val", val))
        if dataset is not None
    ]
    record: dict[str, object] = {split.name: {"images": len(split.images)} for split in splits}
    warned = [line for split in splits for line in probe_images(split.images)]

    logged_by_parser = 0  # kinds of findings
    for split in splits:
        if split.annotations is not None:
            record[split.name].update(summarize_annotations(split.annotations))
            logged_by_parser += len(split.annotations.findings.keys() & LOGGED_BY_PARSER)
            warned += _check_has_boxes(split)

    checks = [
        check for check in CHECKS if check.severity != "info" and check.kind not in LOGGED_BY_PARSER
    ]
    for kind, group in groupby(run_checks(splits, checks), key=lambda finding: finding.kind):
        warned.append(_format_findings(KINDS[kind], list(group)))

    for line in warned:
        log.warning("%s", line)
    _log_summary(logged_by_parser + len(warned))
    return {**record, "warnings": warned}


def _format_findings(check: Check, findings: Sequence[Finding]) -> str:
    return f"{check.kind}: {len(findings)} ({check.meaning}), the first: {findings[0]}"


def _log_summary(num_warnings: int) -> None:
    if num_warnings:
        log.info(
            "data check: %d warning(s); python tools/check_dataset.py reads every image and lists all findings",
            num_warnings,
        )
    else:
        log.info("data check: no warnings")


def probe_images(dataset: SampleDataset) -> list[str]:
    """Load a few evenly spaced images, for at most PROBE_SECONDS.

    Returns:
        A warning if some of them can't be used, else an empty list.

    Raises:
        UserError: none of them can be used.
    """
    indices = np.linspace(0, len(dataset) - 1, PROBED_IMAGES).round().astype(int)
    indices = np.unique(indices).tolist()
    start = time.monotonic()
    tried, bad = 0, []
    for index in indices:
        if tried and time.monotonic() - start > PROBE_SECONDS:
            break
        tried += 1
        try:
            dataset.load(index, SampleRNG.from_key(dataset.seed, 0, index))
        except BadImageError as error:
            bad.append(f"{dataset.path(index)}: {error}")

    # If the time was up after a single slow image, that image says nothing about a large dataset.
    if len(bad) == tried and (tried == len(indices) or tried > 1):
        raise UserError(
            f"none of {tried} images that were tried can be used, the first is {bad[0]}; check the image folder"
        )
    if not bad:
        return []
    return [
        f"{len(bad)} of {tried} images that were tried can't be used, the first is {bad[0]}; other images are used "
        "instead"
    ]


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


def _check_has_boxes(split: Split) -> list[str]:
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
    return [f"{source} has no box: AP will be -1"]


# --------------------------------------------------------------------------------------------------------- every image


def inspect_image(file: ImageFile) -> ImageInfo:
    """Decode an image file as training does. A bad file never raises: its error is in the result."""
    with warnings.catch_warnings():
        # Pillow warns of unusual metadata without naming the file.
        warnings.simplefilter("ignore")
        try:
            pixels = open_image(file)
            with Image.open(open_file(file)) as image:
                orientation = _read_exif_orientation(image)
        except (BadImageError, OSError) as error:
            return ImageInfo(error=str(error))

    # The size is part of the hash: images of different shapes may have the same bytes. A salt has at most 16 bytes.
    salt = f"{pixels.width}x{pixels.height}".encode()[:16]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=salt).digest()
    return ImageInfo((pixels.height, pixels.width), digest, orientation)


def _read_exif_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow has already rotated its pixels
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata raise any type, and the pixels are fine
        return 1
