"""Writes whole files or none."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(
    path: str | os.PathLike, write: Callable[[BinaryIO], Any], shared: bool = False
) -> Path:
    """`write(file)` fills a hidden file in the same folder, which takes the name `path` only when it is on the disk.

    Makes the folder where it is missing. Whatever happens, `path` is the previous file or the new one, and no temporary
    file stays, unless the process is killed. Raises UserError with one line when the disk is full or the folder can't
    be written.

    shared: several processes may write to `path` at once, of which the last one wins. The temporary file of a killed
    one then stays; else the next that writes to `path` takes it over.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex if shared else path.name}.tmp")
    recorder = _Recorder(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with recorder as file:
            write(file)
            file.sync()
        os.replace(temporary, path)
    except BaseException as error:
        cause = error if isinstance(error, OSError) else recorder.problem
        with contextlib.suppress(OSError):
            temporary.unlink()
        if cause is None:
            raise
        raise UserError(_cannot_write(path, cause)) from error
    return path


def link_or_copy(source: Path, path: Path) -> None:
    """Gives a file a second name, by a hard link where the file system has them; `path` is replaced at once.

    What is written to either name later leaves the other alone, since `write_atomically` replaces names.

    Raises:
        UserError: as `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:
        with source.open("rb") as content:
            write_atomically(path, lambda file: shutil.copyfileobj(content, file))


def make_folder(
    folder: str | os.PathLike, names: Iterable[str] = (), overwrite: bool = False
) -> Path:
    """The folder of `--output_dir`, made where it is missing, and tried: on a full disk an empty file can still be
    made.

    names: of the files that will be written to it.

    Raises:
        UserError: it can't be written, or holds one of these files and `overwrite` is not set.
    """
    folder = Path(folder)
    found = [] if overwrite else [name for name in names if (folder / name).exists()]
    if found:
        raise UserError(
            f"--output_dir {folder} holds {found[0]} already: choose another folder, or --overwrite"
        )
    tried = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tried.write_bytes(bytes(2**16))
        finally:
            tried.unlink(missing_ok=True)
    except OSError as error:
        remedy = (
            "make room or choose another folder"
            if error.errno in DISK_FULL
            else "choose another folder"
        )
        raise UserError(
            f"--output_dir {folder} can't be written: {error.strerror}; {remedy}"
        ) from error
    return folder


def check_apart(folder: str | os.PathLike, images: str | os.PathLike) -> None:
    """Pictures that are drawn below a folder of images would be taken for images by the next run.

    Raises:
        UserError: the folder of `--output_dir` is the one of images, or lies in it.
    """
    if os.path.isdir(images) and Path(folder).resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--output_dir {folder} lies in the images' folder {images}, where its pictures would be taken for "
            "images: choose another folder"
        )


def write_text(path: str | os.PathLike, text: str, shared: bool = False) -> Path:
    """`write_atomically` of a text in UTF-8."""
    return write_atomically(path, lambda file: file.write(text.encode("utf-8")), shared)


class _Recorder:
    """A file that keeps its first OSError: torch.save turns "disk full" into an error that does not say so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: OSError | None = None

    def __enter__(self) -> "_Recorder":
        self.file = self.path.open("wb", buffering=0)
        return self

    def write(self, data: bytes) -> int:
        left = memoryview(data).cast("B")
        total = len(left)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.problem = self.problem or error
            raise
        return total

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def __exit__(self, *_error: Any) -> None:
        self.file.close()


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        reason = f"no room ({reason}{_free(path.parent)})"
    kept = "the previous file is kept; " if os.path.exists(path) else ""
    return f"cannot write {path}: {reason}; {kept}make room or choose another --output_dir"


def _free(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free on the disk"
    except OSError:  # the folder could not be made
        return ""
