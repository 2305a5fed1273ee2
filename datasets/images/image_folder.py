"""Unlabelled images from a folder tree, a list of files or tar files, and decoding of image files."""

import io
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.images.listing import list_folder
from datasets.images.packed_strings import PackedStrings
from datasets.images.pixels import (
    ROTATED,
    STORED,
    choose_rotation,
    compose_on_white,
    drop_png_text,
    gray_to_rgb,
    is_deep_gray,
    read_orientation,
    rotate,
    swaps_sides,
    unrotate,
)
from datasets.images.reduced_decode import OpenedImage, without_pixels
from datasets.images.tar_shards import TarMember, TarShards, expand_pattern, is_tar, open_shards
from datasets.sample import BadImageError, SampleDataset
from util.distributed import compute_on_rank0
from util.errors import UserError
from util.files import read_lines
from util.logger import log

ImageFile = str | TarMember  # a path, or a file inside of a tar file

# Pillow recognizes these formats but does not decode them, or hands them to an external program.
_UNSUPPORTED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# A larger image is refused. Decoding takes about 10 bytes per pixel in each dataloader worker.
MAX_PIXELS = 400_000_000
NO_SIZE = (0, 0)  # (height, width) that annotations do not tell

# Pillow logs some oddities of files without their names. Without a handler Python would print them.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions that Pillow decodes, in lower case and with the dot."""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNSUPPORTED_FORMATS
    )


def open_file(file: ImageFile) -> str | BinaryIO:
    """Return what `PIL.Image.open` accepts for this file."""
    return io.BytesIO(file.read()) if isinstance(file, TarMember) else file


def read_bytes(file: ImageFile) -> bytes:
    """Read a file.

    Raises:
        BadImageError: it can't be read.
    """
    if isinstance(file, TarMember):
        return file.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error


def file_size(file: ImageFile) -> int | None:
    """Return the size in bytes. None: no such file."""
    if isinstance(file, TarMember):
        return file.size
    try:
        return os.path.getsize(file)
    except OSError:
        return None


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image file, and what was decided about its pixels.

    Attributes:
        image: RGB.
        orientation: EXIF orientation; 1: none.
        rotation: STORED, ROTATED or UNDECIDED, which uses the pixels as stored.
        bits: of a gray image of more than 8 bits: bits that its values use. 0: another image.
        transparent: transparent pixels are shown on white.
        remarks: what Pillow warned of, such as damaged metadata.
    """

    image: Image.Image
    orientation: int = 1
    rotation: str = STORED
    bits: int = 0
    transparent: bool = False
    remarks: tuple[str, ...] = ()


def decode_image(
    file: ImageFile,
    exif: str | None = None,
    listed_hw: Sequence[int] = NO_SIZE,
    reduction: int = 1,
) -> DecodedImage:
    """Decode an image file to RGB.

    - EXIF orientation: `choose_rotation` decides. Undecided images are used as stored, as in the published pipelines,
      except for TIFF files: Pillow itself rotates these when it decodes them.
    - Gray images of 16 bits: the highest 8 of the bits that the image uses, see `gray_to_rgb`.
    - Transparent images: on white, see `compose_on_white`.
    - Palette and CMYK images are converted by Pillow. Of several frames or pages, the first is used.

    Args:
        exif: `--exif`: "apply", "ignore", or None.
        listed_hw: (height, width) in the annotations.
        reduction: decode a JPEG file at 1 / 2, 1 / 4 or 1 / 8 of each side, rounded up. No effect on other formats.
            Not together with `listed_hw`, which is compared with the decoded size.

    Raises:
        BadImageError: the file is unreadable, truncated or no image, it has floating-point pixels, or more than
            MAX_PIXELS.
    """
    with pillow_warnings() as remarks, _errors_as_bad_image(file):
        try:
            decoded = _decode(open_file(file), exif, listed_hw, reduction)
        except MemoryError:
            # A damaged chunk of a PNG file may claim 4 GiB. A file on disk reserves them for Pillow, one in memory
            # does not.
            decoded = _decode(io.BytesIO(read_bytes(file)), exif, listed_hw, reduction)
        except ValueError as error:
            # Pillow refuses PNG files with much compressed text or a large color profile.
            if "MAX_TEXT" not in str(error):
                raise
            content = drop_png_text(read_bytes(file))
            decoded = _decode(io.BytesIO(content), exif, listed_hw)
    return replace(decoded, remarks=tuple(remarks))


def _decode(
    file: str | BinaryIO, exif: str | None, listed_hw: Sequence[int], reduction: int = 1
) -> DecodedImage:
    with Image.open(file) as image:
        if (
            reduction > 1
        ):  # Pillow then reduces each side by the largest of 1, 2, 4 and 8 up to this
            image.draft(None, (image.width // reduction, image.height // reduction))
        return convert_image(image, exif, listed_hw)


def convert_image(
    image: Image.Image, exif: str | None = None, listed_hw: Sequence[int] = NO_SIZE
) -> DecodedImage:
    """Convert an image that Pillow has opened; see `decode_image`.

    Raises:
        BadImageError: it has floating-point pixels.
        Exception: any error of Pillow.
    """
    if image.mode == "F":  # their range is unknown: [0, 1], [0, 255] or anything else
        raise BadImageError("floating-point pixels; save it as 8 or 16 bit")

    # Loading a TIFF file rotates its pixels and removes its orientation.
    is_tiff = image.format == "TIFF"
    orientation = read_orientation(image) if is_tiff else 1
    image.load()
    if not is_tiff:
        # Only now: asking a damaged PNG file earlier would decode it, and hide the error.
        orientation = read_orientation(image)

    stored_hw = (image.height, image.width)
    is_rotated = is_tiff and orientation > 1
    if is_rotated and swaps_sides(orientation):
        stored_hw = stored_hw[::-1]
    rotation = choose_rotation(orientation, stored_hw, listed_hw, exif)

    bits, transparent = 0, False
    if is_deep_gray(image):
        rgb, bits = gray_to_rgb(image)
    elif image.has_transparency_data:
        rgb, transparent = compose_on_white(image)
    else:
        rgb = image.convert("RGB")

    if is_rotated and rotation == STORED:
        rgb = unrotate(rgb, orientation)
    elif is_rotated:
        rotation = ROTATED
    elif rotation == ROTATED:
        rgb = rotate(rgb, orientation)
    return DecodedImage(rgb, orientation, rotation, bits, transparent)


class ImageHeader(NamedTuple):
    """What is known of an image file without decoding it.

    size_hw: (height, width) of the stored pixels.
    orientation: EXIF orientation.
    is_jpeg: whether it can be decoded at a reduced size.
    """

    size_hw: tuple[int, int]
    orientation: int
    is_jpeg: bool

    def decoded_size(self, exif: str | None) -> tuple[int, int]:
        """Return the (height, width) of the decoded image where `--exif` decides alone."""
        is_swapped = exif == "apply" and swaps_sides(self.orientation)
        return self.size_hw[::-1] if is_swapped else self.size_hw


def read_header(file: ImageFile) -> ImageHeader:
    """Read the header of an image file.

    A TIFF file has orientation 1 and its rotated size, since Pillow rotates it.

    Raises:
        BadImageError: the header can't be read.
    """
    with pillow_warnings(), _errors_as_bad_image(file), Image.open(open_file(file)) as image:
        orientation = 1 if image.format == "TIFF" else read_orientation(image, header_only=True)
        is_jpeg = image.format in ("JPEG", "MPO")  # MPO: JPEG with more pictures behind the first
        return ImageHeader((image.height, image.width), orientation, is_jpeg)


@contextmanager
def pillow_warnings() -> Iterator[list[str]]:
    """Collect Pillow's warnings, which do not name the file, and set its limit of pixels to MAX_PIXELS."""
    remarks: list[str] = []
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow warns above its limit and refuses twice as many.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield remarks
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    remarks += [
        " ".join(str(warning.message).split())
        for warning in caught
        if not issubclass(warning.category, (Image.DecompressionBombWarning, DeprecationWarning))
    ]


@contextmanager
def _errors_as_bad_image(file: ImageFile) -> Iterator[None]:
    """Turn everything that Pillow raises into BadImageError with a reason."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadImageError("no such file") from error
    except (MemoryError, BadImageError):
        # Running out of memory is not the image's fault, so the next image must not replace it.
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(
            f"{_size_text(file)}more than {MAX_PIXELS // 10**6} million pixels; cut it into tiles, or make it smaller "
            "together with its boxes"
        ) from error
    except UnidentifiedImageError as error:
        reason = _unknown_format(file)
        raise BadImageError(f"can't be decoded ({reason})") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadImageError(f"can't be opened ({error.strerror.lower()})") from error
    except Exception as error:  # noqa: BLE001 - Pillow's plug-ins raise any type on a damaged or unusual file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"can't be decoded ({reason})") from error


def _unknown_format(file: ImageFile) -> str:
    """Return what a file is that Pillow does not recognize."""
    if not file_size(file):
        return "an empty file"
    head = read_bytes(file)[:256].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run git lfs pull"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page; download the image again"
    return "unknown image format"


def _size_text(file: ImageFile) -> str:
    """Return "WIDTH x HEIGHT pixels, " of a file that Pillow refuses to open because of its size."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(open_file(file)) as image:
            return f"{image.width} x {image.height} pixels, "
    except Exception:  # noqa: BLE001 - damaged files raise any type; the size is only part of a message
        return ""
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_image(
    file: ImageFile, exif: str | None = None, listed_hw: Sequence[int] = NO_SIZE
) -> Image.Image:
    """Decode an image file to an RGB image of Pillow; see `decode_image`."""
    return decode_image(file, exif, listed_hw).image


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image of Pillow to uint8 [3, H, W]."""
    # A view of [H, W, 3]: channels-last in memory, which is the fastest layout for the resize.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(
    file: ImageFile,
    exif: str | None = None,
    listed_hw: Sequence[int] = NO_SIZE,
    reduction: int = 1,
) -> Tensor:
    """Read an RGB image as uint8 [3, H, W]; see `decode_image`."""
    return to_tensor(decode_image(file, exif, listed_hw, reduction).image)


class ImageFiles:
    """A sequence of image files.

    Each image has a `name`, its path relative to `base`, which is its key in proposal caches; a `path`, for messages;
    and a `file`, for `read_image`. `exif` is `--exif`, and `reduced_decode` is `--reduced_decode`.
    """

    exif: str | None = None
    reduced_decode = False

    def __init__(self, base: str, names: PackedStrings, shards: TarShards | None = None) -> None:
        self.base = base
        self.names = names
        self.shards = shards

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def path(self, index: int) -> str:
        return os.path.join(self.base, self.names[index])

    def file(self, index: int) -> ImageFile:
        return self.path(index) if self.shards is None else self.shards.member(index)

    def read(self, index: int, reduction: int = 1) -> Tensor:
        """Read an image as uint8 [3, H, W]; see `read_image`."""
        return read_image(self.file(index), self.exif, reduction=reduction)

    def open(self, index: int) -> OpenedImage:
        """Open an image. Only with `reduced_decode`, a JPEG file is decoded later.

        Raises:
            BadImageError: it can't be read.
        """
        header = read_header(self.file(index)) if self.reduced_decode else None
        if header is None or not header.is_jpeg:
            return OpenedImage(self.read(index))
        size = header.decoded_size(self.exif)
        return OpenedImage(without_pixels(size), lambda reduction: self.read(index, reduction))

    def fingerprint(self) -> str:
        """Return a digest of the relative paths: the same images in another location have the same one."""
        return f"{len(self)} images, {self.names.digest()[:16]}"


class ImageFolder(ImageFiles):
    """All images of `root`, which is one of

    - a folder: all images in it and below, in sorted order; if it has tar files and no image, the images in these;
    - a text file with one path per line, relative to the file's folder;
    - one image;
    - a tar file, or a pattern of tar files (`datasets.images.tar_shards.expand_pattern`).

    Hidden files and files whose extension is not in `image_extensions()` (in any case) are skipped; `skipped` is their
    number. Hidden folders are not entered. Rank 0 lists the files and the other ranks receive the result.

    Raises:
        UserError: `root` does not exist or has no image, or a tar file can't be used.
    """

    def __init__(self, root: str) -> None:
        files, self.skipped = compute_on_rank0(lambda: find_images(root))
        super().__init__(files.base, files.names, files.shards)
        self.root = root

        where = root if self.shards is None else f"{len(self.shards.paths)} tar files of {root}"
        others = f", {self.skipped} other files skipped" if self.skipped else ""
        log.info("%d images in %s%s", len(self), where, others)


def find_images(root: str) -> tuple[ImageFiles, int]:
    """Return (images, number of skipped files) of a `root` as in `ImageFolder`."""
    files: ImageFiles | None = None
    tars: tuple[str, list[str]] | None = None  # (folder, names of tar files in it)
    skipped = 0

    if os.path.isdir(root):
        listing = list_folder(root, image_extensions())
        files, skipped = ImageFiles(root, listing.images), listing.skipped
        if len(listing.tars) and len(files):
            # Archives often stay where they were unpacked. Reading them too would show each image twice.
            log.warning(
                "%s contains images and %d tar files, which are not read (the first is %s); give a pattern of tar "
                "files to read these instead",
                root,
                len(listing.tars),
                listing.tars[0],
            )
        elif len(listing.tars):
            tars = (root, list(listing.tars))
    elif os.path.exists(root):
        files, tars = _find_in_file(root)
    else:
        tars = expand_pattern(root)
        if tars is None:
            raise UserError(
                f"{root} does not exist; give a folder of images or tar files, or a text file with one path per line"
            )

    if tars is not None:
        folder, names = tars
        shards = open_shards(folder, names, image_extensions())
        files, skipped = ImageFiles(folder, shards.names, shards), shards.skipped
    if not files:
        raise UserError(
            f"{root} contains no image ({skipped} other files); give a folder with files such as .jpg or .png, or a "
            "list"
        )
    return files, skipped


def _find_in_file(path: str) -> tuple[ImageFiles | None, tuple[str, list[str]] | None]:
    """Return (images, None) for an image or a list, (None, (folder, [name])) for a tar file."""
    folder, name = os.path.split(path)
    if is_tar(path):
        return None, (folder, [name])
    if os.path.splitext(path)[1].lower() in image_extensions():
        return ImageFiles(folder, PackedStrings([name])), None
    return ImageFiles(folder, PackedStrings(_read_list(path))), None


def _read_list(path: str) -> list[str]:
    """Read a text file with one image path per line; empty lines and lines that start with # are skipped.

    Lists of other programs have a label after each path, backslashes or quotes. Their paths are read if that makes the
    first one exist.
    """
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: neither a folder nor text; give a folder, or a text file with one image path per line"
        ) from error

    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    folder = os.path.dirname(path)
    # Checking the first entry is enough to find a wrong folder. A single missing image is reported when it is read.
    if not names or _path_exists(os.path.join(folder, names[0])):
        return names
    for change in _LIST_FORMATS:
        first = change(names[0])
        if first != names[0] and os.path.isfile(os.path.join(folder, first)):
            log.info(
                "%s: its first entry %s is read as %s, and so are the others", path, names[0], first
            )
            return [change(name) for name in names]

    entry = names[0] if len(names[0]) <= 80 else f"{names[0][:80]}..."
    similar = _similar_file(os.path.join(folder, names[0].replace("\\", "/")))
    hint = f"; did you mean {similar}?" if similar else ""
    raise UserError(
        f"{path}: its first entry {entry} does not exist; a list has one path per line, relative to the list's "
        f"folder{hint}"
    )


def _unquote(name: str) -> str:
    return name.strip("\"'")


# How lists of other programs write a path.
_LIST_FORMATS = (
    _unquote,
    lambda name: name.replace("\\", "/"),
    lambda name: _unquote(re.split(r"[,;\t]", name)[0].strip()).replace("\\", "/"),  # path,label
    lambda name: _unquote(name.rsplit(maxsplit=1)[0]).replace("\\", "/"),  # path label
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    unquote,  # %20
)


def _similar_file(path: str) -> str | None:
    """Return a file of the same folder whose name differs in case, accents' encoding or extension."""
    folder, name = os.path.split(path)
    try:
        others = sorted(os.listdir(folder or "."))
    except (OSError, ValueError):
        return None

    def fold(text: str) -> str:
        return unicodedata.normalize("NFC", text).casefold()

    same = [other for other in others if fold(other) == fold(name)]
    stem = fold(os.path.splitext(name)[0])
    same += [other for other in others if fold(os.path.splitext(other)[0]) == stem]
    return same[0] if same else None


def _path_exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a null byte in the line: no text file
        return False


class UnlabelledDataset(SampleDataset):
    """Base class of the datasets that pretexts see."""

    def __init__(self, images: ImageFiles, seed: int) -> None:
        super().__init__(seed)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images.path(index)

    def read(self, index: int) -> Tensor:
        """Read an image as uint8 [3, H, W]; see `read_image`."""
        return self.images.read(index)

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def crop_box(image: Tensor, box_xyxy_abs: Tensor) -> Tensor:
    """Crop an image [3, H, W] to a box [4] rounded to whole pixels: [3, h, w].

    The crop is at least one pixel, also for a smaller box or one on the border of the image.
    """
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = box_xyxy_abs.round().int().tolist()
    x0 = min(max(x0, 0), width - 1)
    y0 = min(max(y0, 0), height - 1)
    return image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
