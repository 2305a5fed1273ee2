"""What is wrong with a dataset: one small function for each kind of finding, and its line in a table.

The start of each run calls the checks on arrays that are read already, and tries a few images: below two seconds for
COCO. `tools/check_dataset.py` decodes every image as well and lists all findings.
"""

import filecmp
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images.image_folder import ImageFile, ImageFiles, open_file, open_image
from datasets.labelled.annotations import Annotations
from datasets.sample import BadImageError, SampleDataset
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRNG
from util.settings import Settings

PROBED_IMAGES, PROBE_SECONDS = 8, 2.0  # of each split at the start of a run
COMPARED_PAIRS = 16  # images with the same name in both splits
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageInfo:
    """What decoding a file shows: (height, width) and a digest of the pixels as `open_image` gives them, the EXIF
    orientation that it ignores (1: none); or the error."""

    size_hw: tuple[int, int] = (0, 0)
    digest: bytes = b""
    orientation: int = 1
    error: str = ""


class Finding(NamedTuple):
    """One finding: kind (a key of KINDS), split ("train" or "val"), file, what was seen, and ids where known."""

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
        parts = [
            self.file,
            *(f"{name} {number}" for name, number in ids.items() if number is not None),
            self.detail,
        ]
        return ", ".join(part for part in parts if part)


@dataclass
class Split:
    """The images of "train" or "val". num_queries, num_classes: as many objects and classes as the detector can find.

    facts: of each image, empty where only annotations are checked.
    """

    name: str
    images: SampleDataset | ImageFiles
    num_queries: int = 0
    num_classes: int = 0
    facts: list[ImageInfo] = field(default_factory=list)

    @cached_property
    def annotations(self) -> Annotations | None:
        """None of unlabelled images."""
        found = getattr(self.images, "annotations", None)
        return found if isinstance(found, Annotations) else None

    def file(self, index: int) -> ImageFile:
        """What is decoded, where that is not the path: an image may lie in a tar file."""
        return (
            self.images.file(index)
            if isinstance(self.images, ImageFiles)
            else self.images.path(index)
        )

    def finding(self, index: int, detail: str = "") -> Finding:
        """Of one image; `run_checks` adds the kind."""
        image_id = int(self.annotations.image_ids[index]) if self.annotations is not None else None
        return Finding("", self.name, self.images.path(index), detail, image_id)


# ------------------------------------------------------------------------------------------------------------ images


def find_unreadable_images(split: Split) -> Iterator[Finding]:
    return (
        split.finding(index, facts.error) for index, facts in enumerate(split.facts) if facts.error
    )


def _readable(split: Split) -> Iterator[tuple[int, ImageInfo]]:
    return ((index, facts) for index, facts in enumerate(split.facts) if not facts.error)


def find_size_mismatches(split: Split) -> Iterator[Finding]:
    """Sizes of 0: the annotations do not state them."""
    if split.annotations is None:
        return
    for index, facts in _readable(split):
        listed, found = tuple(split.annotations.sizes_hw[index].tolist()), facts.size_hw
        if all(listed) and listed != found:
            turned = facts.orientation > 1 and listed == found[::-1]
            hint = " (as if turned by EXIF: annotate or save it as stored)" if turned else ""
            yield split.finding(
                index, f"{found[1]} x {found[0]} pixels, listed as {listed[1]} x {listed[0]}{hint}"
            )


def find_exif_rotations(split: Split) -> Iterator[Finding]:
    for index, facts in _readable(split):
        if facts.orientation > 1:
            yield split.finding(index, f"orientation {facts.orientation}")


def find_duplicate_images(split: Split) -> Iterator[Finding]:
    for first, *others in group_by_pixels(split).values():
        for other in others:
            yield split.finding(other, f"as {split.images.path(first)}")


def group_by_pixels(split: Split) -> dict[bytes, list[int]]:
    """Digest -> indices of the images with these pixels, in order."""
    groups: dict[bytes, list[int]] = {}
    for index, facts in _readable(split):
        groups.setdefault(facts.digest, []).append(index)
    return groups


# ------------------------------------------------------------------------------------------------------- annotations


def findings_of_parser(kind: str, split: Split) -> Iterator[Finding]:
    """What `datasets.labelled.annotations` noted down."""
    ids, names = split.annotations.findings.get(kind, (np.zeros((0, 2)), ()))
    for (annotation_id, image_id), name in zip(ids.tolist(), names, strict=True):
        file = os.path.join(split.images.image_folder, name) if name else split.annotations.source
        yield Finding(
            "", split.name, file, "", image_id, annotation_id if annotation_id >= 0 else None
        )


def find_labels_out_of_range(split: Split) -> Iterator[Finding]:
    labels = split.annotations.labels
    for row in np.flatnonzero(labels >= split.num_classes):
        detail = f"category id {labels[row]}, --num_classes {split.num_classes}"
        yield split.finding(split.annotations.image_indices[row], detail)


def find_more_objects_than_queries(split: Split) -> Iterator[Finding]:
    """The image with the most objects first."""
    counts = np.diff(split.annotations.offsets)
    over = np.flatnonzero(counts > split.num_queries)
    for index in over[np.argsort(-counts[over], kind="stable")]:
        yield split.finding(index, f"{counts[index]} objects, --num_queries {split.num_queries}")


def find_duplicate_boxes(split: Split) -> Iterator[Finding]:
    annotations = split.annotations
    bits = (annotations.boxes_xyxy_abs + 0).view(np.int32)  # + 0: there are two zeros
    rows = np.column_stack([annotations.image_indices, annotations.labels, bits])
    hashes = rows @ np.random.default_rng(0).integers(
        2**62, size=6
    )  # one number sorts faster than six
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
    """One finding for each file, at the second image that lists it."""
    images: dict[str, list[int]] = {}
    for index, name in enumerate(split.annotations.file_names):
        images.setdefault(name, []).append(index)
    for first, *others in images.values():
        if others:
            detail = f"also image {split.annotations.image_ids[first]}" + (
                ", ..." if others[1:] else ""
            )
            yield split.finding(others[0], detail)


def find_images_without_objects(split: Split) -> Iterator[Finding]:
    return (
        split.finding(index) for index in np.flatnonzero(np.diff(split.annotations.offsets) == 0)
    )


# ---------------------------------------------------------------------------------------------- training and validation


def find_shared_images(train: Split, val: Split) -> Iterator[Finding]:
    """By pixels where all images were decoded; else a few of those with one name in both splits are compared, since
    many datasets number both from 1.
    """
    pairs = (
        _pairs_with_same_pixels(train, val)
        if train.facts and val.facts
        else _pairs_with_same_file(train, val)
    )
    for in_train, in_val in pairs:
        yield val.finding(in_val, f"as {train.finding(in_train)}")


def _pairs_with_same_pixels(train: Split, val: Split) -> Iterator[tuple[int, int]]:
    in_train = group_by_pixels(train)
    for digest, indices in group_by_pixels(val).items():
        if digest in in_train:
            yield from ((in_train[digest][0], index) for index in indices)


def _pairs_with_same_file(train: Split, val: Split) -> list[tuple[int, int]]:
    """All pairs with one name if those that are compared are all the same, else the same ones of these."""
    rows = {os.path.basename(name): row for row, name in enumerate(train.annotations.file_names)}
    names = [os.path.basename(name) for name in val.annotations.file_names]
    pairs = [(rows[name], row) for row, name in enumerate(names) if name in rows]
    chosen = np.unique(np.linspace(0, len(pairs) - 1, COMPARED_PAIRS).astype(int)) if pairs else []
    same = [
        pairs[i]
        for i in chosen
        if is_same_file(train.images.path(pairs[i][0]), val.images.path(pairs[i][1]))
    ]
    return pairs if same and len(same) == len(chosen) else same


def is_same_file(first: str, second: str) -> bool:
    """Whether two files are one, or have the same content; False where one can't be read."""
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


def find_class_mismatches(train: Split, val: Split) -> Iterator[Finding]:
    names, others = train.annotations.class_names, val.annotations.class_names
    for label, name in others.items():
        if names.get(label, name) != name:
            detail = (
                f"class {label} is '{names[label]}' in {train.annotations.source} and '{name}' here"
            )
            yield Finding("", val.name, val.annotations.source, detail)

    missing = [
        others[label]
        for label in np.setdiff1d(val.annotations.labels, train.annotations.labels).tolist()
    ]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        detail = (
            f"{len(missing)} classes have boxes here and none in {train.annotations.source}: {some}"
        )
        yield Finding("", val.name, val.annotations.source, detail)


# ---------------------------------------------------------------------------------------------------------- the table


class Check(NamedTuple):
    """severity: a "problem" makes metrics wrong or is skipped; a "warning" is worth a look; "info" is only counted.
    find: findings of a split, or of training and validation; None: reading has noted them down (`findings_of_parser`).
    """

    kind: str
    severity: str
    find: Callable[..., Iterator[Finding]] | None
    meaning: str


IMAGE_CHECKS = (
    Check(
        "image unreadable",
        "problem",
        find_unreadable_images,
        "can't be decoded; training takes the next image instead",
    ),
    Check(
        "size differs",
        "problem",
        find_size_mismatches,
        "not the size in the annotations; training skips the image",
    ),
    Check("duplicate image", "warning", find_duplicate_images, "the same pixels twice in a split"),
    Check(
        "rotated by EXIF",
        "warning",
        find_exif_rotations,
        "training takes the pixels as stored: compare its boxes",
    ),
)
ANNOTATION_CHECKS = (
    Check("unusable", "problem", None, "the dataset can't be read at all"),
    Check("image absent", "problem", None, "listed, but there is no such file"),
    Check(
        "image not listed", "problem", None, "an annotation of an image that the file does not list"
    ),
    Check("box not finite", "problem", None, "NaN or infinity in a box, which is skipped"),
    Check("box without area", "problem", None, "width or height of 0 or less; the box is skipped"),
    Check(
        "box outside image", "problem", None, "nothing of the box is in its image; it is skipped"
    ),
    Check(
        "category not listed",
        "problem",
        None,
        "not evaluated; --dataset_file custom refuses the file",
    ),
    Check(
        "category out of range", "problem", find_labels_out_of_range, "needs a larger --num_classes"
    ),
    Check(
        "more objects than queries",
        "problem",
        find_more_objects_than_queries,
        "needs a larger --num_queries to find them",
    ),
    Check("box partly outside", "warning", None, "clipped to its image in training"),
    Check("box twice", "warning", find_duplicate_boxes, "the same class and box twice in an image"),
    Check(
        "file name twice",
        "warning",
        find_duplicate_file_names,
        "several images list one file: keep one entry",
    ),
    Check("no objects", "info", find_images_without_objects, "an image without boxes"),
)
PAIR_CHECKS = (
    Check(
        "shared image",
        "problem",
        find_shared_images,
        "in both splits, AP will be too good: remove it from one",
    ),
    Check(
        "classes differ",
        "warning",
        find_class_mismatches,
        "AP will mean little: use one list of categories",
    ),
)
SEVERITIES = ("problem", "warning", "info")
CHECKS = sorted(
    (*IMAGE_CHECKS, *ANNOTATION_CHECKS, *PAIR_CHECKS),
    key=lambda check: SEVERITIES.index(check.severity),
)
KINDS = {check.kind: check for check in CHECKS}
LOGGED_BY_PARSER = {check.kind for check in CHECKS if check.find is None} - {"box partly outside"}


def run_checks(splits: Sequence[Split], checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Everything that is found, the worst kinds first. Splits without `facts` have no findings in their images."""
    labelled = [split for split in splits if split.annotations is not None]
    findings = []
    for check in checks:
        if check in PAIR_CHECKS:
            calls = [labelled] if len(labelled) == 2 else []
        else:
            calls = [[split] for split in (splits if check in IMAGE_CHECKS else labelled)]
        for given in calls:
            found = check.find(*given) if check.find else findings_of_parser(check.kind, *given)
            findings += [finding._replace(kind=check.kind) for finding in found]
    return findings


# ------------------------------------------------------------------------------------------------ at the start of a run


def run_startup_checks(
    train: SampleDataset | None, val: SampleDataset | None, settings: Settings
) -> dict[str, object]:
    """The checks that need no image, and a few images; logs a line for each kind of finding, and returns the facts for
    `settings.json`.

    `train` is None in evaluation, `val` in pre-training. Datasets without an attribute `annotations` are only tried.

    Raises:
        UserError: none of the images that were tried can be used, or there is no box to train on.
    """
    splits = [
        Split(name, dataset, settings.num_queries, getattr(dataset, "num_classes", 0))
        for name, dataset in (("train", train), ("val", val))
        if dataset is not None
    ]
    facts: dict[str, object] = {split.name: {"images": len(split.images)} for split in splits}
    warned = [line for split in splits for line in probe_images(split.images)]
    already = 0  # what reading the annotations has warned of
    for split in splits:
        if split.annotations is not None:
            facts[split.name].update(summarize_annotations(split.annotations))
            already += len(split.annotations.findings.keys() & LOGGED_BY_PARSER)
            warned += _check_has_boxes(split)
    checks = [
        check for check in CHECKS if check.severity != "info" and check.kind not in LOGGED_BY_PARSER
    ]
    for kind, group in groupby(run_checks(splits, checks), key=lambda finding: finding.kind):
        warned.append(_format_findings(KINDS[kind], list(group)))
    for line in warned:
        log.warning("%s", line)
    number = already + len(warned)
    log.info(
        "data check: %s",
        f"warnings: {number}; python tools/check_dataset.py reads every image and lists all"
        if number
        else "nothing to warn of",
    )
    return {**facts, "warnings": warned}


def _format_findings(check: Check, findings: Sequence[Finding]) -> str:
    return f"{check.kind}: {len(findings)} ({check.meaning}), the first: {findings[0]}"


def probe_images(dataset: SampleDataset) -> list[str]:
    """Makes samples of a few images that are evenly spread, for PROBE_SECONDS at most.

    Returns a warning where some can't be used.

    Raises:
        UserError: none can be used.
    """
    indices = np.unique(
        np.linspace(0, len(dataset) - 1, PROBED_IMAGES).round().astype(int)
    ).tolist()
    began, tried, bad = time.monotonic(), 0, []
    for index in indices:
        if tried and time.monotonic() - began > PROBE_SECONDS:
            break
        tried += 1
        try:
            dataset.load(index, SampleRNG.from_key(dataset.seed, 0, index))
        except BadImageError as error:
            bad.append(f"{dataset.path(index)}: {error}")
    # One slow image alone says nothing of a large dataset.
    if len(bad) == tried and (tried == len(indices) or tried > 1):
        raise UserError(
            f"none of {tried} images that were tried can be used, the first is {bad[0]}; check the image folder"
        )
    if not bad:
        return []
    first = f"the first is {bad[0]}; others will take their place"
    return [f"{len(bad)} of {tried} images that were tried can't be used, {first}"]


def summarize_annotations(annotations: Annotations) -> dict[str, object]:
    """Numbers of a split for the record of a run."""
    counts = np.diff(annotations.offsets)
    return {
        "boxes": len(annotations.labels),
        "classes": len(annotations.class_names),
        "images_without_objects": int((counts == 0).sum()),
        "most_objects_in_an_image": int(counts.max(initial=0)),
        "found": {kind: len(ids) for kind, (ids, _) in annotations.findings.items()},
    }


def _check_has_boxes(split: Split) -> list[str]:
    """Raises UserError where a training set has no box."""
    source = split.annotations.source
    if len(split.annotations.labels):
        return []
    if split.name == "train":
        raise UserError(
            f"{source} has no box that can be trained on: look at its annotations, or pre-train without labels by "
            "main.py"
        )
    return [f"{source} has no box: AP will be -1"]


# -------------------------------------------------------------------------------------------------------- every image


def inspect_image(file: ImageFile) -> ImageInfo:
    """Decodes one file as training does. It never raises for a bad file."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's remarks on odd metadata would come without the file's name
        try:
            pixels = open_image(file)
            with Image.open(open_file(file)) as image:
                orientation = _read_exif_orientation(image)
        except (BadImageError, OSError) as error:
            return ImageInfo(error=str(error))
    salt = f"{pixels.width}x{pixels.height}".encode()[:16]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=salt).digest()
    return ImageInfo((pixels.height, pixels.width), digest, orientation)


def _read_exif_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow has turned its pixels
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata raise any type, and the pixels are fine
        return 1
