"""Unlabelled images from any folder tree or list of files, and how an image file becomes pixels."""
import bisect
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.sample import BadImageError, SampleDataset
from util.logger import UserError, log

# Formats that Pillow only recognises, or hands to another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions that Pillow decodes, in lower case, with the dot."""
    known = Image.registered_extensions()
    return frozenset(ext for ext, kind in known.items() if kind in Image.OPEN and kind not in _NOT_DECODED)


def open_image(path: str) -> Image.Image:
    """A file as a decoded RGB image of Pillow. EXIF rotation is ignored, as in the published pipelines.

    Grey, palette, CMYK and transparent images are converted by Pillow (transparency is dropped); 16-bit grey loses its
    low byte.

    Raises:
        BadImageError: unreadable, truncated, or no image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BadImageError("no such file") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        reason = "of no format that Pillow knows" if os.path.getsize(path) else "an empty file"
        raise BadImageError(f"can't be decoded ({reason})") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadImageError(f"can't be opened ({error.strerror.lower()})") from error
    except Exception as error:  # noqa: BLE001 - Pillow's plug-ins raise any type on a damaged or unusual file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"can't be decoded ({reason})") from error


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], channels-last in memory as it was decoded (resizing is fastest so)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(path: str) -> Tensor:
    """uint8 [3, H, W], RGB; see `open_image`."""
    return to_tensor(open_image(path))


class PackedStrings:
    """Many strings in two arrays: worker processes share them, where a list of strings would be copied page by page."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Of the two arrays that `arrays` gave, which may lie on disk."""
        packed = cls.__new__(cls)
        packed._bytes, packed._ends = data, ends
        return packed

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(all bytes uint8, end of each string int64)."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def find(self, string: str) -> int | None:
        """Index of a string, None where it is not there; only where the strings are sorted."""
        index = bisect.bisect_left(self, string)
        return index if index < len(self) and self[index] == string else None

    def digest(self) -> str:
        """Hex digest of all strings and their borders."""
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()


class ImageFolder:
    """All images below a folder, in sorted order, or those a text file lists (one path a line, relative to the list), or one image.

    Symbolic links are followed, links that lead back to a folder above are not. An image's link to nowhere is a bad image. Files with
    other extensions than `image_extensions()` (in any case) and hidden files are skipped and counted in `skipped`.

    Raises:
        UserError: nothing there, or no image in it.
    """

    def __init__(self, root: str) -> None:
        if not os.path.exists(root):
            raise UserError(f"{root} does not exist: give a folder of images or a text file with one path a line")
        self.root = root
        self.skipped = 0
        if os.path.isdir(root):
            names = sorted(self._walk(root, "", frozenset()))
            self._base = root
        elif os.path.splitext(root)[1].lower() in image_extensions():
            self._base, names = os.path.split(root)[0], [os.path.basename(root)]
        else:
            names, self._base = _read_list(root), os.path.dirname(root)
        if not names:
            raise UserError(f"{root} holds no image ({self.skipped} other files): give a folder with files such as .jpg or .png, or a list")
        self._names = PackedStrings(names)
        log.info("%d images in %s%s", len(names), root, f", {self.skipped} other files skipped" if self.skipped else "")

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            stat, entries = os.stat(folder), list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder} can't be read ({error.strerror}): check the permissions") from error
        above = above | {(stat.st_dev, stat.st_ino)}
        for entry in entries:
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():  # a link may lead where one may not look
                inside = entry.stat()
                if (inside.st_dev, inside.st_ino) not in above:
                    yield from self._walk(entry.path, f"{prefix}{entry.name}/", above)
            elif _is_image(entry):
                yield prefix + entry.name
            else:
                self.skipped += 1

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path as it counts from the folder or from the list's folder."""
        return self._names[index]

    def path(self, index: int) -> str:
        return os.path.join(self._base, self._names[index])

    def fingerprint(self) -> str:
        """Of the names relative to the root, so that the same images elsewhere have the same one."""
        return f"{len(self)} images, {self._names.digest()[:16]}"


def _is_image(entry: os.DirEntry) -> bool:
    extension = os.path.splitext(entry.name)[1].lower()
    return extension in image_extensions() and not entry.name.startswith(".") and (entry.is_symlink() or entry.is_file())


def _read_list(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is neither a folder nor a text file with one image path a line") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if names and not _is_there(os.path.join(os.path.dirname(path), names[0])):
        entry = names[0] if len(names[0]) <= 80 else f"{names[0][:80]}..."
        raise UserError(f"{path}: its first entry {entry} does not exist; a list has one path a line, relative to the list's folder")
    return names


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a line with a null byte: no text file
        return False


class UnlabelledDataset(SampleDataset):
    """Base of what pretexts see of the images of a folder."""

    def __init__(self, images: ImageFolder, seed: int) -> None:
        super().__init__(seed)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images.path(index)

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def cut_box(image: Tensor, box_xyxy_abs: Tensor) -> Tensor:
    """What lies in a box [4] of an image [3, H, W], rounded to pixels; a box smaller than a pixel shows the pixel."""
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = box_xyxy_abs.round().int().tolist()
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
