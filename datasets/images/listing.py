"""What lies below a folder of images: looked up once, and again when a folder in it has changed.

A folder's own times change whenever something in it is added, removed or renamed. So a listing is kept together with
number and times of every folder that was looked into, and what is kept is taken when all of them are as they were: a
thousand questions for ImageNet in place of 1.28 million. What is inside of the files doesn't matter here.
"""

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from datasets.images.packed_strings import PackedStrings
from util.cache import load_arrays, save_arrays
from util.errors import UserError
from util.logger import log

KIND = "listing"
RULE = 2  # of what is listed, also in tar files: since 2 nothing in hidden folders
TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
WORTH_KEEPING = 0.5  # seconds that a listing has taken
# seconds: file systems count time in steps of up to that, so that a second change could leave the times as they are
UNSETTLED = 2.0
SAID_EVERY = 10.0  # seconds
State = tuple[int, int, int]
NO_FOLDER: State = (0, 0, 0)


@dataclass(frozen=True)
class Listing:
    """Paths below the folder, sorted, of images and of tar files; `skipped` counts all other files and the tar
    files.
    """

    images: PackedStrings
    tars: PackedStrings
    skipped: int


def list_folder(root: str, extensions: frozenset[str], worth_keeping: float = WORTH_KEEPING) -> Listing:
    """The files below a folder. Those with one of these extensions (in any case) are images, but for hidden ones.
    Hidden folders below it are not looked into: programs keep previews and earlier versions there.

    Symbolic links are followed, links that lead back to a folder above are not. A link with an image's extension that
    leads nowhere is listed as an image. A listing that took less than `worth_keeping` seconds isn't kept.

    Raises:
        UserError: a folder can't be read.
    """
    source = os.path.realpath(root)
    kept = _kept(source, extensions)
    if kept is not None:
        return kept
    began, began_here = time.time(), time.monotonic()
    walk = Walk(extensions)
    walk.enter(root)
    listing = Listing(PackedStrings(sorted(walk.images)), PackedStrings(sorted(walk.tars)), walk.skipped)
    if time.monotonic() - began_here >= worth_keeping:
        _keep(source, extensions, listing, walk.seen, began)
    return listing


class Walk:
    """images, tars: paths found so far. seen: the state of every folder, and of every other link that is no image: it
    may become one.
    """

    def __init__(self, extensions: frozenset[str]) -> None:
        self.extensions = extensions
        self.images: list[str] = []
        self.tars: list[str] = []
        self.skipped = 0
        self.seen: dict[str, State] = {}
        self._said = time.monotonic()

    def enter(self, folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Looks into a folder and those below. prefix: its path below the first one. above: (device, number) of the
        folders around it.
        """
        try:
            status, entries = os.stat(folder), list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder} can't be read ({error.strerror}): check the permissions") from error
        self.seen[prefix] = _state_of(status)
        above = above | {(status.st_dev, status.st_ino)}
        for entry in entries:
            name, is_link = prefix + entry.name, entry.is_symlink()
            if os.path.isdir(entry) if is_link else entry.is_dir():  # a link may lead where one may not look
                if entry.name.startswith("."):
                    continue
                inside = entry.stat()
                if (inside.st_dev, inside.st_ino) in above:
                    self.seen[name] = _state_of(inside)
                else:
                    self.enter(entry.path, f"{name}/", above)
            elif self._is_image(entry, is_link):
                self.images.append(name)
            else:
                self._skip(name, is_link)
        if time.monotonic() - self._said > SAID_EVERY:
            self._said = time.monotonic()
            log.info("%d images so far", len(self.images))

    def _is_image(self, entry: os.DirEntry, is_link: bool) -> bool:
        extension = os.path.splitext(entry.name)[1].lower()
        return extension in self.extensions and not entry.name.startswith(".") and (is_link or entry.is_file())

    def _skip(self, name: str, is_link: bool) -> None:
        self.skipped += 1
        if is_link:
            self.seen[name] = NO_FOLDER
        if name.lower().endswith(TAR_EXTENSIONS) and not os.path.basename(name).startswith("."):
            self.tars.append(name)


def _state_of(status: os.stat_result) -> State:
    """(number, time of the last change of its list, time of the last change of anything): archivers set the first time
    back, nothing the second."""
    return (
        (status.st_ino & (2**63 - 1), status.st_mtime_ns, status.st_ctime_ns)
        if stat.S_ISDIR(status.st_mode)
        else NO_FOLDER
    )


def _state(path: str) -> State:
    try:
        return _state_of(os.stat(path))
    except OSError:
        return NO_FOLDER


def _kept(root: str, extensions: frozenset[str]) -> Listing | None:
    """The listing of an earlier run, if nothing has changed since."""
    arrays = load_arrays(KIND, root)
    if arrays is None or arrays.get("rule", 1) != RULE or arrays["extensions"].tobytes() != _as_bytes(extensions):
        return None
    seen = PackedStrings.of_arrays(arrays["seen_bytes"], arrays["seen_ends"])
    if any(_state(os.path.join(root, seen[i])) != tuple(state) for i, state in enumerate(arrays["states"].tolist())):
        return None
    log.info("%s has not changed since it was listed", root)
    images, tars = (
        PackedStrings.of_arrays(arrays[f"{name}_bytes"], arrays[f"{name}_ends"]) for name in ("image", "tar")
    )
    return Listing(images, tars, int(arrays["skipped"]))


def _keep(root: str, extensions: frozenset[str], listing: Listing, seen: dict[str, State], began: float) -> None:
    """Unless a folder has changed just before, or the file system gives folders no time."""
    states = np.array(list(seen.values()), dtype=np.int64)
    times = states[(states != NO_FOLDER).any(1), 1]
    if times.max() > (began - UNSETTLED) * 1e9 or times.min() <= 0:
        return
    arrays = {
        "states": states,
        "skipped": np.array(listing.skipped),
        "extensions": np.frombuffer(_as_bytes(extensions), np.uint8),
        "rule": np.array(RULE),
    }
    for name, strings in (("seen", PackedStrings(seen)), ("image", listing.images), ("tar", listing.tars)):
        arrays[f"{name}_bytes"], arrays[f"{name}_ends"] = strings.arrays()
    save_arrays(KIND, root, arrays)


def _as_bytes(names: Iterable[str]) -> bytes:
    return "\n".join(sorted(names)).encode()
