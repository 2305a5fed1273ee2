"""Findings in the image files of one split.

`tools/check_dataset.py` decodes every image of a split (`Split.image_infos`). The start of a run decodes a few and
reads the headers of some more (`sample_images`): the same functions find the same things in this sample.
"""

import time
from collections import Counter
from collections.abc import Iterator

from datasets.images.image_info import ImageInfo, inspect_header, inspect_image
from datasets.images.pixels import ROTATED, STORED, UNDECIDED, swaps_sides
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split, evenly_spaced

DECODED_IMAGES = 8  # of each split at the start of a run
HEADERS = 128  # of each split at the start of a run
SAMPLE_SECONDS = 0.3  # stop sampling a split after this time
MIN_CONTRAST = 16  # of 255, in at least one of red, green and blue
MIN_USED_RANGE = 0.1  # of the scale, in an image of more than 8 bits


def sample_images(split: Split) -> dict[int, ImageInfo]:
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


def _readable(split: Split) -> Iterator[tuple[int, ImageInfo]]:
    infos = enumerate(split.image_infos) if split.image_infos else split.sample_infos.items()
    return ((index, info) for index, info in infos if not info.error)


def find_unreadable_images(split: Split) -> Iterator[Finding]:
    for index, info in enumerate(split.image_infos):
        if info.error:
            yield split.finding(index, info.error)


def find_size_mismatches(split: Split) -> Iterator[Finding]:
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


def _with_orientation(split: Split) -> Iterator[tuple[int, ImageInfo, str]]:
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


def find_undecided_orientations(split: Split) -> Iterator[Finding]:
    rows = list(_with_orientation(split))
    num_rotated = sum(rotation == ROTATED for *_, rotation in rows)
    hint = f"; the sizes of {num_rotated} others say --exif apply" if num_rotated else ""
    for index, info, rotation in rows:
        if rotation == UNDECIDED:
            yield split.finding(index, f"orientation {info.orientation}{hint}")


def find_decided_orientations(split: Split) -> Iterator[Finding]:
    for index, info, rotation in _with_orientation(split):
        if rotation != UNDECIDED:
            yield split.finding(index, f"orientation {info.orientation}, used {rotation}")


def find_images_of_one_color(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.contrast < MIN_CONTRAST:
            yield split.finding(index, f"pixels differ by at most {info.contrast} of 255")


def find_unused_bits(split: Split) -> Iterator[Finding]:
    rows = [(index, info.bits) for index, info in _readable(split) if info.bits not in (0, 16)]
    counts = sorted(Counter(bits for _, bits in rows).items())
    mixed = ", ".join(f"{count} with {bits} bits" for bits, count in counts)
    for index, bits in rows:
        yield split.finding(index, f"{bits} bits" if len(counts) == 1 else f"{bits} bits; {mixed}")


def find_narrow_ranges(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.used_range < MIN_USED_RANGE and info.contrast >= MIN_CONTRAST:  # else of one color
            yield split.finding(
                index, f"values use {100 * info.used_range:.0f} % of the range of {info.bits} bits"
            )


def find_transparent_images(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.transparent:
            yield split.finding(index)


def find_several_frames(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.several_frames:
            yield split.finding(index)


def find_damaged_metadata(split: Split) -> Iterator[Finding]:
    for index, info in _readable(split):
        if info.remarks:
            yield split.finding(index, info.remarks[0])


def find_duplicate_images(split: Split) -> Iterator[Finding]:
    for first, *others in group_by_pixels(split).values():
        for other in others:
            yield split.finding(other, f"same as {split.images.path(first)}")


def group_by_pixels(split: Split) -> dict[bytes, list[int]]:
    """Return digest -> indices of the images with these pixels, in ascending order.

    Images of one color are left out: they are equal because they show nothing, and reported as such.
    """
    groups: dict[bytes, list[int]] = {}
    for index, info in enumerate(split.image_infos):
        if not info.error and info.contrast:
            groups.setdefault(info.digest, []).append(index)
    return groups
