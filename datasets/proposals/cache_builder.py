"""Makes a store of proposals (`datasets.proposals.cache`) in parts that survive a kill at any moment.

The images, sorted by name, are cut into chunks, whose number depends on nothing but the number of images.
`chunks/plan.json` says what is being made, `chunks/NUMBER.npz` is the result of one chunk; each is there as a whole or
not at all. So any number of processes and machines can share the work, and what was done is not done again. `merge`
makes the arrays out of all chunks, and the header last.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.images.image_folder import ImageFile, ImageFiles, open_image, read_bytes
from datasets.images.packed_strings import PackedStrings
from datasets.proposals.base import CacheableProposals
from datasets.proposals.cache import FORMAT, HEADER, TOOL, ProposalCache, is_proposal_cache
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import write_atomically, write_text

MIN_CHUNKS = 512  # at least as many, where there are enough images
MAX_CHUNK_SIZE = 64  # images
MAX_IMAGE_SIDE = 65535  # pixels that a corner in 16 bits can say


@dataclass
class Plan:
    """What a store is made of. The images are sorted by name, each once; `method_name` is what --proposals says."""

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
        return -(-len(self.names) // self.chunk_size)

    def image_indices(self, chunk: int) -> range:
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, len(self.names)))

    def chunk_path(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.npz"

    def missing(self, shard: tuple[int, int] = (1, 1)) -> list[int]:
        """Chunks of shard (i, n), i from 1, that are still to be made."""
        done = {path.name for path in (self.folder / "chunks").glob("*.npz")}
        return [
            k
            for k in range(shard[0] - 1, self.num_chunks, shard[1])
            if self.chunk_path(k).name not in done
        ]

    def identity(self) -> dict[str, Any]:
        """Equal for two builds whose chunks may be mixed."""
        return {
            "format": FORMAT,
            "method": self.method_name,
            "settings": self.method.settings,
            "grid": self.method.grid,
            "images": len(self.names),
            "names": f"{len(self.names)} images, {self.names.digest()[:16]}",
        }

    def begin(self) -> bool:
        """Makes the folder, or joins the build that is in it; False where the store is finished.

        Raises:
            UserError: another store or build lies there.
        """
        plan = self.folder / "chunks" / "plan.json"
        existing = self.folder / HEADER if is_proposal_cache(self.folder) else plan
        if existing.exists():
            self._compare(existing)
        elif self.folder.exists() and any(self.folder.iterdir()) and not plan.parent.exists():
            raise UserError(f"--output_dir {self.folder} holds other files: give a new folder")
        else:
            self._write(plan)
        if is_proposal_cache(self.folder):
            self.clean()  # of a build that was killed in its last moment
            return False
        return True

    def clean(self) -> None:
        """Removes what a finished store does not need: the chunks, and temporary files of processes that were
        killed.
        """
        shutil.rmtree(
            self.folder / "chunks", ignore_errors=True
        )  # another process may be removing them too
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        try:
            write_text(path, json.dumps(self.identity(), indent=1), shared=True)
        except UserError:
            if not path.exists():
                raise
            self._compare(path)  # another machine that starts at this moment wrote it

    def _compare(self, path: Path) -> None:
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self.identity().items():
            if there.get(key) != value:
                raise UserError(
                    f"--output_dir {self.folder} holds proposals with {key} {there.get(key)}, now it is {value}: give "
                    "another folder, or remove this one"
                )


def make_chunk(plan: Plan, chunk: int) -> tuple[int, int]:
    """Searches the images of one chunk and writes its file: (images, of which could not be read)."""
    rows = [_search(plan, i) for i in plan.image_indices(chunk)]
    boxes, scores, sizes, files, problems = zip(*rows, strict=True)
    arrays = {
        "counts": np.array([len(part) for part in boxes], dtype=np.int64),
        "boxes": np.concatenate(boxes).astype(plan.method.dtype),
        "scores": np.concatenate(scores),
        "sizes": np.array(sizes, dtype=np.int32),
        "file_bytes": np.array([size for size, _ in files], dtype=np.int64),
        "file_crc32": np.array([crc for _, crc in files], dtype=np.uint32),
        "problems": np.array(problems, dtype=np.str_),
    }
    content = BytesIO()
    np.savez(content, **arrays)
    with _unless_finished(plan):
        write_atomically(
            plan.chunk_path(chunk), lambda file: file.write(content.getvalue()), shared=True
        )
    return len(rows), sum(map(bool, problems))


def _search(plan: Plan, index: int) -> tuple:
    """(boxes, scores or NaN, (height, width), (file bytes, CRC-32), why it can't be used or "")."""
    name = plan.names[index]
    file = plan.images.file(index)
    identity = (0, 0)
    try:
        identity = file_identity(file)
        image = np.asarray(open_image(file))
        if max(image.shape[:2]) > MAX_IMAGE_SIDE:
            raise BadImageError(
                f"{image.shape[1]} x {image.shape[0]} pixels: a side may have {MAX_IMAGE_SIDE}"
            )
        boxes, scores = plan.method.propose(image, name)
    except BadImageError as error:
        return (
            np.zeros((0, 4), dtype=plan.method.dtype),
            np.zeros(0, dtype=np.float32),
            (0, 0),
            identity,
            str(error),
        )
    if scores is None:
        scores = np.full(len(boxes), np.nan, dtype=np.float32)
    return boxes, scores, image.shape[:2], identity, ""


def file_identity(file: ImageFile) -> tuple[int, int]:
    """(bytes, CRC-32) of a file.

    Raises:
        BadImageError: it can't be read.
    """
    content = read_bytes(file)
    return len(content), zlib.crc32(content)


def merge(plan: Plan, step: Callable[[], None] = lambda: None) -> ProposalCache:
    """The store, out of all chunks, which are removed. `step` is called for each chunk.

    Raises:
        UserError: chunks are missing or damaged.
    """
    with _unless_finished(plan):
        _merge(plan, step)
    plan.clean()
    return ProposalCache(plan.folder)


@contextmanager
def _unless_finished(plan: Plan) -> Iterator[None]:
    """Another process with the same flags may finish the store at any moment and remove the chunks: what fails then is
    not needed.
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
            f"i/n that of shard {missing[0]} mod n + 1): run {TOOL} for them, and then with --merge"
        )
    counts, problems, has_scores = [], [], False
    for chunk in range(plan.num_chunks):
        count, reasons, scores = _read(plan, chunk, "counts", "problems", "scores")
        counts.append(count)
        names = [plan.names[i] for i in plan.image_indices(chunk)]
        problems += [
            [name, str(reason)] for name, reason in zip(names, reasons, strict=True) if reason
        ]
        has_scores = has_scores or bool(np.isfinite(scores).any())
        step()
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    _write_arrays(plan, offsets, has_scores)
    header = {
        **plan.identity(),
        "boxes": int(offsets[-1]),
        "scores": has_scores,
        "unreadable": len(problems),
        "problems": problems,
    }
    write_text(plan.folder / HEADER, json.dumps(header, indent=1), shared=True)


def _write_arrays(plan: Plan, offsets: np.ndarray, has_scores: bool) -> None:
    data, ends = plan.names.arrays()
    for name, array in (("offsets", offsets), ("name_bytes", data), ("name_ends", ends)):
        write_atomically(
            plan.folder / f"{name}.npy",
            lambda file, array=array: np.lib.format.write_array(file, array),
            shared=True,
        )
    images, boxes = len(plan.names), int(offsets[-1])
    shapes = {
        "boxes": (boxes, 4),
        "sizes": (images, 2),
        "file_bytes": (images,),
        "file_crc32": (images,),
    }
    for name, shape in {**shapes, **({"scores": (boxes,)} if has_scores else {})}.items():
        write_atomically(
            plan.folder / f"{name}.npy",
            lambda file, name=name, shape=shape: _stream(file, shape, _parts(plan, name)),
            shared=True,
        )


def _parts(plan: Plan, name: str) -> Iterator[np.ndarray]:
    for chunk in range(plan.num_chunks):
        yield from _read(plan, chunk, name)


def _stream(file: BinaryIO, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """An .npy file of this shape, one part after the other, so that the whole never lies in memory."""
    header_written = False
    for part in parts:
        if not header_written:
            description = {
                "descr": np.lib.format.dtype_to_descr(part.dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, description)
            header_written = True
        file.write(np.ascontiguousarray(part).tobytes())


def _read(plan: Plan, chunk: int, *names: str) -> list[np.ndarray]:
    path = plan.chunk_path(chunk)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive raises any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): remove it and run {TOOL} again") from error
