"""Findings in image files. `datasets.labelled.checks` lists them in its table.

`tools/check_dataset.py` decodes every image of a split (`Split.image_infos`). The start of a run decodes a few and
reads the headers of some more (`sample_images`): the same functions find the same things in this sample.
"""

import filecmp
import hashlib
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datasets.images.image_folder import (
    NO_SIZE,
    ImageFile,
    decode_image,
    file_size,
    open_file,
    pillow_warnings,
    read_header,
)
from datasets.images.pixels import ROTATED, STORED, UNDECIDED, choose_rotation, swaps_sides
from datasets.labelled.annotations import read_json
from datasets.labelled.similar_images import similar_pairs, thumbnail
from datasets.sample import BadImageError
from util.errors import UserError
from util.settings import Settings

if TYPE_CHECKING:
    from datasets.labelled.checks import Finding, Split

DECODED_IMAGES = 8  # of each split at the start of a run
HEADERS = 128  # of each split at the start of a run
SAMPLE_SECONDS = 0.3  # stop sampling a split after this time
COMPARED_PAIRS = 16  # pairs of images with the same name in both splits whose files are compared
COMPARED_FILES = 256  # validation images that are searched in the training set by their size
SEARCH_SECONDS = 0.3  # stop searching after this time
MAX_ANNOTATION_BYTES = 2**25  # of a training file that an evaluation reads for it
KEY_BYTES = 4096  # in the middle of two files of the same size, compared before the whole files
MIN_CONTRAST = 16  # of 255, in at least one of red, green and blue
MIN_USED_RANGE = 0.1  # of the scale, in an image of more than 8 bits
OUTLIERS = 0.001  # fraction of the darkest, and of the brightest pixels that do not count for it, such as dead pixels


@dataclass(frozen=True)
class ImageInfo:
    """What an image file shows.

    Attributes:
        size_hw: (height, width) in pixels, as `decode_image` returns the image.
        digest: hash of these pixels and their size; empty if only the header was read.
        orientation: EXIF orientation; 1: none.
        rotation: STORED, ROTATED or UNDECIDED, see `choose_rotation`.
        contrast: largest difference of two pixels in red, green or blue.
        bits: of a gray image of more than 8 bits: bits that its values use. 0: another image.
        used_range: of such an image: fraction of the scale of these bits that its values use, without OUTLIERS.
        thumbnail: see `datasets.labelled.similar_images`; empty if only the header was read.
        transparent: whether pixels are transparent.
        several_frames: whether it has more frames or pages than the one that is used.
        remarks: what Pillow warned of.
        error: why the file can't be decoded; empty if it can.
    """

    size_hw: tuple[int, int] = NO_SIZE
    digest: bytes = b""
    orientation: int = 1
    rotation: str = STORED
    contrast: int = 255
    bits: int = 0
    used_range: float = 1.0
    thumbnail: bytes = b""
    transparent: bool = False
    several_frames: bool = False
    remarks: tuple[str, ...] = ()
    error: str = ""


def inspect_image(
    file: ImageFile, exif: str | None = None, listed_hw: Sequence[int] = NO_SIZE
) -> ImageInfo:
    """Decode an image file as training does. A bad file never raises: its error is in the result."""
    try:
        decoded = decode_image(file, exif, listed_hw)
    except (BadImageError, OSError) as error:
        return ImageInfo(error=str(error))

    pixels = decoded.image
    # The size is part of the hash: images of different shapes may have the same bytes. A salt has at most 16 bytes.
    salt = f"{pixels.width}x{pixels.height}".encode()[:16]
    return ImageInfo(
        size_hw=(pixels.height, pixels.width),
        digest=hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=salt).digest(),
        orientation=decoded.orientation,
        rotation=decoded.rotation,
        contrast=max(high - low for low, high in pixels.getextrema()),
        bits=decoded.bits,
        used_range=_used_range(pixels) if decoded.bits else 1.0,
        thumbnail=thumbnail(pixels),
        transparent=decoded.transparent,
        several_frames=_has_several_frames(file),
        remarks=decoded.remarks,
    )


def _used_range(gray: Image.Image) -> float:
    """Return which fraction of 256 gray values an image uses, without its darkest and brightest pixels."""
    counts = np.cumsum(gray.getchannel(0).histogram())
    darkest, brightest = np.searchsorted(
        counts, [OUTLIERS * counts[-1], (1 - OUTLIERS) * counts[-1]]
    )
    return float(brightest - darkest + 1) / 256


def _has_several_frames(file: ImageFile) -> bool:
    try:
        with pillow_warnings(), Image.open(open_file(file)) as image:
            # The second picture of an MPO file is the camera's preview, or the other eye.
            return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # noqa: BLE001 - the first frame is fine, and the rest of the file raises any type
        return False


def inspect_header(
    file: ImageFile, exif: str | None = None, listed_hw: Sequence[int] = NO_SIZE
) -> ImageInfo:
    """Read the size and the EXIF orientation of an image file."""
    try:
        stored_hw, orientation, _ = read_header(file)
    except (BadImageError, OSError) as error:
        return ImageInfo(error=str(error))
    rotation = choose_rotation(orientation, stored_hw, listed_hw, exif)
    is_swapped = rotation == ROTATED and swaps_sides(orientation)
    size_hw = stored_hw[::-1] if is_swapped else stored_hw
    return ImageInfo(size_hw, orientation=orientation, rotation=rotation)


# ---------------------------------------------------------------------------------------------- at the start of a run


def sample_images(split: "Split") -> dict[int, ImageInfo]:
    """Return image index -> what was found, of evenly spaced images: a few decoded, the others by their headers."""
    start = time.monotonic()
    infos: dict[int, ImageInfo] = {}
    for count, inspect in ((DECODED_IMAGES, inspect_image), (HEADERS, inspect_header)):
        for index in evenly_spaced(len(split.images), count):
            if time.monotonic() - start > SAMPLE_SECONDS:
                return infos
            if index not in infos:
                infos[index] = inspect(split.file(index), split.exif, split.listed_hw(index))
    return infos


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly spaced from the first to the last one."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


# ------------------------------------------------------------------------------------------------------------- checks


def _readable(split: "Split") -> Iterator[tuple[int, ImageInfo]]:
    infos = enumerate(split.image_infos) if split.image_infos else split.sample_infos.items()
    return ((index, info) for index, info in infos if not info.error)


def find_unreadable_images(split: "Split") -> Iterator["Finding"]:
    for index, info in enumerate(split.image_infos):
        if info.error:
            yield split.finding(index, info.error)


def find_size_mismatches(split: "Split") -> Iterator["Finding"]:
    if split.annotations is None:
        return
    for index, info in _readable(split):
        listed, found = split.listed_hw(index), info.size_hw
        # A listed size of 0 means that the annotations do not state it.
        if all(listed) and listed != found:
            forced = split.exif and swaps_sides(info.orientation) and listed == found[::-1]
            hint = f" (omit --exif {split.exif}: its sizes tell)" if forced else ""
            yield split.finding(
                index, f"{found[1]} x {found[0]} pixels, listed as {listed[1]} x {listed[0]}{hint}"
            )


def _with_orientation(split: "Split") -> Iterator[tuple[int, ImageInfo, str]]:
    """Yield (index, info, rotation) of the images with an EXIF orientation.

    An undecided image counts as stored if the sizes of others in the split show that boxes are in the stored pixels,
    and no size shows the opposite. Images without boxes are used as stored, as published.
    """
    rows = [(index, info) for index, info in _readable(split) if info.orientation > 1]
    decided = {info.rotation for _, info in rows} - {UNDECIDED}
    is_stored = decided == {STORED} or split.annotations is None
    for index, info in rows:
        undecided_as_stored = is_stored and info.rotation == UNDECIDED
        yield index, info, STORED if undecided_as_stored else info.rotation


def find_undecided_orientations(split: "Split") -> Iterator["Finding"]:
    rows = list(_with_orientation(split))
    num_rotated = sum(rotation == ROTATED for *_, rotation in rows)
    hint = f"; the sizes of {num_rotated} others say --exif apply" if num_rotated else ""
    for index, info, rotation in rows:
        if rotation == UNDECIDED:
            yield split.finding(index, f"orientation {info.orientation}{hint}")


def find_decided_orientations(split: "Split") -> Iterator["Finding"]:
    for index, info, rotation in _with_orientation(split):
        if rotation != UNDECIDED:
            yield split.finding(index, f"orientation {info.orientation}, used {rotation}")


def find_images_of_one_color(split: "Split") -> Iterator["Finding"]:
    for index, info in _readable(split):
        if info.contrast < MIN_CONTRAST:
            yield split.finding(index, f"pixels differ by at most {info.contrast} of 255")


def find_unused_bits(split: "Split") -> Iterator["Finding"]:
    rows = [(index, info.bits) for index, info in _readable(split) if info.bits not in (0, 16)]
    counts = sorted(Counter(bits for _, bits in rows).items())
    mixed = ", ".join(f"{count} with {bits} bits" for bits, count in counts)
    for index, bits in rows:
        yield split.finding(index, f"{bits} bits" if len(counts) == 1 else f"{bits} bits; {mixed}")


def find_narrow_ranges(split: "Split") -> Iterator["Finding"]:
    for index, info in _readable(split):
        if info.used_range < MIN_USED_RANGE and info.contrast >= MIN_CONTRAST:  # else of one color
            yield split.finding(
                index, f"values use {100 * info.used_range:.0f} % of the range of {info.bits} bits"
            )


def find_transparent_images(split: "Split") -> Iterator["Finding"]:
    for index, info in _readable(split):
        if info.transparent:
            yield split.finding(index)


def find_several_frames(split: "Split") -> Iterator["Finding"]:
    for index, info in _readable(split):
        if info.several_frames:
            yield split.finding(index)


def find_damaged_metadata(split: "Split") -> Iterator["Finding"]:
    for index, info in _readable(split):
        if info.remarks:
            yield split.finding(index, info.remarks[0])


def find_duplicate_images(split: "Split") -> Iterator["Finding"]:
    for first, *others in group_by_pixels(split).values():
        for other in others:
            yield split.finding(other, f"same as {split.images.path(first)}")


def group_by_pixels(split: "Split") -> dict[bytes, list[int]]:
    """Return digest -> indices of the images with these pixels, in ascending order.

    Images of one color are left out: they are equal because they show nothing, and reported as such.
    """
    groups: dict[bytes, list[int]] = {}
    for index, info in enumerate(split.image_infos):
        if not info.error and info.contrast:
            groups.setdefault(info.digest, []).append(index)
    return groups


# --------------------------------------------------------------------------------------------- training and validation


def find_shared_images(train: "Split", val: "Split") -> Iterator["Finding"]:
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


def find_similar_images(train: "Split", val: "Split") -> Iterator["Finding"]:
    """Yield the validation images that look like a training image and have other pixels. All were decoded."""
    if not (train.image_infos and val.image_infos):
        return
    same = {row for _, row in _pairs_with_same_pixels(train, val)}
    thumbnails = ([info.thumbnail for info in split.image_infos] for split in (train, val))
    for in_train, in_val in similar_pairs(*thumbnails, same):
        yield val.finding(in_val, f"looks like {train.finding(in_train)}")


def _pairs_with_same_pixels(train: "Split", val: "Split") -> list[tuple[int, int]]:
    in_train = group_by_pixels(train)
    return [
        (in_train[digest][0], index)
        for digest, indices in group_by_pixels(val).items()
        if digest in in_train
        for index in indices
    ]


def pairs_with_same_name(train: "Split", val: "Split") -> list[tuple[int, int]]:
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


def find_evaluated_training_images(val: "Split", settings: Settings) -> Iterator["Finding"]:
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
