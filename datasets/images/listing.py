"""The files below a folder of images."""

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
    """Paths below the folder, sorted, of images and of tar files; `skipped` counts all other files and the tar
    files.
    """

    images: PackedStrings
    tars: PackedStrings
    skipped: int


def list_folder(root: str, extensions: frozenset[str]) -> Listing:
    """Lists the files below a folder. Those with one of these extensions (in any case) are images, except hidden ones.
    Hidden folders are skipped: programs keep previews and earlier versions there.

    Symbolic links are followed, except those that lead back to a folder above. A link with an image's extension that
    leads nowhere is listed as an image.

    Raises:
        UserError: a folder can't be read.
    """
    walk = _Walk(extensions)
    walk.enter(root)
    return Listing(
        PackedStrings(sorted(walk.images)), PackedStrings(sorted(walk.tars)), walk.skipped
    )


class _Walk:
    """images, tars: paths found so far."""

    def __init__(self, extensions: frozenset[str]) -> None:
        self.extensions = extensions
        self.images: list[str] = []
        self.tars: list[str] = []
        self.skipped = 0
        self._logged = time.monotonic()

    def enter(
        self, folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()
    ) -> None:
        """Lists a folder and those below it.

        prefix: its path below the first one. above: (device, inode) of the folders around it.
        """
        try:
            status, entries = os.stat(folder), list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"{folder} can't be read ({error.strerror}): check the permissions"
            ) from error
        above = above | {(status.st_dev, status.st_ino)}
        for entry in entries:
            name, is_link = prefix + entry.name, entry.is_symlink()
            if (
                os.path.isdir(entry) if is_link else entry.is_dir()
            ):  # a link may lead where reading is not allowed
                inside = entry.stat()
                if not entry.name.startswith(".") and (inside.st_dev, inside.st_ino) not in above:
                    self.enter(entry.path, f"{name}/", above)
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
