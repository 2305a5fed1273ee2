"""What is wrong with a data set: the cheap part at the start of each run, and what only reading every image shows.

The cheap part works on arrays that are read already, tries a few images, and takes below two seconds for COCO. `KINDS`
lists every kind of finding; `tools/check_dataset.py` writes them all to a file.
"""

import filecmp
import hashlib
import os
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets.images.image_folder import ImageFile, open_file, open_image
from datasets.labelled.annotations import Annotations
from datasets.sample import BadImageError, SampleDataset
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRandom

TRIED_IMAGES, TRIED_SECONDS = 8, 2.0  # of each split at the start of a run
COMPARED_PAIRS = 16  # images with the same name in both splits
TINY_SIDE = 16  # pixels; pre-training leaves out what is not larger
EXIF_ORIENTATION = 0x0112

# kind -> (how bad, what it means). A "problem" makes numbers wrong or is left out; a "warning" is worth a look; "info"
# is only counted.
KINDS: dict[str, tuple[str, str]] = {
    "unusable": ("problem", "the data set can't be read at all"),
    "image absent": ("problem", "listed, but there is no such file"),
    "image unreadable": ("problem", "can't be decoded; training takes the next image instead"),
    "image tiny": ("problem", f"a side of {TINY_SIDE} pixels or less"),
    "size differs": ("problem", "pixels are not those that the annotations state; training leaves the image out"),
    "shared image": ("problem", "the same pixels in training and validation"),
    "image not listed": ("problem", "an annotation of an image that the file does not list"),
    "box not finite": ("problem", "NaN or infinity in a box, which is left out"),
    "box without area": ("problem", "width or height of 0 or less; the box is left out"),
    "box outside image": ("problem", "nothing of the box is in its image; it is left out"),
    "category not listed": (
        "problem",
        "a class that the file does not list is not evaluated; own data with one are refused",
    ),
    "category out of range": ("problem", "needs a larger --num_classes"),
    "more objects than queries": ("problem", "needs a larger --num_queries"),
    "box partly outside": ("warning", "cut to its image in training"),
    "box twice": ("warning", "the same class and box twice in an image"),
    "file name twice": ("warning", "two entries of one file"),
    "duplicate image": ("warning", "the same pixels twice in a split"),
    "rotated by EXIF": ("warning", "viewers turn it, training takes the pixels as they are stored: compare its boxes"),
    "classes differ": ("warning", "the classes of training and validation do not agree"),
    "other extension": ("info", "the file's format is not what its name says; it is read all the same"),
    "no objects": ("info", "an image without boxes"),
}


@dataclass(frozen=True)
class Problem:
    """One finding: its kind (a key of KINDS), split ("train" or "val"), file, ids where there are any, and what was
    seen.
    """

    kind: str
    split: str
    file: str
    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]


# ---------------------------------------------------------------------------------------------------- at the start of a
# run


def check_at_start(train: SampleDataset | None, val: SampleDataset | None, args: Namespace) -> dict[str, object]:
    """The cheap part; logs a line for each thing that a user should know, and returns the facts for `args.json`.

    `train` is None in evaluation, `val` in pre-training. Data sets without an attribute `annotations` are only tried.

    Raises:
        UserError: none of the images that were tried can be used, or there is no box to train on.
    """
    splits = {name: dataset for name, dataset in (("train", train), ("val", val)) if dataset is not None}
    facts: dict[str, object] = {}
    warned: list[str] = []
    told = 0  # what reading the annotations has warned of already
    for name, dataset in splits.items():
        warned += try_images(dataset)
        facts[name] = {"images": len(dataset)}
        if is_labelled(dataset):
            facts[name].update(describe(dataset.annotations))
            told += len(dataset.annotations.findings.keys() - {"box partly outside"})
            warned += _check_annotations(dataset.annotations, name == "train", args.num_queries)
    if len(splits) == 2 and all(map(is_labelled, splits.values())):
        warned += compare_classes(train, val) + shared_images(train, val)
    for line in warned:
        log.warning("%s", line)
    number = told + len(warned)
    log.info(
        "data check: %s",
        f"warnings: {number}; python tools/check_dataset.py reads every image and lists all"
        if number
        else "nothing to warn of",
    )
    return {**facts, "warnings": warned}


def is_labelled(dataset: SampleDataset) -> bool:
    """Whether it has `annotations` that can be checked."""
    return isinstance(getattr(dataset, "annotations", None), Annotations)


def try_images(dataset: SampleDataset) -> list[str]:
    """Makes samples of a few images that are evenly spread, for TRIED_SECONDS at most.

    Returns a warning where some can't be used.

    Raises:
        UserError: none can be used.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, TRIED_IMAGES).round().astype(int)).tolist()
    began, tried, bad = time.monotonic(), 0, []
    for index in indices:
        if tried and time.monotonic() - began > TRIED_SECONDS:
            break
        tried += 1
        try:
            dataset.load(index, SampleRandom.of(dataset.seed, 0, index))
        except BadImageError as error:
            bad.append(f"{dataset.path(index)}: {error}")
    # One slow image alone says nothing of a large data set.
    if len(bad) == tried and (tried == len(indices) or tried > 1):
        raise UserError(
            f"none of {tried} images that were tried can be used, the first is {bad[0]}; check the image folder"
        )
    if bad:
        return [
            f"{len(bad)} of {tried} images that were tried can't be used, the first is {bad[0]}; others will take "
            f"their place"
        ]
    return []


def describe(annotations: Annotations) -> dict[str, object]:
    """Numbers of a split for the record of a run."""
    counts = np.diff(annotations.offsets)
    return {
        "boxes": len(annotations.labels),
        "classes": len(annotations.class_names),
        "images_without_objects": int((counts == 0).sum()),
        "most_objects_in_an_image": int(counts.max(initial=0)),
        "found": {kind: len(ids) for kind, (ids, _) in annotations.findings.items()},
    }


def _check_annotations(annotations: Annotations, is_train: bool, num_queries: int) -> list[str]:
    """Raises UserError where a training set has no box."""
    source, warned = annotations.source, []
    if not len(annotations.labels):
        if is_train:
            raise UserError(
                f"{source} has no box that can be trained on: look at its annotations, or pre-train without labels "
                f"by main.py"
            )
        warned.append(f"{source} has no box: AP will be -1")
    counts = np.diff(annotations.offsets)
    over = np.flatnonzero(counts > num_queries)
    if len(over):
        most = int(counts.argmax())
        warned.append(
            f"{source}: {len(over)} images have more objects than --num_queries {num_queries}, image "
            f"{annotations.image_ids[most]} has {counts[most]}: what is beyond can't be found; use --num_queries "
            f"{counts[most]} or more"
        )
    partly = annotations.findings.get("box partly outside")
    if partly:
        annotation, image = partly[0][0]
        warned.append(
            f"{source}: {len(partly[0])} boxes stand over the edge of their image and are cut to it, the first is "
            f"annotation {annotation} of image {image}"
        )
    twice = [name for name, number in Counter(names_of(annotations)).items() if number > 1]
    if twice:
        warned.append(
            f"{source}: {len(twice)} files are listed by several images, the first is {twice[0]}: keep one entry a file"
        )
    return warned


def names_of(annotations: Annotations) -> list[str]:
    """The file name of every image."""
    return [annotations.file_names[i] for i in range(len(annotations))]


def compare_classes(train: SampleDataset, val: SampleDataset) -> list[str]:
    """Warnings about classes of two labelled sets that should be the same."""
    warned = []
    differing = [label for label, name in val.class_names.items() if train.class_names.get(label, name) != name]
    if differing:
        label = differing[0]
        warned.append(
            f"class {label} is '{train.class_names[label]}' in {train.annotations.source} and "
            f"'{val.class_names[label]}' in {val.annotations.source} ({len(differing)} ids differ): AP will mean "
            "little; use one list of categories"
        )
    missing = np.setdiff1d(val.annotations.labels, train.annotations.labels)
    if len(missing):
        names = ", ".join(val.class_names.get(int(label), str(label)) for label in missing[:3])
        warned.append(
            f"{len(missing)} classes with boxes in {val.annotations.source} have none in {train.annotations.source} "
            f"({names}): they can't be learnt"
        )
    return warned


def shared_images(train: SampleDataset, val: SampleDataset) -> list[str]:
    """Images with one name in both splits, if those that are compared are the same: many data sets number both from
    1.
    """
    rows = {os.path.basename(name): row for row, name in enumerate(names_of(train.annotations))}
    pairs = [
        (rows[os.path.basename(name)], row)
        for row, name in enumerate(names_of(val.annotations))
        if os.path.basename(name) in rows
    ]
    compared = (
        [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, COMPARED_PAIRS).astype(int))] if pairs else []
    )
    same = [(i, j) for i, j in compared if same_file(train.path(i), val.path(j))]
    if not same:
        return []
    number = len(pairs) if len(same) == len(compared) else len(same)
    i, j = same[0]
    exact = "" if len(compared) == len(pairs) else f" ({len(compared)} of {len(pairs)} with one name were compared)"
    ids = f"image {val.annotations.image_ids[j]}; in training {train.annotations.image_ids[i]}"
    return [
        f"{number} images of validation are training images too{exact}, the first is {val.path(j)} ({ids}): AP will "
        "be too good; take them out of one of both"
    ]


def same_file(first: str, second: str) -> bool:
    """Whether two files are one, or have the same content; False where one can't be read."""
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------- every image


@dataclass(frozen=True)
class ImageFacts:
    """What reading a file shows: (height, width) and a digest of the pixels as `open_image` gives them, the EXIF
    orientation that it ignores (1: none), format; or the error."""

    size_hw: tuple[int, int] = (0, 0)
    digest: bytes = b""
    orientation: int = 1
    format: str = ""
    error: str = ""


def inspect_image(file: ImageFile) -> ImageFacts:
    """Decodes one file as training does. It never raises for a bad file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata would come without the file's name
        try:
            pixels = open_image(file)
            with Image.open(open_file(file)) as image:
                orientation, kind = _orientation(image), image.format or ""
        except (BadImageError, OSError) as error:
            return ImageFacts(error=str(error))
    digest = hashlib.blake2b(
        pixels.tobytes(), digest_size=16, salt=f"{pixels.width}x{pixels.height}".encode()[:16]
    ).digest()
    return ImageFacts((pixels.height, pixels.width), digest, orientation, kind)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow has turned its pixels
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata raise any type, and the pixels are fine
        return 1


def image_problems(
    facts: ImageFacts,
    path: str,
    split: str,
    listed_hw: tuple[int, int] = (0, 0),
    image_id: int | None = None,
) -> Iterator[Problem]:
    """What is wrong with one image; `listed_hw`: (height, width) that the annotations state, 0 where they do not."""

    def problem(kind: str, detail: str) -> Problem:
        return Problem(kind, split, path, detail, image_id)

    if facts.error:
        yield problem("image unreadable", facts.error)
        return
    height, width = facts.size_hw
    if min(facts.size_hw) <= TINY_SIDE:
        yield problem("image tiny", f"{width} x {height} pixels")
    turned = facts.orientation not in (0, 1)
    if all(listed_hw) and tuple(listed_hw) != facts.size_hw:
        hint = (
            " (as if turned by EXIF: annotate or save it as stored)"
            if turned and tuple(listed_hw) == facts.size_hw[::-1]
            else ""
        )
        yield problem("size differs", f"{width} x {height} pixels, listed as {listed_hw[1]} x {listed_hw[0]}{hint}")
    if turned:
        yield problem("rotated by EXIF", f"orientation {facts.orientation}")
    extension = os.path.splitext(path)[1].lower()
    expected = Image.registered_extensions().get(extension, "")
    if {facts.format, expected} not in (
        {facts.format},
        {"JPEG", "MPO"},
    ):  # MPO: a camera's JPEG with a preview behind it
        yield problem("other extension", f"{facts.format} named {extension or 'without extension'}")


def duplicates(facts: Sequence[ImageFacts]) -> dict[bytes, list[int]]:
    """Digest -> indices of the images with these pixels, in order."""
    groups: dict[bytes, list[int]] = {}
    for index, found in enumerate(facts):
        if not found.error:
            groups.setdefault(found.digest, []).append(index)
    return groups


def annotation_problems(dataset: SampleDataset, split: str, num_queries: int, num_classes: int) -> Iterator[Problem]:
    """What is wrong with the boxes and the list of images of a labelled split, each with its ids."""
    annotations: Annotations = dataset.annotations
    for kind, (ids, names) in annotations.findings.items():
        for row, (annotation_id, image_id) in enumerate(ids.tolist()):
            file = os.path.join(dataset.image_folder, names[row]) if names[row] else annotations.source
            yield Problem(kind, split, file, "", image_id, annotation_id if annotation_id >= 0 else None)
    counts, ids = np.diff(annotations.offsets), annotations.image_ids
    image_of = np.repeat(np.arange(len(annotations)), counts)

    def at(kind: str, images: np.ndarray, details: Sequence[str]) -> Iterator[Problem]:
        for image, detail in zip(images.tolist(), details, strict=True):
            yield Problem(kind, split, dataset.path(image), detail, int(ids[image]))

    over = np.flatnonzero(counts > num_queries)
    yield from at(
        "more objects than queries", over, [f"{counts[i]} objects, --num_queries {num_queries}" for i in over]
    )
    labels, boxes = annotations.labels, annotations.boxes_xyxy_abs
    rows = np.flatnonzero(labels >= num_classes)
    yield from at(
        "category out of range", image_of[rows], [f"category id {labels[r]}, --num_classes {num_classes}" for r in rows]
    )
    _, first = np.unique(np.column_stack([image_of, labels, boxes]), axis=0, return_index=True)
    again = np.setdiff1d(np.arange(len(boxes)), first)
    names = annotations.class_names
    yield from at(
        "box twice", image_of[again], [f"{names.get(int(labels[r]), labels[r])}, {_box_text(boxes[r])}" for r in again]
    )
    empty = np.flatnonzero(counts == 0)
    yield from at("no objects", empty, [""] * len(empty))
    yield from _names_twice(dataset, split)


def _box_text(box_xyxy_abs: np.ndarray) -> str:
    x0, y0, x1, y1 = box_xyxy_abs.tolist()
    return f"bbox [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"


def _names_twice(dataset: SampleDataset, split: str) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for image, name in enumerate(names_of(dataset.annotations)):
        if first.setdefault(name, image) != image:
            yield Problem(
                "file name twice",
                split,
                dataset.path(image),
                f"also image {dataset.annotations.image_ids[first[name]]}",
                int(dataset.annotations.image_ids[image]),
            )
