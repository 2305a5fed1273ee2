"""Boxes that somebody else made: COCO files, NumPy files, folders of the published .npy caches, stores (`--proposals
file:PATH`).
"""

import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from datasets.images.packed_strings import PackedStrings
from datasets.proposals.base import BoxesAndScores, CacheableProposals
from datasets.proposals.cache import CachedProposals, ProposalCache, is_proposal_cache
from util.errors import UserError
from util.settings import Settings

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

SUPPORTED_FORMATS = "a COCO file (.json), a NumPy file (.npz), a folder of .npy files, or a store of tools/cache_proposals.py"
# What a pickled array of NumPy is made of: nothing else is let in, so that no file runs code.
_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.multiarray", part)
        for core in ("core", "_core")
        for part in ("_reconstruct", "scalar")
    ),
}


class FileProposals(CacheableProposals):
    """Boxes float32 (x0, y0, x1, y1) in pixels, clipped to the image; those without area are left out. With scores they
    are best first.

    A subclass has `read(name)`, which raises UserError for an image that it does not know.
    """

    dtype = np.float32
    hint = "names count from the folder that is given as images"

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.settings = {"file": self.path.name}

    def read(self, name: str) -> BoxesAndScores:
        raise NotImplementedError

    def propose(self, image: np.ndarray, name: str) -> BoxesAndScores:
        boxes, scores = self.read(name)
        height, width = image.shape[:2]
        boxes = np.clip(
            boxes.astype(np.float32).reshape(-1, 4),
            0,
            np.array([width, height, width, height], dtype=np.float32),
        )
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
        if scores is None:
            return boxes[kept], None
        scores = scores.astype(np.float32).reshape(-1)
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        return boxes[kept], scores[kept]

    def has_image(self, name: str) -> bool:
        raise NotImplementedError

    def check(self, images: "ImageFiles") -> None:
        missing = [
            name for name in map(images.name, range(len(images))) if not self.has_image(name)
        ]
        if missing:
            raise UserError(
                f"{self.path} has no boxes for {len(missing)} of {len(images)} images, the first is {missing[0]}: "
                f"{self.hint}"
            )


class CocoProposals(FileProposals):
    """A JSON object with `images` (id, file_name) and `annotations` (image_id, bbox, perhaps score); crowds are left
    out. Or a list of results (image_id, bbox, score) and, after a comma, the file whose `images` they belong to. Images
    without a box are known too.

    Raises:
        UserError: no such file, or not of these forms.
    """

    def __init__(self, path: str) -> None:
        first, _, second = path.partition(",")
        super().__init__(first)
        content = _read_json(first)
        if isinstance(content, list) and not second:
            raise UserError(
                f"{first} is a list of results and does not say which image is which: give --proposals "
                f"file:{first},ANNOTATIONS with the COCO file of these images"
            )
        images = _get_list(_read_json(second) if second else content, "images", second or first)
        rows = (
            _get_list({"results": content}, "results", first)
            if isinstance(content, list)
            else _get_list(content, "annotations", first)
        )
        self._pack(images, [row for row in rows if not row.get("iscrowd", 0)])

    def _pack(self, images: list[dict], rows: list[dict]) -> None:
        try:
            order = sorted(range(len(images)), key=lambda i: images[i]["file_name"])
            place = {images[i]["id"]: k for k, i in enumerate(order)}
            self.names = PackedStrings(images[i]["file_name"] for i in order)
            of_image = np.array([place[row["image_id"]] for row in rows], dtype=np.int64)
            boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(len(rows), 4)
            scores = np.array([row.get("score", np.nan) for row in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is no COCO file ({type(error).__name__}: {error}): images need id and file_name, "
                "annotations image_id of one of them and bbox [x, y, width, height]"
            ) from error
        for key in ("id", "file_name"):
            if len({image[key] for image in images}) < len(images):
                raise UserError(f"{self.path}: two images have the same {key}: each needs its own")
        unscored = np.isnan(scores)
        if unscored.any() and not unscored.all():
            raise UserError(
                f"{self.path}: {unscored.sum()} of {len(rows)} boxes have no score: give all of them one or none"
            )
        sort = np.argsort(of_image, kind="stable")
        boxes[:, 2:] += boxes[:, :2]
        self.boxes = boxes[sort].astype(np.float32)
        self.scores = None if unscored.all() else scores[sort]
        self.offsets = np.searchsorted(of_image[sort], np.arange(len(images) + 1))

    def has_image(self, name: str) -> bool:
        return self.names.find(name) is not None

    def read(self, name: str) -> BoxesAndScores:
        row = self.names.find(name)
        if row is None:
            raise UserError(f"{self.path} lists no image {name}: {self.hint}")
        rows = slice(self.offsets[row], self.offsets[row + 1])
        return self.boxes[rows], None if self.scores is None else self.scores[rows]


class NpzProposals(FileProposals):
    """An .npz file with an array for each image, named by its relative path: [N, 4], or [N, 5] with scores."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._archive: tuple[int, Any] | None = None
        self._names = frozenset(self._open().files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _open(self) -> Any:
        """Opened in each process, since a file's position is shared after a fork."""
        if self._archive is None or self._archive[0] != os.getpid():
            with _damaged_file_as_user_error(f"{self.path} is no .npz file of NumPy"):
                archive = np.load(self.path, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                self._archive = (os.getpid(), archive)
        return self._archive[1]

    def has_image(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> BoxesAndScores:
        if not self.has_image(name):
            raise UserError(f"{self.path} has no array {name}: {self.hint}")
        where = f"{self.path}, array {name}"
        with _damaged_file_as_user_error(f"{where} can't be read"):
            content = self._open()[name]
        return _boxes_and_scores(content, where)


class NpyFolderProposals(FileProposals):
    """The published caches: for the image `sub/name.jpg` the file `sub/name.npy`, or `name.npy` where no such folder is
    there.

    DETReg's hold an array [N, 4] without scores; Siamese DETR's a dictionary of `box` [N, 4], best first, and `score`.
    Also [N, 5].
    """

    hint = "it needs NAME.npy in the folders of the images, or in one folder if no two images have the same base name"

    def _find(self, name: str) -> Path | None:
        stem = Path(name).with_suffix(".npy")
        return next(
            (path for path in (self.path / stem, self.path / stem.name) if path.is_file()), None
        )

    def has_image(self, name: str) -> bool:
        return self._find(name) is not None

    def check(self, images: "ImageFiles") -> None:
        super().check(images)
        used: dict[Path, str] = {}
        for name in map(images.name, range(len(images))):
            other = used.setdefault(self._find(name), name)
            if other != name:
                raise UserError(
                    f"{self._find(name)} would be used for {other} and for {name}: {self.hint}"
                )

    def read(self, name: str) -> BoxesAndScores:
        path = self._find(name)
        if path is None:
            raise UserError(f"{self.path} has no file for {name}: {self.hint}")
        with _damaged_file_as_user_error(f"{path} can't be read"):
            content = read_npy(path)
        return _boxes_and_scores(content, str(path))


def read_npy(path: Path) -> Any:
    """An .npy file: an array, or the one object in it, made of plain containers and arrays. Runs no code of the file.

    Raises:
        Exception: unreadable, or with other objects in it; of any type, where a pickle is damaged.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        _, _, dtype = read_header(file)
        if not dtype.hasobject:
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
        content = _ArrayUnpickler(file).load()
    return content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else content


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(io.BytesIO(file.read()), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only arrays are read")
        return super().find_class(module, name)


@contextmanager
def _damaged_file_as_user_error(message: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive or pickle raises any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{message} ({reason}): is the file complete?") from error


def _boxes_and_scores(content: Any, where: str) -> BoxesAndScores:
    scores = None
    if isinstance(content, dict):
        content, scores = content.get("box"), content.get("score")
    try:
        boxes, scores = np.asarray(content), None if scores is None else np.asarray(scores)
    except ValueError as error:
        raise UserError(
            f"{where} holds rows of different lengths: expected boxes [N, 4] or [N, 5], and a score for each"
        ) from error
    if boxes.size == 0:
        boxes = np.zeros((0, 4), dtype=np.float32)
    if boxes.dtype.kind not in "iuf" or boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise UserError(
            f"{where} holds {boxes.dtype} {list(boxes.shape)}: expected boxes (x0, y0, x1, y1) in pixels, [N, 4] "
            f"or [N, 5]"
        )
    if boxes.shape[1] == 5:
        boxes, scores = boxes[:, :4], boxes[:, 4]
    if scores is not None and (scores.dtype.kind not in "iuf" or scores.size != len(boxes)):
        raise UserError(
            f"{where} holds {len(boxes)} boxes and {scores.size} scores, {scores.dtype}: there must be as many numbers"
        )
    return boxes, None if scores is None else scores.reshape(-1)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--proposals file:{path} can't be read ({error.strerror}): check the path"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): is the file complete?") from error


def _get_list(content: Any, key: str, path: str) -> list[dict]:
    part = content.get(key) if isinstance(content, dict) else None
    if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
        raise UserError(f"{path} has no list {key!r} of objects: it is no COCO file")
    return part


def build_from_file(settings: Settings) -> CacheableProposals:
    """Of `settings.proposals`, file:PATH.

    Raises:
        UserError: PATH is none of the forms.
    """
    path = settings.proposals.partition(":")[2]
    if not path or not os.path.exists(path.partition(",")[0]):
        raise UserError(f"--proposals {settings.proposals}: no such file: give {SUPPORTED_FORMATS}")
    if is_proposal_cache(path) or os.path.isdir(os.path.join(path, "chunks")):
        return CachedProposals(ProposalCache(path))
    if os.path.isdir(path):
        return NpyFolderProposals(path)
    suffix = Path(path.partition(",")[0]).suffix.lower()
    if suffix == ".json":
        return CocoProposals(path)
    if suffix == ".npz":
        return NpzProposals(path)
    raise UserError(
        f"--proposals {settings.proposals}: {suffix or 'it'} is not read: give {SUPPORTED_FORMATS}"
    )
