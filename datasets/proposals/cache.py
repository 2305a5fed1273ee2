"""Proposal cache: the boxes of all images of a dataset on disk, in a few arrays that all processes memory-map.

A cache is a folder with these files, for I images and B boxes:

  header.json                      what the cache contains; written last, so a folder without it is not finished
  name_bytes.npy, name_ends.npy    paths relative to the image folder, sorted (`PackedStrings.arrays`)
  offsets.npy                      int64 [I + 1]; the boxes of image i are rows offsets[i] to offsets[i + 1]
  boxes.npy                        uint16 or float32 [B, 4], (x0, y0, x1, y1) in steps of the method's grid
  scores.npy                       float32 [B], only if the method has scores; NaN for an image without scores
  sizes.npy                        int32 [I, 2], (height, width) in pixels; 0 if the image could not be read
  file_bytes.npy, file_crc32.npy   int64 and uint32 [I], size and checksum of the image files

`datasets.proposals.cache_builder` writes it.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.images.image_folder import file_size
from datasets.images.packed_strings import PackedStrings
from datasets.proposals.base import BoxesAndScores, CacheableProposals
from datasets.sample import BadImageError
from util.errors import UserError
from util.logger import log

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

FORMAT = 1
HEADER = "header.json"
HEADER_TYPES = {
    "images": int,
    "boxes": int,
    "unreadable": int,
    "scores": bool,
    "method": str,
    "settings": dict,
    "grid": int,
    "names": str,
}
TOOL = "tools/cache_proposals.py"
SPOT_CHECKS = 64  # images whose file size is compared at the start of a run


class ProposalCache:
    """Reader of a proposal cache.

    Raises:
        UserError: the folder has no complete cache of this format.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()
        self.header = _read_header(self.folder)

        num_images, num_boxes = self.header["images"], self.header["boxes"]
        name_bytes, name_ends = self._load_array("name_bytes"), self._load_array("name_ends")
        # array -> (kinds of numbers, shape)
        expected = {
            "offsets": (self.offsets, "i", (num_images + 1,)),
            "boxes": (self.boxes, "uf", (num_boxes, 4)),
            "sizes": (self.sizes_hw, "i", (num_images, 2)),
            "file_bytes": (self.file_bytes, "i", (num_images,)),
            "name_bytes": (name_bytes, "u", name_bytes.shape[:1]),
            "name_ends": (name_ends, "i", (num_images,)),
        }
        if self.scores is not None:
            expected["scores"] = (self.scores, "f", (num_boxes,))
        for name, (array, kinds, shape) in expected.items():
            if array.shape != shape or array.dtype.kind not in kinds:
                raise self._damaged(
                    f"its arrays are not as long as {HEADER} says ({name}.npy: {array.dtype} {list(array.shape)}, "
                    f"not {list(shape)})"
                )
        for name, steps, end in (
            ("offsets", self.offsets, num_boxes),
            ("name_ends", np.concatenate([[0], name_ends]), len(name_bytes)),
        ):
            if steps[0] != 0 or steps[-1] != end or (np.diff(steps) < 0).any():
                raise self._damaged(f"{name}.npy does not ascend from 0 to {end}")

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is damaged: {what}; copy it again, or make it again with {TOOL}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Without the arrays: each dataloader worker maps them itself instead of receiving a copy.
        return {"folder": self.folder, "header": self.header}

    def _load_array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            with np.errstate(over="ignore"):  # a size that is too large is an error below
                return np.load(path, mmap_mode="r", allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - NumPy's parser of a damaged header raises any type
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} can't be read ({reason}); copy the cache again, or make it again with {TOOL}"
            ) from error

    @cached_property
    def names(self) -> PackedStrings:
        return PackedStrings.from_arrays(
            self._load_array("name_bytes"), self._load_array("name_ends")
        )

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._load_array("offsets")

    @cached_property
    def boxes(self) -> np.ndarray:
        return self._load_array("boxes")

    @cached_property
    def scores(self) -> np.ndarray | None:
        return self._load_array("scores") if self.header["scores"] else None

    @cached_property
    def sizes_hw(self) -> np.ndarray:
        return self._load_array("sizes")

    @cached_property
    def file_bytes(self) -> np.ndarray:
        return self._load_array("file_bytes")

    @cached_property
    def file_crc32(self) -> np.ndarray:
        return self._load_array("file_crc32")

    def get_boxes(self, index: int) -> BoxesAndScores:
        """Return copies of (boxes [N, 4] in steps of the grid, scores float32 [N] or None) of one image."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        boxes = np.array(self.boxes[rows])
        if self.scores is None:
            return boxes, None
        scores = np.array(self.scores[rows])
        return boxes, None if np.isnan(scores).any() else scores


def is_proposal_cache(folder: str | os.PathLike) -> bool:
    return (Path(folder) / HEADER).is_file()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / "chunks").is_dir():
            raise UserError(
                f"{folder} is not finished; run {TOOL} with the same flags again (after --shard: with --merge)"
            ) from error
        raise UserError(
            f"{folder} is no proposal cache ({HEADER} is missing); make one with {TOOL}, or read published .npy files "
            f"with --proposals file:{folder} without --cache_path"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read ({error}); copy the cache again, or make it again with {TOOL}"
        ) from error
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{folder} has format {str(version)[:40]}, this version reads {FORMAT}; make it again with {TOOL}"
        )
    for key, kind in HEADER_TYPES.items():
        value = header.get(key)
        is_negative = kind is int and isinstance(value, int) and value < 0
        if not isinstance(value, kind) or is_negative or (kind is int and isinstance(value, bool)):
            raise UserError(
                f"{path} is damaged: {key} is {str(value)[:40]!r}; copy the cache again, or make it again with {TOOL}"
            )
    return header


class CachedProposals(CacheableProposals):
    """The boxes of a cache, equal to those of the method that made it.

    The order of boxes without scores is drawn again at each call, as in the method itself.
    """

    reads_pixels = False

    def __init__(self, cache: ProposalCache) -> None:
        self.cache = cache
        self.grid = cache.header["grid"]
        self.settings = cache.header["settings"]
        # A cache made from this one must keep the float boxes of files and not round them to whole pixels.
        self.dtype = cache.boxes.dtype.type

    @classmethod
    def open(cls, folder: str, method: object, name: str) -> "CachedProposals":
        """Open the cache `folder` in place of a method.

        Args:
            method: the method; the cache must have been made by it, with the same settings.
            name: the method's name, as given to `--proposals`.

        Raises:
            UserError: the cache does not match, or the method can't be cached.
        """
        if not isinstance(method, CacheableProposals) or name.startswith("file:"):
            raise UserError(
                f"--cache_path {folder} can't be used with --proposals {name}, only with methods that search the "
                "image; omit it"
            )
        cache = ProposalCache(folder)
        cls.check_origin(folder, cache.header, method, name)
        return cls(cache)

    @staticmethod
    def check_origin(
        folder: str, header: dict[str, Any], method: CacheableProposals, name: str
    ) -> None:
        """Check that the cache with this header was made by this method with these settings.

        Raises:
            UserError: it was not.
        """
        cached = {"method": header["method"], **header["settings"]}
        wanted = {"method": name, **method.settings}
        for key in {**wanted, **cached}:
            if cached.get(key) != wanted.get(key):
                raise UserError(
                    f"--cache_path {folder} was made with {key} {cached.get(key)}, the flags say {wanted.get(key)}; "
                    f"change the flags, make another cache with {TOOL}, or read this one as it is with --proposals "
                    f"file:{folder} without --cache_path"
                )

    def check(self, images: "ImageFiles") -> None:
        """Check that the cache has all of these images, and compare the file sizes of a few.

        Raises:
            UserError: images are missing, or a file has another size than when the cache was made.
        """
        self._check_names(images)
        self._check_exif(images.exif)
        step = max(len(images) // SPOT_CHECKS, 1)
        for i in range(0, len(images), step):
            cached_size = self.cache.file_bytes[self.cache.names.find(images.name(i))]
            size = file_size(images.file(i))
            # A missing file is reported when it is read.
            if size is not None and size != cached_size:
                raise self._changed(images.path(i), f"{size} bytes", f"{cached_size}")

        header = self.cache.header
        log.info(
            "proposals: %s, %d boxes in %d images, of which %d could not be read",
            self.cache.folder,
            header["boxes"],
            header["images"],
            header["unreadable"],
        )

    def _check_exif(self, exif: str | None) -> None:
        cached = self.cache.header.get("exif", "ignore")
        wanted = exif or "ignore"
        if cached != wanted:
            raise UserError(
                f"{self.cache.folder} was made with --exif {cached}, this run has --exif {wanted}: give --exif {cached}"
                f", or make another cache with {TOOL}"
            )

    def _check_names(self, images: "ImageFiles") -> None:
        # The usual case, the same images, needs no comparison of names.
        if images.fingerprint() == self.cache.header["names"]:
            return
        known = {self.cache.names[i] for i in range(len(self.cache.names))}
        missing = [i for i in range(len(images)) if images.name(i) not in known]
        if missing:
            raise UserError(
                f"{self.cache.folder} lacks {len(missing)} of {len(images)} images, the first is "
                f"{images.name(missing[0])}; names are relative to the image folder, so give the same folder, or make "
                f"another cache with {TOOL}"
            )

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals.propose`.

        Raises:
            UserError: the image is not in the cache, or its size has changed.
            BadImageError: the image could not be read when the cache was made.
        """
        index = self.cache.names.find(name)
        if index is None:
            raise UserError(
                f"{self.cache.folder} has no image {name}: the dataset has changed; make another cache with {TOOL}"
            )

        height, width = image.shape[:2]
        cached_height, cached_width = self.cache.sizes_hw[index].tolist()
        if (cached_height, cached_width) == (0, 0):
            raise BadImageError(
                f"it could not be read when its proposals were cached; make another cache with {TOOL}"
            )
        if (height, width) != (cached_height, cached_width):
            raise self._changed(
                name, f"{width} x {height} pixels", f"{cached_width} x {cached_height}"
            )
        return self.cache.get_boxes(index)

    def _changed(self, name: str, now: str, then: str) -> UserError:
        return UserError(
            f"{name} has {now}, but had {then} when {self.cache.folder} was made: the dataset has changed; make "
            f"another cache with {TOOL}"
        )
