"""Build a proposal cache (`datasets.proposals.cache`) in chunks, so that a killed build can resume.

The images, sorted by name, are split into chunks. The split depends on the number of images alone.
`chunks/plan.json` says what is being built, and `chunks/NUMBER.npz` is the result of one chunk. Each file is written
atomically: it is complete or absent. Any number of processes and machines can therefore share the work, and finished
chunks are never computed again. `merge` combines all chunks to the final arrays and writes the header last.

Shapes: I images, B boxes of all images.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from datasets.images.image_folder import ImageFile, ImageFiles, open_image, read_bytes
from datasets.images.packed_strings import PackedStrings
from datasets.proposals.base import CacheableProposals
from datasets.proposals.cache import FORMAT, HEADER, TOOL, ProposalCache, is_proposal_cache
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import write_atomically, write_text

MIN_CHUNKS = 512  # unless there are fewer images
MAX_CHUNK_SIZE = 64  # images
MAX_IMAGE_SIDE = 65535  # pixels; corners are uint16


@dataclass
class Plan:
    """What a cache is built from.

    folder: of the cache.
    images: sorted by name, each once.
    method: whose boxes are cached.
    method_name: the value of --proposals.
    """

    folder: Path
    images: ImageFiles
    method: CacheableProposals
    method_name: str

    @property
    def names(self) -> PackedStrings:
        return self.images.names

    @property
    def chunk_size(self) -> int:
        return min(max(len(self.names) // MIN_CHUNKS, 1), MAX_CHUNK_SIZE)

    @property
    def num_chunks(self) -> int:
        return -(-len(self.names) // self.chunk_size)  # rounded up

    def image_indices(self, chunk: int) -> range:
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, len(self.names)))

    def chunk_path(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.npz"

    def missing(self, shard: tuple[int, int] = (1, 1)) -> list[int]:
        """Return the chunks of shard (i, n), i from 1, that are not finished."""
        finished = {path.name for path in (self.folder / "chunks").glob("*.npz")}
        number, num_shards = shard
        chunks = range(number - 1, self.num_chunks, num_shards)
        return [chunk for chunk in chunks if self.chunk_path(chunk).name not in finished]

    def identity(self) -> dict[str, Any]:
        """Return a description that is equal for builds whose chunks may be mixed. It becomes part of the header."""
        # Images are used as stored by default: caches do not say so, and older ones can't.
        exif = {"exif": "apply"} if self.images.exif == "apply" else {}
        return {
            **exif,
            "format": FORMAT,
            "method": self.method_name,
            "settings": self.method.settings,
            "grid": self.method.grid,
            "images": len(self.names),
            "names": f"{len(self.names)} images, {self.names.digest()[:16]}",
        }

    def begin(self) -> bool:
        """Create the folder, or join the build that is in it. Return False if the cache is finished.

        Raises:
            UserError: the folder has another cache, another build or other files.
        """
        plan_path = self.folder / "chunks" / "plan.json"
        is_finished = is_proposal_cache(self.folder)
        existing = self.folder / HEADER if is_finished else plan_path
        if existing.exists():
            self._check_identity(existing)
        elif (
            self.folder.exists()
            and any(self.folder.iterdir())
            and not plan_path.parent.exists()  # if it exists, another process is just starting this build
        ):
            raise UserError(f"--output_dir {self.folder} contains other files; give a new folder")
        else:
            self._write_identity(plan_path)

        if is_proposal_cache(self.folder):
            self.clean()  # a build may have been killed after the header and before its own cleanup
            return False
        return True

    def clean(self) -> None:
        """Remove what a finished cache does not need: the chunks, and temporary files of killed processes."""
        # ignore_errors: another process may be removing the same files.
        shutil.rmtree(self.folder / "chunks", ignore_errors=True)
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _write_identity(self, path: Path) -> None:
        try:
            write_text(path, json.dumps(self.identity(), indent=1), shared=True)
        except UserError:
            if not path.exists():
                raise
            # Another machine started at the same moment and wrote it first.
            self._check_identity(path)

    def _check_identity(self, path: Path) -> None:
        existing = json.loads(path.read_text(encoding="utf-8"))
        identity = self.identity()
        for key in {**identity, "exif": None}:
            value = identity.get(key)
            if existing.get(key) != value:
                raise UserError(
                    f"--output_dir {self.folder} contains proposals with {key} {existing.get(key)}, now it is {value}; "
                    "give another folder, or remove this one"
                )


class ImageResult(NamedTuple):
    """Proposals of one image.

    boxes: [N, 4] in steps of the method's grid. scores: float32 [N], NaN if the method has none.
    size_hw: (0, 0) if the image could not be read.
    file_bytes, file_crc32: of the image file.
    problem: why the image can't be used; empty if it can.
    """

    boxes: np.ndarray
    scores: np.ndarray
    size_hw: tuple[int, int]
    file_bytes: int
    file_crc32: int
    problem: str


def make_chunk(plan: Plan, chunk: int) -> tuple[int, int]:
    """Compute the proposals of one chunk and write its file. Return (images, images that could not be read)."""
    results = [_process_image(plan, index) for index in plan.image_indices(chunk)]
    arrays = {
        "counts": np.array([len(result.boxes) for result in results], dtype=np.int64),
        "boxes": np.concatenate([result.boxes for result in results]).astype(plan.method.dtype),
        "scores": np.concatenate([result.scores for result in results]),
        "sizes": np.array([result.size_hw for result in results], dtype=np.int32),
        "file_bytes": np.array([result.file_bytes for result in results], dtype=np.int64),
        "file_crc32": np.array([result.file_crc32 for result in results], dtype=np.uint32),
        "problems": np.array([result.problem for result in results], dtype=np.str_),
    }
    content = BytesIO()
    np.savez(content, **arrays)
    with _ignore_errors_if_finished(plan):
        write_atomically(
            plan.chunk_path(chunk), lambda file: file.write(content.getvalue()), shared=True
        )
    return len(results), sum(bool(result.problem) for result in results)


def _process_image(plan: Plan, index: int) -> ImageResult:
    name, file = plan.names[index], plan.images.file(index)
    num_bytes, crc32 = 0, 0
    try:
        num_bytes, crc32 = file_identity(file)
        image = np.asarray(open_image(file, plan.images.exif))  # [H, W, 3]
        height, width = image.shape[:2]
        if max(height, width) > MAX_IMAGE_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels; a side may have at most {MAX_IMAGE_SIDE}"
            )
        boxes, scores = plan.method.propose(image, name)
    except BadImageError as error:
        no_boxes = np.zeros((0, 4), dtype=plan.method.dtype)
        no_scores = np.zeros(0, dtype=np.float32)
        return ImageResult(no_boxes, no_scores, (0, 0), num_bytes, crc32, str(error))

    if scores is None:
        scores = np.full(len(boxes), np.nan, dtype=np.float32)
    return ImageResult(boxes, scores, (height, width), num_bytes, crc32, "")


def file_identity(file: ImageFile) -> tuple[int, int]:
    """Return (size in bytes, CRC-32) of a file.

    Raises:
        BadImageError: it can't be read.
    """
    content = read_bytes(file)
    return len(content), zlib.crc32(content)


def merge(plan: Plan, step: Callable[[], None] = lambda: None) -> ProposalCache:
    """Combine all chunks into the cache and remove them. `step` is called for each chunk.

    Raises:
        UserError: chunks are missing or damaged.
    """
    with _ignore_errors_if_finished(plan):
        _merge(plan, step)
    plan.clean()
    return ProposalCache(plan.folder)


@contextmanager
def _ignore_errors_if_finished(plan: Plan) -> Iterator[None]:
    """Ignore a UserError if the cache is finished by now.

    Another process with the same flags may finish it at any moment and remove the chunks. What fails then is not
    needed any more.
    """
    try:
        yield
    except UserError:
        if not is_proposal_cache(plan.folder):
            raise


def _merge(plan: Plan, step: Callable[[], None]) -> None:
    missing = plan.missing()
    if missing:
        raise UserError(
            f"{plan.folder} lacks {len(missing)} of {plan.num_chunks} chunks, the first is {missing[0]} (with --shard "
            f"i/n it belongs to shard {missing[0]} mod n + 1); run {TOOL} for them, and then with --merge"
        )

    counts, problems, has_scores = [], [], False
    for chunk in range(plan.num_chunks):
        count, reasons, scores = _read_chunk(plan, chunk, "counts", "problems", "scores")
        counts.append(count)
        names = [plan.names[index] for index in plan.image_indices(chunk)]
        for name, reason in zip(names, reasons, strict=True):
            if reason:
                problems.append([name, str(reason)])
        has_scores = has_scores or bool(np.isfinite(scores).any())
        step()

    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)  # [I + 1]
    _write_arrays(plan, offsets, has_scores)
    header = {
        **plan.identity(),
        "boxes": int(offsets[-1]),
        "scores": has_scores,
        "unreadable": len(problems),
        "problems": problems,
    }
    # Last: the header makes the folder a cache.
    write_text(plan.folder / HEADER, json.dumps(header, indent=1), shared=True)


def _write_arrays(plan: Plan, offsets: np.ndarray, has_scores: bool) -> None:
    name_bytes, name_ends = plan.names.arrays()
    small = {"offsets": offsets, "name_bytes": name_bytes, "name_ends": name_ends}
    for name, array in small.items():
        write_atomically(
            plan.folder / f"{name}.npy",
            lambda file, array=array: np.lib.format.write_array(file, array),
            shared=True,
        )

    num_images, num_boxes = len(plan.names), int(offsets[-1])
    shapes: dict[str, tuple[int, ...]] = {
        "boxes": (num_boxes, 4),
        "sizes": (num_images, 2),
        "file_bytes": (num_images,),
        "file_crc32": (num_images,),
    }
    if has_scores:
        shapes["scores"] = (num_boxes,)
    for name, shape in shapes.items():
        write_atomically(
            plan.folder / f"{name}.npy",
            lambda file, name=name, shape=shape: _stream(file, shape, _chunk_arrays(plan, name)),
            shared=True,
        )


def _chunk_arrays(plan: Plan, name: str) -> Iterator[np.ndarray]:
    """Yield one array of every chunk."""
    for chunk in range(plan.num_chunks):
        yield from _read_chunk(plan, chunk, name)


def _stream(file: BinaryIO, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write an .npy file of this shape part by part, so that the array is never in memory as a whole."""
    header_written = False
    for part in parts:
        if not header_written:
            header = {
                "descr": np.lib.format.dtype_to_descr(part.dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            header_written = True
        file.write(np.ascontiguousarray(part).tobytes())


def _read_chunk(plan: Plan, chunk: int, *names: str) -> list[np.ndarray]:
    """Read arrays of one chunk."""
    path = plan.chunk_path(chunk)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive raises any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); remove it and run {TOOL} again") from error
