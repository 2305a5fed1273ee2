"""Proposals of a whole data set on disk, in a few arrays that all processes map into their memory.

A store is a folder of
  header.json       what it is; written last: without it there is no store
  name_bytes.npy, name_ends.npy    paths relative to the data set's folder, sorted (`PackedStrings.arrays`)
  offsets.npy       int64 [I + 1]; the boxes of image i are rows offsets[i] to offsets[i + 1]
  boxes.npy         uint16 or float32 [B, 4], (x0, y0, x1, y1) in steps of the method's grid
  scores.npy        float32 [B], only where the method has scores; NaN where it has none for an image
  sizes.npy         int32 [I, 2], height and width in pixels; 0 where the image could not be read
  file_bytes.npy, file_crc32.npy   int64 and uint32 [I], of the image files
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
TOOL = "tools/cache_proposals.py"
SPOT_CHECKS = 64  # images of which the file size is compared at the start of a run


class ProposalCache:
    """Reads a store. The arrays are mapped when first used, in each process, and are not copied to worker processes.

    Raises:
        UserError: the folder holds no whole store of this format.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()
        self.header = _read_header(self.folder)
        arrays = (self.offsets, self.boxes, self.sizes_hw, self.names)
        lengths = (
            self.header["images"] + 1,
            self.header["boxes"],
            self.header["images"],
            self.header["images"],
        )
        if tuple(map(len, arrays)) != lengths or self.offsets[-1] != len(self.boxes):
            raise UserError(
                f"{self.folder} is damaged: its arrays are not as long as {HEADER} says; copy it again or make another"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "header": self.header}

    def _load_array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} can't be read ({reason}): copy the store again or make it again with {TOOL}"
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

    def get_boxes(self, row: int) -> BoxesAndScores:
        """(boxes [N, 4] in steps of the grid, scores float32 [N] or None), copied."""
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        scores = None if self.scores is None else np.array(self.scores[rows])
        return np.array(self.boxes[rows]), None if scores is None or np.isnan(
            scores
        ).any() else scores


def is_proposal_cache(folder: str | os.PathLike) -> bool:
    return (Path(folder) / HEADER).is_file()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / "chunks").is_dir():
            raise UserError(
                f"{folder} is not finished: run {TOOL} with the same flags again (after --shard: with --merge)"
            ) from error
        raise UserError(
            f"{folder} holds no proposals ({HEADER} is missing): make them with {TOOL}; published .npy files are read "
            f"by --proposals file:{folder} without --cache_path"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): copy the store again or make it again with {TOOL}"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {header.get('format')}, this version reads {FORMAT}: make it again with {TOOL}"
        )
    return header


class CachedProposals(CacheableProposals):
    """The boxes of a store, as the method itself would give them; the order of boxes without scores is redrawn at
    each call.
    """

    def __init__(self, store: ProposalCache) -> None:
        self.cache = store
        self.grid, self.settings = store.header["grid"], store.header["settings"]
        self.dtype = (
            store.boxes.dtype.type
        )  # a store of it must not cut the boxes of files to whole pixels

    @classmethod
    def open(cls, folder: str, method: object, name: str) -> "CachedProposals":
        """The store at `folder`, which must have been made by this method with these settings.

        Raises:
            UserError: it was not; or the method has nothing that could be stored.
        """
        if not isinstance(method, CacheableProposals) or name.startswith("file:"):
            raise UserError(
                f"--cache_path {folder} is for methods that search the image, not for --proposals {name}: leave it out"
            )
        store = ProposalCache(folder)
        cls.check_origin(folder, store.header, method, name)
        return cls(store)

    @staticmethod
    def check_origin(
        folder: str, header: dict[str, Any], method: CacheableProposals, name: str
    ) -> None:
        """
        Raises:
            UserError: the store of this header was made by another method or with other settings.
        """
        made, wanted = (
            {"method": header["method"], **header["settings"]},
            {"method": name, **method.settings},
        )
        wrong = [key for key in {**wanted, **made} if made.get(key) != wanted.get(key)]
        if wrong:
            key = wrong[0]
            raise UserError(
                f"--cache_path {folder} was made with {key} {made.get(key)}, the flags say {wanted.get(key)}: change "
                f"the flags, make another store with {TOOL}, or take it as it is by --proposals file:{folder} without "
                "--cache_path"
            )

    def check(self, images: "ImageFiles") -> None:
        """
        Raises:
            UserError: images are missing, or files are not those that were searched (their size differs; a few are
                looked at).
        """
        self._check_names(images)
        step = max(len(images) // SPOT_CHECKS, 1)
        for i in range(0, len(images), step):
            row = self.cache.names.find(images.name(i))
            size = file_size(images.file(i))
            if size is not None and size != self.cache.file_bytes[row]:
                raise self._changed(
                    images.path(i), f"{size} bytes", f"{self.cache.file_bytes[row]}"
                )
        header = self.cache.header
        log.info(
            "proposals: %s, %d boxes in %d images, of which %d could not be read",
            self.cache.folder,
            header["boxes"],
            header["images"],
            header["unreadable"],
        )

    def _check_names(self, images: "ImageFiles") -> None:
        if images.fingerprint() == self.cache.header["names"]:
            return
        known = {self.cache.names[i] for i in range(len(self.cache.names))}
        missing = [i for i in range(len(images)) if images.name(i) not in known]
        if missing:
            raise UserError(
                f"{self.cache.folder} lacks {len(missing)} of {len(images)} images, the first is "
                f"{images.name(missing[0])}: names count from the folder that is given as images; make another store "
                f"with {TOOL}"
            )

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        row = self.cache.names.find(name)
        if row is None:
            raise UserError(
                f"{self.cache.folder} has no image {name}: the data set changed; make another store with {TOOL}"
            )
        size, stored = tuple(image.shape[:2]), tuple(self.cache.sizes_hw[row].tolist())
        if stored == (0, 0):
            raise BadImageError(
                f"it could not be read when its proposals were stored; make another store with {TOOL}"
            )
        if size != stored:
            raise self._changed(name, f"{size[1]} x {size[0]} pixels", f"{stored[1]} x {stored[0]}")
        return self.cache.get_boxes(row)

    def _changed(self, name: str, now: str, then: str) -> UserError:
        return UserError(
            f"{name} has {now}, but had {then} when {self.cache.folder} was made: the data set changed; make "
            f"another store with {TOOL}"
        )
