"""From the pixels of an image file to RGB: EXIF orientation, transparency, and gray values of more than 8 bits."""

import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112  # tag number in the EXIF standard

# How the pixels of a file with an EXIF orientation are used.
STORED, ROTATED, UNDECIDED = "as stored", "as viewers show it", "undecided"

# Bits of a gray value that cameras and scanners save in 16 bits.
USUAL_BITS = (8, 10, 12, 14, 16)

# EXIF orientation -> what a viewer does with the stored pixels.
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE = {6: 8, 8: 6}  # all others undo themselves

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS_WITHOUT_PIXELS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


def read_orientation(image: Image.Image, *, header_only: bool = False) -> int:
    """Return the EXIF orientation of an open image: 2 to 8, or 1 if there is none.

    Args:
        header_only: do not decode the image. A PNG file may have its EXIF data after its pixels, which is then missed.
    """
    try:
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        orientation = int(exif.get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata raise any type, and the pixels are fine
        return 1
    return orientation if orientation in _ROTATIONS else 1


def swaps_sides(orientation: int) -> bool:
    """Return whether an EXIF orientation swaps width and height."""
    return orientation >= 5


def choose_rotation(
    orientation: int, stored_hw: Sequence[int], listed_hw: Sequence[int], exif: str | None
) -> str:
    """Return how to use the pixels of a file: STORED, ROTATED or UNDECIDED.

    Args:
        orientation: EXIF orientation of the file.
        stored_hw: (height, width) of the pixels in the file.
        listed_hw: (height, width) in the annotations; 0 if they do not say.
        exif: `--exif`; None: the listed size decides.
    """
    if orientation == 1:
        return STORED
    if exif is not None:
        return ROTATED if exif == "apply" else STORED

    height, width = stored_hw
    if swaps_sides(orientation) and height != width:
        if tuple(listed_hw) == (width, height):
            return ROTATED
        if tuple(listed_hw) == (height, width):
            return STORED
    return UNDECIDED


def rotate(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image as viewers show it."""
    return image.transpose(_ROTATIONS[orientation])


def unrotate(image: Image.Image, orientation: int) -> Image.Image:
    """Undo `rotate`."""
    return image.transpose(_ROTATIONS[_INVERSE.get(orientation, orientation)])


def is_deep_gray(image: Image.Image) -> bool:
    """Return whether an image has gray values of 16 or 32 bits."""
    return image.mode.startswith("I")


def gray_to_rgb(image: Image.Image) -> tuple[Image.Image, int]:
    """Convert gray values of 16 or 32 bits: return (RGB image, bits that the values use).

    Many files use fewer bits than they have: their largest value tells how many. The highest 8 of these are kept, so
    that a 12-bit image does not become black. Negative values become 0.
    """
    values = np.asarray(image).clip(0)  # [H, W]
    largest = int(values.max(initial=0))
    bits = next((bits for bits in USUAL_BITS if largest < 2**bits), largest.bit_length())
    gray = (values >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB"), bits


def compose_on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Convert an image that may be transparent: return (RGB image, whether a pixel is transparent).

    Transparent pixels show a white ground, as in viewers. The color under them may be anything: black lines on a
    transparent ground are black on black. If all pixels are fully transparent, transparency is dropped instead.
    """
    rgba = image.convert("RGBA")
    lowest, highest = rgba.getchannel("A").getextrema()
    if lowest == 255 or highest == 0:
        return rgba.convert("RGB"), False
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB"), True


def drop_png_text(content: bytes) -> bytes:
    """Return a PNG file without its texts and its color profile, which do not change how it is decoded."""
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 12 <= len(content):
        # A chunk has a length, a type, the data, and a checksum.
        (length,) = struct.unpack(">I", content[start : start + 4])
        end = start + 12 + length
        if content[start + 4 : start + 8] not in _PNG_CHUNKS_WITHOUT_PIXELS:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)
