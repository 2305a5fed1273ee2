"""Unlabelled images from any folder tree, list of files or tar files, and how an image file becomes pixels."""

import io
import os
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.images.listing import list_folder
from datasets.images.packed_strings import PackedStrings
from datasets.images.tar_shards import Member, Shards, expand, is_tar, open_shards
from datasets.sample import BadImageError, SampleDataset
from util.distributed import from_main
from util.errors import UserError
from util.logger import log

ImageFile = str | Member  # a path, or a place in a tar file

# Formats that Pillow only recognises, or hands to another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions that Pillow decodes, in lower case, with the dot."""
    known = Image.registered_extensions()
    return frozenset(
        ext for ext, kind in known.items() if kind in Image.OPEN and kind not in _NOT_DECODED
    )


def open_file(file: ImageFile) -> str | BinaryIO:
    """What Pillow opens."""
    return io.BytesIO(file.read()) if isinstance(file, Member) else file


def read_bytes(file: ImageFile) -> bytes:
    """
    Raises:
        BadImageError: it can't be read.
    """
    if isinstance(file, Member):
        return file.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error


def file_size(file: ImageFile) -> int | None:
    """Bytes; None where there is no such file."""
    if isinstance(file, Member):
        return file.size
    return os.path.getsize(file) if os.path.exists(file) else None


def open_image(file: ImageFile) -> Image.Image:
    """A file as a decoded RGB image of Pillow. EXIF rotation is ignored, as in the published pipelines; TIFF files
    alone are turned by Pillow itself when it decodes them.

    Grey, palette, CMYK and transparent images are converted by Pillow (transparency is dropped); 16-bit grey loses its
    low byte.

    Raises:
        BadImageError: unreadable, truncated, or no image; floating-point pixels, whose range nobody knows.
    """
    try:
        with Image.open(open_file(file)) as image:
            if image.mode == "F":
                raise BadImageError("floating-point pixels; save it as 8 or 16 bit")
            if image.mode.startswith("I"):
                return Image.fromarray(
                    (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
                ).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BadImageError("no such file") from error
    except (MemoryError, BadImageError):
        raise
    except UnidentifiedImageError as error:
        reason = "of no format that Pillow knows" if file_size(file) else "an empty file"
        raise BadImageError(f"can't be decoded ({reason})") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadImageError(f"can't be opened ({error.strerror.lower()})") from error
    except Exception as error:  # noqa: BLE001 - Pillow's plug-ins raise any type on a damaged or unusual file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"can't be decoded ({reason})") from error


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], channels-last in memory as it was decoded (resizing is fastest so)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(file: ImageFile) -> Tensor:
    """uint8 [3, H, W], RGB; see `open_image`."""
    return to_tensor(open_image(file))


class ImageFiles:
    """Images by number. `name` is the path below `base`, by which proposals know an image; `path` is what messages say;
    `file` is what `read_image` reads."""

    def __init__(self, base: str, names: PackedStrings, shards: Shards | None = None) -> None:
        self.base, self.names, self.shards = base, names, shards

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def path(self, index: int) -> str:
        return os.path.join(self.base, self.names[index])

    def file(self, index: int) -> ImageFile:
        return self.path(index) if self.shards is None else self.shards.member(index)

    def fingerprint(self) -> str:
        """Of the names below the base, so that the same images elsewhere have the same one."""
        return f"{len(self)} images, {self.names.digest()[:16]}"


class ImageFolder(ImageFiles):
    """All images below a folder, in sorted order, or those a text file lists (one path a line, relative to the list),
    or one image, or those in tar files: a folder with tar files and no image, one of them, or a pattern
    (`datasets.images.tar_shards.expand`).

    Files with other extensions than `image_extensions()` (in any case) and hidden files are skipped and counted in
    `skipped`; hidden folders are not entered. Rank 0 lists the folder, the others get what it found.

    Raises:
        UserError: nothing there, or no image in it; tar files that can't be used.
    """

    def __init__(self, root: str) -> None:
        files, self.skipped = from_main(lambda: find_images(root))
        super().__init__(files.base, files.names, files.shards)
        self.root = root
        where = root if self.shards is None else f"{len(self.shards.paths)} tar files of {root}"
        log.info(
            "%d images in %s%s",
            len(self),
            where,
            f", {self.skipped} other files skipped" if self.skipped else "",
        )


def find_images(root: str) -> tuple[ImageFiles, int]:
    """(the images, number of other files) of what `ImageFolder` takes."""
    tars, skipped = None, 0
    if os.path.isdir(root):
        listing = list_folder(root, image_extensions())
        files, tars, skipped = ImageFiles(root, listing.images), listing.tars, listing.skipped
        if len(files) and len(tars):
            log.warning(
                "%s holds images beside %d tar files, which are not read, the first is %s: a pattern of them would "
                "read them alone",
                root,
                len(tars),
                tars[0],
            )
        tars = None if len(files) or not len(tars) else (root, [tars[i] for i in range(len(tars))])
    elif os.path.exists(root):
        files, tars = _find_in_file(root)
    else:
        tars = expand(root)
        if tars is None:
            raise UserError(
                f"{root} does not exist: give a folder of images or of tar files, or a text file with one path a line"
            )
    if tars is not None:
        shards = open_shards(*tars, image_extensions())
        files, skipped = ImageFiles(tars[0], shards.names, shards), shards.skipped
    if not len(files):
        raise UserError(
            f"{root} holds no image ({skipped} other files): give a folder with files such as .jpg or .png, or a list"
        )
    return files, skipped


def _find_in_file(path: str) -> tuple[ImageFiles | None, tuple[str, list[str]] | None]:
    """(images of a list or one image, folder and name of a tar file): one of both."""
    folder, name = os.path.split(path)
    if is_tar(path):
        return None, (folder, [name])
    if os.path.splitext(path)[1].lower() in image_extensions():
        return ImageFiles(folder, PackedStrings([name])), None
    return ImageFiles(folder, PackedStrings(_read_list(path))), None


def _read_list(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is neither a folder nor a text file with one image path a line"
        ) from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if names and not _is_there(os.path.join(os.path.dirname(path), names[0])):
        entry = names[0] if len(names[0]) <= 80 else f"{names[0][:80]}..."
        raise UserError(
            f"{path}: its first entry {entry} does not exist; a list has one path a line, relative to the list's folder"
        )
    return names


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a line with a null byte: no text file
        return False


class UnlabelledDataset(SampleDataset):
    """Base of what pretexts see of unlabelled images."""

    def __init__(self, images: ImageFiles, seed: int) -> None:
        super().__init__(seed)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images.path(index)

    def read(self, index: int) -> Tensor:
        """uint8 [3, H, W]; see `read_image`."""
        return read_image(self.images.file(index))

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def cut_box(image: Tensor, box_xyxy_abs: Tensor) -> Tensor:
    """What lies in a box [4] of an image [3, H, W], rounded to pixels; a box smaller than a pixel shows the pixel."""
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = box_xyxy_abs.round().int().tolist()
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
