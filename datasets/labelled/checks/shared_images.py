"""Images that the training and the validation split share: such copies make AP too high."""

import filecmp
import os
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from datasets.images.image_folder import file_size
from datasets.images.similar_images import similar_pairs
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.image_files import group_by_pixels
from datasets.labelled.checks.split import Split, evenly_spaced
from datasets.labelled.coco_json import read_json
from util.errors import UserError
from util.settings import Settings

COMPARED_PAIRS = 16  # pairs of images with the same name in both splits whose files are compared
COMPARED_FILES = 256  # validation images that are searched in the training set by their size
SEARCH_SECONDS = 0.3  # stop searching after this time
MAX_ANNOTATION_BYTES = 2**25  # of a training file that an evaluation reads for it
KEY_BYTES = 4096  # in the middle of two files of the same size, compared before the whole files


def find_shared_images(train: Split, val: Split) -> Iterator[Finding]:
    """Yield the validation images that are in the training set, too.

    If all images were decoded, their pixels are compared. Otherwise a few files with the same name or the same size in
    both splits are compared: many datasets number both splits from 1, so the name alone says nothing.
    """
    if train.image_infos and val.image_infos:
        pairs = _pairs_with_same_pixels(train, val)
    else:
        named = pairs_with_same_name(train, val)
        others = same_files(train.paths, val.paths, {row for _, row in named})
        pairs = [*named, *others]
    for in_train, in_val in pairs:
        yield val.finding(in_val, f"same as {train.finding(in_train)}")


def find_similar_images(train: Split, val: Split) -> Iterator[Finding]:
    """Yield the validation images that look like a training image and have other pixels. All were decoded."""
    if not (train.image_infos and val.image_infos):
        return
    same = {row for _, row in _pairs_with_same_pixels(train, val)}
    thumbnails = ([info.thumbnail for info in split.image_infos] for split in (train, val))
    for in_train, in_val in similar_pairs(*thumbnails, same):
        yield val.finding(in_val, f"looks like {train.finding(in_train)}")


def _pairs_with_same_pixels(train: Split, val: Split) -> list[tuple[int, int]]:
    in_train = group_by_pixels(train)
    return [
        (in_train[digest][0], index)
        for digest, indices in group_by_pixels(val).items()
        if digest in in_train
        for index in indices
    ]


def pairs_with_same_name(train: Split, val: Split) -> list[tuple[int, int]]:
    """Return (index in train, index in val) of images with the same name and file.

    Only COMPARED_PAIRS evenly spaced pairs with the same name are compared. If all of them are the same file, all pairs
    count; otherwise only those that were found to be the same.
    """
    rows = {os.path.basename(name): row for row, name in enumerate(train.annotations.file_names)}
    names = [os.path.basename(name) for name in val.annotations.file_names]
    pairs = [(rows[name], row) for row, name in enumerate(names) if name in rows]
    if not pairs:
        return []

    compared = evenly_spaced(len(pairs), COMPARED_PAIRS)
    same = [
        pairs[i]
        for i in compared
        if is_same_file(train.images.path(pairs[i][0]), val.images.path(pairs[i][1]))
    ]
    return pairs if len(same) == len(compared) else same


def same_files(
    train: Sequence[str], val: Sequence[str], skipped: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Return (index in train, index in val) of files with the same size and content, in any folder.

    At most COMPARED_FILES validation images are searched, for at most SEARCH_SECONDS: in a large training set only a
    random part of the files is looked at.

    Args:
        train, val: paths.
        skipped: indices in val that need no search.
    """
    deadline = time.monotonic() + SEARCH_SECONDS
    in_val: dict[int, list[int]] = {}  # file size -> indices
    for index in evenly_spaced(len(val), COMPARED_FILES):
        size = file_size(val[index])
        if size and index not in skipped and time.monotonic() < deadline:
            in_val.setdefault(size, []).append(index)
    if not in_val:
        return []

    # File size -> bytes from the middle -> indices in val.
    keys: dict[int, dict[bytes, list[int]]] = {}
    found: dict[int, int] = {}  # index in val -> index in train
    for index in np.random.default_rng(0).permutation(len(train)).tolist():
        if time.monotonic() > deadline:
            break
        path = train[index]
        size = file_size(path)
        if size not in in_val:
            continue
        if size not in keys:
            keys[size] = {}
            for row in in_val[size]:
                keys[size].setdefault(_middle(val[row], size), []).append(row)
        for row in keys[size].get(_middle(path, size), ()):
            if row not in found and is_same_file(path, val[row]):
                found[row] = index
    return [(found[row], row) for row in sorted(found)]


def find_evaluated_training_images(val: Split, settings: Settings) -> Iterator[Finding]:
    """Yield validation images that are training images of the evaluated checkpoint, if its files are known and here.

    As at the start of training, a sample is compared for a short time.
    """
    train = _training_files(settings)
    for in_train, in_val in same_files(train, val.paths) if train else []:
        yield val.finding(in_val, f"same as {train[in_train]}")


def _training_files(settings: Settings) -> list[str]:
    """Return the image files of the training annotations in the settings; none if reading them takes long."""
    folder, file = settings.train_images, settings.train_annotations
    if not folder or not file or not os.path.isdir(folder):
        return []
    try:
        if os.path.isdir(file):  # VOC's XML files, named like their images
            stems = {os.path.splitext(name)[0] for name in os.listdir(file)}
            names = [name for name in os.listdir(folder) if os.path.splitext(name)[0] in stems]
        elif 0 < (file_size(file) or 0) <= MAX_ANNOTATION_BYTES:
            images = read_json(file)["images"]
            names = [image["file_name"] for image in images]
        else:
            names = []
        return [os.path.join(folder, name) for name in names]
    except (OSError, UserError, KeyError, TypeError):
        return []  # an evaluation does not need the training set


def _middle(path: str, size: int) -> bytes:
    """Return a few bytes from the middle of a file; none if it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(max((size - KEY_BYTES) // 2, 0))
            return file.read(KEY_BYTES)
    except OSError:
        return b""


def is_same_file(first: str, second: str) -> bool:
    """Return whether two paths are the same file, or have the same content. False if one can't be read."""
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False
