"""Images inside of tar files, in the layout of WebDataset, read where they lie.

WebDataset itself streams shards one after the other and mixes what passes by: there is no k-th sample of an epoch, so
that a run could not go on where it stopped, nor would W processes see what one sees. Here `tarfile` of Python says once
where each member begins; then any image is one seek and one read, as from a folder, and the same sampler, seeds and
proposals serve both. The price: a tar file must not be compressed as a whole, and reads are in random order, which a
hard disk is slow at.
"""

import glob
import itertools
import os
import posixpath
import re
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.images.listing import RULE, TAR_EXTENSIONS, UNSETTLED
from datasets.images.packed_strings import PackedStrings
from datasets.sample import BadImageError
from util.cache import load_arrays, save_arrays
from util.errors import UserError
from util.logger import Progress

KIND = "shard"
BLOCK = 512  # bytes; what a tar file consists of
THREADS = 8  # that read headers: they mostly wait for the disk
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file inside of a tar file: it has `size` bytes from `offset` on."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """
        Raises:
            BadImageError: the tar file is gone, can't be read or ends before.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise BadImageError(f"{self.path} can't be read ({error.strerror.lower()})") from error
        if len(content) < self.size:
            raise BadImageError(f"{self.path} ends before it: it has changed since the start")
        return content


@dataclass(frozen=True)
class Shards:
    """names: SHARD/MEMBER of all images, sorted; shard i has the rows starts[i] to starts[i + 1] of names, offsets and
    sizes int64 [I].

    paths: of the shards. skipped: number of other members.
    """

    paths: list[str]
    names: PackedStrings
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    skipped: int

    def member(self, index: int) -> Member:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return Member(self.paths[shard], int(self.offsets[index]), int(self.sizes[index]))


def is_tar(path: str) -> bool:
    """By its name alone; compressed ones too."""
    return path.lower().endswith(TAR_EXTENSIONS)


def expand(pattern: str) -> tuple[str, list[str]] | None:
    """(folder, names in it) of the files of a pattern such as `train/part-{000000..000146}.tar` or `train/*.tar`; None:
    no pattern.

    Braces hold a range of numbers of one width, or alternatives after commas; `*`, `?` and `[]` are those of the shell.

    Raises:
        UserError: no such file; of braces, one of them is missing.
    """
    special = re.search(r"[{*?[]", pattern)
    if special is None:
        return None
    folder = os.path.dirname(pattern[: special.start()])
    found = []
    for part in _without_braces(pattern):
        paths = sorted(glob.glob(part)) if glob.has_magic(part) else [part] if os.path.exists(part) else []
        if not paths:
            raise UserError(
                f"{pattern}: {part} does not exist: give a pattern of tar files that are there, or their folder"
            )
        found += paths
    return folder, sorted({os.path.relpath(path, folder or ".") for path in found})


def _without_braces(pattern: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)  # text, inside of braces, text, ...
    return [
        "".join(choice)
        for choice in itertools.product(*([p] if i % 2 == 0 else _choices(p) for i, p in enumerate(pieces)))
    ]


def _choices(inside: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        return inside.split(",")
    width = len(ends[1]) if len(ends[1]) == len(ends[2]) else 0
    return [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]


def open_shards(folder: str, names: Sequence[str], extensions: frozenset[str]) -> Shards:
    """The images in tar files below a folder. Members that are hidden or in a hidden folder, links and those with other
    extensions are skipped.

    Where members lie is kept between runs, and found anew in a file whose size or one of whose times of change is
    another one.

    Raises:
        UserError: a file is compressed, damaged, not whole or no tar file.
    """
    names = sorted(names, key=lambda name: f"{name}/")  # so that the images are sorted by their whole names
    paths = [os.path.join(folder, name) for name in names]
    extension_bytes = np.frombuffer("\n".join(sorted(extensions)).encode(), dtype=np.uint8)
    kept = [_kept(path, extension_bytes) for path in paths]
    todo = [i for i, index in enumerate(kept) if index is None]
    bar = Progress(len(todo), "indexing tar files")
    with ThreadPoolExecutor(THREADS) as pool:
        for i, index in zip(todo, pool.map(lambda i: _make(paths[i], extension_bytes), todo), strict=True):
            kept[i] = index
            bar.step()
    parts = [PackedStrings.of_arrays(index["name_bytes"], index["name_ends"]) for index in kept]
    return Shards(
        paths,
        PackedStrings.joined([f"{name}/" for name in names], parts),
        np.cumsum([0, *map(len, parts)]),
        np.concatenate([index["offsets"] for index in kept]),
        np.concatenate([index["sizes"] for index in kept]),
        sum(int(index["skipped"]) for index in kept),
    )


def _state(path: str) -> np.ndarray:
    """int64 [3]: size, time of the last change of the content and of anything. Tar files are often as large as each
    other, and copying may set the first time back, nothing the second."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check the path and its permissions") from error
    return np.array([status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def _kept(path: str, extension_bytes: np.ndarray) -> dict[str, np.ndarray] | None:
    arrays = load_arrays(KIND, os.path.realpath(path))
    if arrays is None or arrays.get("rule", 1) != RULE or not np.array_equal(arrays["extensions"], extension_bytes):
        return None
    return arrays if np.array_equal(arrays["state"], _state(path)) else None


def _make(path: str, extension_bytes: np.ndarray) -> dict[str, np.ndarray]:
    """The index of one tar file, kept for later runs unless the file has changed just before."""
    began, state = time.time(), _state(path)
    found, skipped = _read_headers(path, frozenset(extension_bytes.tobytes().decode().split("\n")))
    names = sorted(found)
    name_bytes, name_ends = PackedStrings(names).arrays()
    places = np.array([found[name] for name in names], dtype=np.int64).reshape(-1, 2)
    index = {
        "name_bytes": name_bytes,
        "name_ends": name_ends,
        "offsets": places[:, 0],
        "sizes": places[:, 1],
        "skipped": np.array(skipped),
        "state": state,
        "extensions": extension_bytes,
        "rule": np.array(RULE),
    }
    if state[1] <= (began - UNSETTLED) * 1e9:
        save_arrays(KIND, os.path.realpath(path), index)
    return index


def _read_headers(path: str, extensions: frozenset[str]) -> tuple[dict[str, tuple[int, int]], int]:
    """({name: (offset, size)} of the images, number of other files). Of members with the same name the last one counts,
    as if unpacked.
    """
    places: dict[str, tuple[int, int]] = {}
    skipped = 0
    try:
        with open(path, "rb") as file:
            _refuse_compressed(path, file.read(6))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # of a file with a million members they would take gigabytes
                    name = posixpath.normpath(member.name).lstrip("/")
                    hidden = any(part.startswith(".") for part in name.split("/"))
                    if (
                        member.isreg()
                        and not member.issparse()
                        and os.path.splitext(name)[1].lower() in extensions
                        and not hidden
                    ):
                        places[name] = member.offset_data, member.size
                    else:
                        skipped += not member.isdir()
                _check_end(path, file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is not a whole tar file ({error}): was it copied to its end?") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): check the file and its permissions") from error
    return places, skipped


def _refuse_compressed(path: str, first_bytes: bytes) -> None:
    for magic, name in MAGIC.items():
        if first_bytes.startswith(magic):
            raise UserError(
                f"{path} is compressed ({name}), so that no image in it can be read alone: uncompress it (JPEG and "
                "PNG files stay as small)"
            )


def _check_end(path: str, file, offset: int) -> None:
    """`tarfile` takes whatever is no header, and a missing end, for the end."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise UserError(
            f"{path} lacks the end mark of tar files: was it copied to its end? If so, truncate -s +1024 FILE adds "
            f"the mark"
        )
    if block != bytes(BLOCK):
        raise UserError(f"{path} is damaged: there is no header at byte {offset}; copy it again")
