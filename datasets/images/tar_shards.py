"""Images in tar files, in the layout of WebDataset, read in place.

WebDataset itself streams shards one after the other and shuffles in a buffer: an epoch has no k-th sample, so a run
could not resume where it stopped, and W processes would not see what one sees. Here Python's `tarfile` says at the
start where each member begins; then any image is one seek and one read, as from a folder, and the same sampler, seeds
and proposals serve both. The price: a tar file must not be compressed as a whole, and reads are in random order, which
is slow on a hard disk.
"""

import glob
import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.images.listing import TAR_EXTENSIONS
from datasets.images.packed_strings import PackedStrings
from datasets.sample import BadImageError
from util.errors import UserError
from util.logger import Progress

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
        paths = (
            sorted(glob.glob(part))
            if glob.has_magic(part)
            else [part]
            if os.path.exists(part)
            else []
        )
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
        for choice in itertools.product(
            *([p] if i % 2 == 0 else _choices(p) for i, p in enumerate(pieces))
        )
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

    Raises:
        UserError: a file is compressed, damaged, not whole or no tar file.
    """
    names = sorted(
        names, key=lambda name: f"{name}/"
    )  # so that the images are sorted by their whole names
    paths = [os.path.join(folder, name) for name in names]
    shards, offsets, sizes, skipped = [], [], [], 0
    bar = Progress(len(paths), "indexing tar files")
    with ThreadPoolExecutor(THREADS) as pool:
        for places, others in pool.map(lambda path: _read_headers(path, extensions), paths):
            members = sorted(places)
            shards.append(PackedStrings(members))
            table = np.array([places[member] for member in members], dtype=np.int64).reshape(-1, 2)
            offsets.append(table[:, 0])
            sizes.append(table[:, 1])
            skipped += others
            bar.step()
    return Shards(
        paths,
        PackedStrings.joined([f"{name}/" for name in names], shards),
        np.cumsum([0, *map(len, shards)]),
        np.concatenate(offsets),
        np.concatenate(sizes),
        skipped,
    )


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
        raise UserError(
            f"{path} is not a whole tar file ({error}): was it copied to its end?"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): check the file and its permissions"
        ) from error
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
