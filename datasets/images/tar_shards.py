"""Images in tar files, in the layout of WebDataset, with random access.

WebDataset streams shards one after the other and shuffles in a buffer: an epoch has no k-th sample, so a run could not
resume where it stopped, and W ranks would not see the same batches as one process. Here Python's `tarfile` finds the
offset of each member at the start. Reading an image is then one seek and one read, as from a folder, and sampler, seeds
and proposals work the same.

The price: a tar file must not be compressed as a whole, and random reads are slow on a hard disk.
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
from typing import BinaryIO, NamedTuple

import numpy as np

from datasets.images.listing import TAR_EXTENSIONS
from datasets.images.packed_strings import PackedStrings
from datasets.sample import BadImageError
from util.errors import UserError
from util.logger import Progress

BLOCK_SIZE = 512  # bytes; headers and contents of a tar file start at multiples of it
NUM_THREADS = 8  # for reading headers, which mostly waits for the disk

# First bytes of compressed files.
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class TarMember(NamedTuple):
    """A file inside of a tar file: `size` bytes at `offset` of the tar file `path`."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the content.

        Raises:
            BadImageError: the tar file is missing, unreadable or too short.
        """
        # Opened for each read: dataloader workers must not share a file position.
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise BadImageError(f"{self.path} can't be read ({error.strerror.lower()})") from error
        if len(content) < self.size:
            raise BadImageError(
                f"{self.path} ends before this image; the file has changed since the start of the run"
            )
        return content


@dataclass(frozen=True)
class TarShards:
    """Index of the images in tar files.

    paths: path of each tar file.
    names: SHARD/MEMBER of all I images, sorted.
    starts: shard i has the rows starts[i] to starts[i + 1] of names, offsets and sizes.
    offsets, sizes: int64 [I], in bytes.
    skipped: number of members that are no images.
    """

    paths: list[str]
    names: PackedStrings
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    skipped: int

    def member(self, index: int) -> TarMember:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return TarMember(self.paths[shard], int(self.offsets[index]), int(self.sizes[index]))


def is_tar(path: str) -> bool:
    """Return whether a path has the extension of a tar file, compressed ones included."""
    return path.lower().endswith(TAR_EXTENSIONS)


def expand_pattern(pattern: str) -> tuple[str, list[str]] | None:
    """Expand a pattern such as `train/part-{000000..000146}.tar` or `train/*.tar` to (folder, names in it).

    Braces contain a range of numbers, with leading zeros if both ends have the same width, or alternatives separated by
    commas. `*`, `?` and `[]` work as in the shell. Returns None if there is none of these characters.

    Raises:
        UserError: no file matches, or one file of a brace expression is missing.
    """
    special = re.search(r"[{*?[]", pattern)
    if special is None:
        return None

    folder = os.path.dirname(pattern[: special.start()])
    found = []
    for part in _expand_braces(pattern):
        if glob.has_magic(part):
            paths = sorted(glob.glob(part))
        else:
            paths = [part] if os.path.exists(part) else []
        if not paths:
            # Braces name every file, so a missing shard is an error.
            raise UserError(
                f"{pattern}: {part} does not exist; give a pattern that matches tar files, or their folder"
            )
        found += paths
    return folder, sorted({os.path.relpath(path, folder or ".") for path in found})


def _expand_braces(pattern: str) -> list[str]:
    # Because of the group, even pieces are text and odd ones are the insides of braces.
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    alternatives = [
        _brace_alternatives(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)
    ]
    return ["".join(choice) for choice in itertools.product(*alternatives)]


def _brace_alternatives(inside: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        return inside.split(",")
    first, last = ends.groups()
    width = len(first) if len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def open_shards(folder: str, names: Sequence[str], extensions: frozenset[str]) -> TarShards:
    """Index the images in the tar files `names` of a folder.

    Links, members with other extensions, and members that are hidden or in a hidden folder are skipped.

    Raises:
        UserError: a file is compressed, damaged, incomplete or no tar file.
    """
    # Sorted with the slash, so that the names SHARD/MEMBER are sorted as a whole: "a.tar-1.tar/..." before "a.tar/...".
    names = sorted(names, key=lambda name: f"{name}/")
    paths = [os.path.join(folder, name) for name in names]

    members, offsets, sizes, skipped = [], [], [], 0
    bar = Progress(len(paths), "indexing tar files")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for images, others in pool.map(lambda path: _read_headers(path, extensions), paths):
            image_names = sorted(images)
            table = np.array([images[name] for name in image_names], dtype=np.int64).reshape(-1, 2)
            members.append(PackedStrings(image_names))
            offsets.append(table[:, 0])
            sizes.append(table[:, 1])
            skipped += others
            bar.step()

    return TarShards(
        paths=paths,
        names=PackedStrings.concatenate([f"{name}/" for name in names], members),
        starts=np.cumsum([0, *map(len, members)]),
        offsets=np.concatenate(offsets),
        sizes=np.concatenate(sizes),
        skipped=skipped,
    )


def _read_headers(path: str, extensions: frozenset[str]) -> tuple[dict[str, tuple[int, int]], int]:
    """Return ({name: (offset, size)} of the images in a tar file, number of other files)."""
    images: dict[str, tuple[int, int]] = {}
    try:
        with open(path, "rb") as file:
            _reject_compressed(path, file.read(6))
            file.seek(0)
            skipped = _read_members(path, file, extensions, images)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is not a complete tar file ({error}); check that it was copied completely"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); check the file and its permissions"
        ) from error
    return images, skipped


def _read_members(
    path: str,
    file: BinaryIO,
    extensions: frozenset[str],
    images: dict[str, tuple[int, int]],
    prefix: str = "",
) -> int:
    """Add the images of the tar file that begins at the position of `file`; return the number of other members.

    Tar files inside of it are read too: the training images of ImageNet are a tar file of one tar file per class. Their
    images are called TAR/MEMBER, as if it were a folder.

    Args:
        path: for messages.
        prefix: name of the inner tar file, with a slash.
    """
    skipped = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # tarfile keeps all members, which takes gigabytes for a file with a million of them.
            tar.members.clear()
            name = posixpath.normpath(member.name).lstrip("/")
            if _is_image(member, name, extensions):
                # Of members with the same name the last one counts, as when the file is unpacked.
                images[prefix + name] = member.offset_data, member.size
            elif _is_inner_tar(file, member, name):
                file.seek(member.offset_data)
                inner = f"{prefix}{name}/"
                skipped += _read_members(path, file, extensions, images, inner)
                if file.tell() > member.offset_data + member.size:
                    raise UserError(
                        f"{path}: the tar file {prefix}{name} in it is not complete; copy it again"
                    )
            elif not member.isdir():
                skipped += 1
        _check_end_marker(path, file, tar.offset)
    return skipped


def _is_inner_tar(file: BinaryIO, member: tarfile.TarInfo, name: str) -> bool:
    """Return whether a member is a tar file that can be read in place: it is not compressed, hidden or empty."""
    if not _is_image(member, name, frozenset({".tar"})) or member.size < BLOCK_SIZE:
        return False
    file.seek(member.offset_data)
    return not file.read(6).startswith(tuple(COMPRESSION_MAGIC))


def _is_image(member: tarfile.TarInfo, name: str, extensions: frozenset[str]) -> bool:
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    # A sparse file is stored in pieces, so its content is not one run of bytes.
    is_contiguous = member.isreg() and not member.issparse()
    return is_contiguous and os.path.splitext(name)[1].lower() in extensions and not is_hidden


def _reject_compressed(path: str, first_bytes: bytes) -> None:
    for magic, name in COMPRESSION_MAGIC.items():
        if first_bytes.startswith(magic):
            raise UserError(
                f"{path} is compressed ({name}), so its images can't be read individually; uncompress it (JPEG and PNG "
                "files hardly grow)"
            )


def _check_end_marker(path: str, file: BinaryIO, offset: int) -> None:
    """Check that the end marker, a block of zeros, is at `offset`, where `tarfile` stopped.

    `tarfile` stops without an error at anything that is not a header, and at the end of a file that was cut off.
    """
    file.seek(offset)
    block = file.read(BLOCK_SIZE)
    if len(block) < BLOCK_SIZE:
        raise UserError(
            f"{path} lacks the end marker of a tar file; check that it was copied completely. If it was, truncate -s "
            "+1024 FILE adds the marker"
        )
    if block != bytes(BLOCK_SIZE):
        raise UserError(f"{path} is damaged: no tar header at byte {offset}; copy it again")
