"""List the images and tar files in a folder tree."""

import os
import time
from dataclasses import dataclass

from datasets.images.packed_strings import PackedStrings
from util.errors import UserError
from util.logger import log

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LOG_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Listing:
    """Result of `list_folder`.

    images, tars: sorted paths relative to the folder.
    skipped: number of files that are no images, tar files included.
    """

    images: PackedStrings
    tars: PackedStrings
    skipped: int


def list_folder(root: str, extensions: frozenset[str]) -> Listing:
    """List a folder tree. Images are the files with one of these extensions (in any case) that are not hidden.

    Hidden folders are skipped: programs keep thumbnails and earlier versions there. Symbolic links are followed, except
    to a folder that contains the link. A broken link with an image extension is listed as an image, so that it is
    reported when it is read.

    Raises:
        UserError: a folder can't be read.
    """
    walk = _FolderWalk(extensions)
    walk.enter(root)
    # Sorted: `os.scandir` has no fixed order, and a resumed run needs the same indices.
    return Listing(
        PackedStrings(sorted(walk.images)), PackedStrings(sorted(walk.tars)), walk.skipped
    )


class _FolderWalk:
    """State of a walk over a folder tree; `images` and `tars` are the relative paths found so far."""

    def __init__(self, extensions: frozenset[str]) -> None:
        self.extensions = extensions
        self.images: list[str] = []
        self.tars: list[str] = []
        self.skipped = 0
        self._logged = time.monotonic()

    def enter(
        self, folder: str, prefix: str = "", ancestors: frozenset[tuple[int, int]] = frozenset()
    ) -> None:
        """List a folder and the folders below it.

        Args:
            prefix: path of the folder relative to the root, with a slash at the end.
            ancestors: (device, inode) of the folders that contain this one, to detect cycles of links.
        """
        try:
            status, entries = os.stat(folder), list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"{folder} can't be read ({error.strerror}); check the permissions"
            ) from error

        ancestors = ancestors | {(status.st_dev, status.st_ino)}
        for entry in entries:
            name = prefix + entry.name
            is_link = entry.is_symlink()
            # `entry.is_dir()` raises if a link leads to a place that may not be read; `os.path.isdir` returns False.
            is_dir = os.path.isdir(entry) if is_link else entry.is_dir()
            if is_dir:
                inside = entry.stat()
                is_cycle = (inside.st_dev, inside.st_ino) in ancestors
                if not entry.name.startswith(".") and not is_cycle:
                    self.enter(entry.path, f"{name}/", ancestors)
            elif self._is_image(entry, is_link):
                self.images.append(name)
            else:
                self._skip(name)

        if time.monotonic() - self._logged > LOG_EVERY:
            self._logged = time.monotonic()
            log.info("%d images so far", len(self.images))

    def _is_image(self, entry: os.DirEntry, is_link: bool) -> bool:
        extension = os.path.splitext(entry.name)[1].lower()
        return (
            extension in self.extensions
            and not entry.name.startswith(".")
            and (is_link or entry.is_file())
        )

    def _skip(self, name: str) -> None:
        self.skipped += 1
        if name.lower().endswith(TAR_EXTENSIONS) and not os.path.basename(name).startswith("."):
            self.tars.append(name)
