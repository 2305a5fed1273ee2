"""What an image file shows: its size, orientation, contrast and whether it can be decoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets.images.image_folder import (
    NO_SIZE,
    ImageFile,
    decode_image,
    open_file,
    pillow_warnings,
    read_header,
)
from datasets.images.pixels import ROTATED, STORED, choose_rotation, swaps_sides
from datasets.images.similar_images import thumbnail
from datasets.sample import BadImageError

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
        thumbnail: see `datasets.images.similar_images`; empty if only the header was read.
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
