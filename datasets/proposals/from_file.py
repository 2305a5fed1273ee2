"""`--proposals file:PATH`: boxes from COCO files, NumPy files, the published .npy caches, and proposal caches."""

import io
import json
import math
import os
import pickle
import pickletools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from datasets.images.packed_strings import PackedStrings
from datasets.proposals.base import BoxesAndScores, CacheableProposals
from datasets.proposals.cache import CachedProposals, ProposalCache, is_proposal_cache
from util.checkpoints.safe_globals import encode_latin1, numpy_stand_ins
from util.errors import UserError
from util.settings import Settings

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

SUPPORTED_FORMATS = (
    "a COCO file (.json), a NumPy file (.npz), a folder of .npy files, or a cache made by "
    "tools/cache_proposals.py"
)

CHECKED_IMAGES = 16  # evenly spaced ones, whose boxes are read at the start

MAX_BYTES = 2**26  # of the boxes of one image, unpacked: two million boxes


class FileProposals(CacheableProposals):
    """Base class of boxes from files: float32 (x0, y0, x1, y1) in pixels, best first if they have scores.

    Boxes are clipped to the image, and boxes without area are dropped. A subclass implements `has_image(name)`,
    `list_names()`, and `read(name)`, which raises UserError for an unknown image.
    """

    dtype = np.float32
    reads_pixels = False
    hint = "names are relative to the image folder"

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.settings = {"file": self.path.name}

    def read(self, name: str) -> BoxesAndScores:
        """Return (boxes [N, 4], scores [N] or None) as they are in the file."""
        raise NotImplementedError

    def has_image(self, name: str) -> bool:
        raise NotImplementedError

    def list_names(self) -> Iterable[str]:
        """Return the names that the boxes have, for messages."""
        raise NotImplementedError

    def propose(self, image: np.ndarray, name: str) -> BoxesAndScores:
        """See `CacheableProposals.propose`: boxes float32 in pixels."""
        boxes, scores = self.read(name)
        height, width = image.shape[:2]
        limits = np.array([width, height, width, height], dtype=np.float32)
        with np.errstate(over="ignore"):  # what float32 can't express becomes infinite
            boxes = np.clip(boxes.astype(np.float32).reshape(-1, 4), 0, limits)  # [N, 4]
            scores = None if scores is None else scores.astype(np.float32).reshape(-1)  # [N]
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
        if scores is None:
            return boxes[kept], None

        # Stable: boxes with equal scores stay in the order of the file.
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        return boxes[kept], scores[kept]

    def check(self, images: "ImageFiles") -> None:
        names = map(images.name, range(len(images)))
        missing = [name for name in names if not self.has_image(name)]
        if missing:
            raise UserError(
                f"{self.path} has no boxes for {len(missing)} of {len(images)} images, the first is {missing[0]}"
                f"{self._suggest(missing[0])}; {self.hint}"
            )

        # Boxes in fractions of the image end within two pixels, also if two corners are given as a corner and a size.
        tried = np.linspace(0, len(images) - 1, min(len(images), CHECKED_IMAGES)).astype(int)
        boxes = [self.read(images.name(i))[0] for i in tried.tolist()]
        boxes = np.concatenate([np.zeros((0, 4)), *boxes])  # [N, 4]
        if len(boxes) and (boxes <= 2.02).all():
            raise UserError(
                f"{self.path}: all {len(boxes)} boxes of {len(tried)} images that were tried look like fractions, the "
                f"first (x0, y0, x1, y1) is {boxes[0].tolist()}: boxes are in pixels, so scale them by the width and "
                "height of the image"
            )

    def _suggest(self, name: str) -> str:
        """Return a name that differs in folder, extension or case, for a message; else the first one."""
        example = ""
        for other in self.list_names():
            if _stem(other) == _stem(name):
                return f" (did you mean {other}?)"
            example = example or f" (it has {other}, for example)"
        return example


def _stem(name: str) -> str:
    """Return a file name without folder and extension, in lower case."""
    return os.path.splitext(os.path.basename(name.replace("\\", "/")))[0].casefold()


class CocoProposals(FileProposals):
    """Boxes of a COCO file, or of COCO results.

    A COCO file is a JSON object with `images` (id, file_name) and `annotations` (image_id, bbox, optionally score);
    crowd boxes are skipped. Results are a JSON list of (image_id, bbox, score); after a comma comes the file that has
    their `images`. An image without boxes is known too.

    Raises:
        UserError: no such file, or another format.
    """

    def __init__(self, path: str) -> None:
        first, _, second = path.partition(",")
        super().__init__(first)
        content = _read_json(first)
        is_results = isinstance(content, list)
        if is_results and not second:
            raise UserError(
                f"{first} is a list of results and does not say which image is which; give --proposals "
                f"file:{first},ANNOTATIONS with the COCO file of these images"
            )

        images = _get_list(_read_json(second) if second else content, "images", second or first)
        if is_results:
            rows = _get_list({"results": content}, "results", first)
        else:
            rows = _get_list(content, "annotations", first)
        self._pack(images, [row for row in rows if not row.get("iscrowd", 0)])

    def _pack(self, images: list[dict], rows: list[dict]) -> None:
        """Store the boxes in arrays, sorted by image name: dataloader workers share arrays, but copy Python objects."""
        try:
            order = sorted(range(len(images)), key=lambda i: images[i]["file_name"])
            position = {images[i]["id"]: k for k, i in enumerate(order)}
            self.names = PackedStrings(images[i]["file_name"] for i in order)
            image_index = np.array([position[row["image_id"]] for row in rows], dtype=np.int64)
            boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(len(rows), 4)
            scores = np.array([row.get("score", np.nan) for row in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is no COCO file ({type(error).__name__}: {error}); images need id and file_name, "
                "annotations image_id of one of them and bbox [x, y, width, height]"
            ) from error
        self._check_unique(images)
        has_no_score = np.isnan(scores)
        if has_no_score.any() and not has_no_score.all():
            raise UserError(
                f"{self.path}: {has_no_score.sum()} of {len(rows)} boxes have no score; give all of them one or none"
            )

        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        by_image = np.argsort(image_index, kind="stable")
        self.boxes = boxes[by_image].astype(np.float32)
        self.scores = None if has_no_score.all() else scores[by_image]
        # The boxes of image i are rows offsets[i] to offsets[i + 1].
        self.offsets = np.searchsorted(image_index[by_image], np.arange(len(images) + 1))

    def _check_unique(self, images: list[dict]) -> None:
        for key in ("id", "file_name"):
            if len({image[key] for image in images}) < len(images):
                raise UserError(f"{self.path}: two images have the same {key}; each needs its own")

    def list_names(self) -> Iterable[str]:
        return self.names

    def has_image(self, name: str) -> bool:
        return self.names.find(name) is not None

    def read(self, name: str) -> BoxesAndScores:
        index = self.names.find(name)
        if index is None:
            raise UserError(f"{self.path} lists no image {name}; {self.hint}")
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.boxes[rows], None if self.scores is None else self.scores[rows]


class NpzProposals(FileProposals):
    """An .npz file with one array per image, under its relative path: [N, 4], or [N, 5] with scores."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._archive: tuple[int, Any] | None = None  # (process id, open archive)
        self._names = frozenset(self._open().files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # an open file can't be pickled

    def _open(self) -> Any:
        """Return the archive, opened once per process: forked dataloader workers would share the file position."""
        if self._archive is None or self._archive[0] != os.getpid():
            with _damaged_file_as_user_error(f"{self.path} is no .npz file of NumPy"):
                archive = np.load(self.path, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                self._archive = (os.getpid(), archive)
        return self._archive[1]

    def list_names(self) -> Iterable[str]:
        return sorted(self._names)

    def has_image(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> BoxesAndScores:
        if not self.has_image(name):
            raise UserError(f"{self.path} has no array {name}; {self.hint}")
        where = f"{self.path}, array {name}"
        with _damaged_file_as_user_error(f"{where} can't be read"):
            archive = self._open().zip
            try:
                member = archive.getinfo(f"{name}.npy")
            except KeyError:
                member = archive.getinfo(name)
            with archive.open(member) as file:
                content = _read_npy(file, member.file_size, allow_objects=False)
        return _boxes_and_scores(content, where)


class NpyFolderProposals(FileProposals):
    """The published caches: `sub/name.npy`, or else `name.npy`, for the image `sub/name.jpg`.

    DETReg's files have an array [N, 4] without scores. Siamese DETR's have a dict with `box` [N, 4], best first, and
    `score`. Arrays [N, 5] with scores work too.
    """

    hint = "it needs NAME.npy in the folders of the images, or in one folder if no two images have the same base name"

    def _find(self, name: str) -> Path | None:
        stem = Path(name).with_suffix(".npy")
        for path in (self.path / stem, self.path / stem.name):
            if path.is_file():
                return path
        return None

    def list_names(self) -> Iterable[str]:
        return (str(path.relative_to(self.path)) for path in sorted(self.path.rglob("*.npy")))

    def has_image(self, name: str) -> bool:
        return self._find(name) is not None

    def check(self, images: "ImageFiles") -> None:
        super().check(images)
        # DETReg's keys are base names, so two images could share one file, and one of them would get wrong boxes.
        used: dict[Path, str] = {}
        for name in map(images.name, range(len(images))):
            path = self._find(name)
            other = used.setdefault(path, name)
            if other != name:
                raise UserError(f"{path} would be used for {other} and for {name}; {self.hint}")

    def read(self, name: str) -> BoxesAndScores:
        path = self._find(name)
        if path is None:
            raise UserError(f"{self.path} has no file for {name}; {self.hint}")
        with _damaged_file_as_user_error(f"{path} can't be read"):
            content = read_npy(path)
        return _boxes_and_scores(content, str(path))


def read_npy(path: Path) -> Any:
    """Read an .npy file: an array, or one pickled object of plain containers and arrays. Runs no code of the file.

    Raises:
        Exception: the file is damaged or contains other objects. A damaged pickle raises any type.
    """
    with path.open("rb") as file:
        return _read_npy(file, path.stat().st_size, allow_objects=True)


def _read_npy(file: BinaryIO | Any, num_bytes: int, *, allow_objects: bool) -> Any:
    """Read an .npy file of this size, see `read_npy`; only arrays of numbers without `allow_objects`."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject and not allow_objects:
        raise ValueError("Objects are not read from an .npz file")
    if dtype.hasobject:
        content = _ArrayUnpickler(file.read()).load()
        # np.save wraps an object, such as Siamese DETR's dict, in an array [] of dtype object.
        is_wrapped = isinstance(content, np.ndarray) and content.ndim == 0
        return content.item() if is_wrapped else content

    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed > min(num_bytes, MAX_BYTES):
        raise ValueError(f"an array {list(shape)} in {num_bytes} bytes")
    data = file.read(claimed + 1)  # beyond the end, where a zip file compares the checksum
    return np.frombuffer(data[:claimed], dtype).reshape(shape, order="F" if is_fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of NumPy arrays that refuses every other class and function."""

    def __init__(self, content: bytes) -> None:
        for opcode, argument, _ in pickletools.genops(content):
            # These two reserve memory for any number that they are given.
            if opcode.name == "BYTEARRAY8" or (
                opcode.name == "LONG_BINPUT" and argument > len(content)
            ):
                raise pickle.UnpicklingError(f"the instruction {opcode.name} {argument}")
        # NumPy asks for this encoding to read arrays that were pickled by Python 2.
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        allowed = {**numpy_stand_ins(), "_codecs.encode": encode_latin1}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it contains a {module}.{name}, and only arrays are read")
        return allowed[f"{module}.{name}"]


@contextmanager
def _damaged_file_as_user_error(message: str) -> Iterator[None]:
    """Turn any error that a damaged file causes into a UserError of one line."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive or pickle raises any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{message} ({reason}); check that the file is complete") from error


def _boxes_and_scores(content: Any, where: str) -> BoxesAndScores:
    """Split the content of a NumPy file into boxes [N, 4] and scores [N] or None, and check them.

    Args:
        content: an array [N, 4] or [N, 5], or a dict with `box` and optionally `score`.
        where: file and array, for messages.
    """
    scores = None
    if isinstance(content, dict):
        content, scores = content.get("box"), content.get("score")
    try:
        boxes = np.asarray(content)
        scores = None if scores is None else np.asarray(scores)
    except ValueError as error:
        raise UserError(
            f"{where} has rows of different lengths; expected boxes [N, 4] or [N, 5], and a score for each"
        ) from error

    if boxes.size == 0:  # an empty list is an array [0]
        boxes = np.zeros((0, 4), dtype=np.float32)
    if boxes.dtype.kind not in "iuf" or boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise UserError(
            f"{where} has {boxes.dtype} {list(boxes.shape)}; expected boxes (x0, y0, x1, y1) in pixels, [N, 4] or "
            "[N, 5]"
        )
    if boxes.shape[1] == 5:
        boxes, scores = boxes[:, :4], boxes[:, 4]
    if scores is None:
        return boxes, None

    if scores.dtype.kind not in "iuf" or scores.size != len(boxes):
        raise UserError(
            f"{where} has {len(boxes)} boxes and {scores.size} scores ({scores.dtype}); expected a number for each box"
        )
    # Siamese DETR's scores are [N] or [N, 1], depending on the version of OpenCV that made them.
    return boxes, scores.reshape(-1)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"--proposals file:{path} can't be read ({error.strerror}); check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); check that the file is complete"
        ) from error


def _get_list(content: Any, key: str, path: str) -> list[dict]:
    """Return the list of objects under `key` of a COCO file."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} has no list {key!r} of objects; give a COCO file")
    return entries


def build_from_file(settings: Settings) -> CacheableProposals:
    """Build the method of `settings.proposals`, file:PATH.

    Raises:
        UserError: PATH does not exist, or has none of the supported formats.
    """
    path = settings.proposals.partition(":")[2]
    first = path.partition(",")[0]  # a COCO file may follow after a comma
    if not path or not os.path.exists(first):
        raise UserError(f"--proposals {settings.proposals}: no such file; give {SUPPORTED_FORMATS}")

    # A folder with `chunks` is a cache that is not finished, and ProposalCache says so.
    if is_proposal_cache(path) or os.path.isdir(os.path.join(path, "chunks")):
        return CachedProposals(ProposalCache(path))
    if os.path.isdir(path):
        return NpyFolderProposals(path)
    suffix = Path(first).suffix.lower()
    if suffix == ".json":
        return CocoProposals(path)
    if suffix == ".npz":
        return NpzProposals(path)
    raise UserError(
        f"--proposals {settings.proposals}: unsupported format {suffix or '(no extension)'}; give {SUPPORTED_FORMATS}"
    )
