"""Write files atomically: a reader sees the previous file or the new one, never a part."""

import codecs
import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_BYTES = 2**16  # a full disk still accepts an empty file


def write_atomically(
    path: str | os.PathLike, write: Callable[[BinaryIO], Any], shared: bool = False
) -> Path:
    """Write a temporary file in the same folder, sync it to the disk and rename it to `path`.

    The folder is created if needed. If anything fails, the previous file stays and the temporary one is deleted, unless
    the process is killed.

    Args:
        write: Called with the binary file to fill.
        shared: Several processes may write to `path` at the same time; the last one wins. Each temporary file has a
            unique name, so that of a killed process stays. Without `shared`, the next writer of `path` reuses it.

    Raises:
        UserError: The disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex if shared else path.name}.tmp")
    recorder = _ErrorRecorder(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with recorder as file:
            write(file)
            file.sync()  # before the rename, or a crash could leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException as error:  # KeyboardInterrupt must not leave a temporary file, either
        cause = error if isinstance(error, OSError) else recorder.error
        with contextlib.suppress(OSError):
            temporary.unlink()
        if cause is None:
            raise
        raise UserError(_cannot_write(path, cause)) from error
    return path


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name by a hard link, or a copy if the file system has no links. Replaces `path` atomically.

    Writing to one name later does not change the other, because `write_atomically` replaces names.

    Raises:
        UserError: As `write_atomically`.
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
    """Create the folder of `--output_dir` and check that it is writable.

    Args:
        names: Files that will be written to it.
        overwrite: Accept that some of them exist.

    Raises:
        UserError: It is not writable, or has one of these files and `overwrite` is false.
    """
    folder = Path(folder)
    found = [] if overwrite else [name for name in names if (folder / name).exists()]
    if found:
        raise UserError(
            f"--output_dir {folder} already has {found[0]}: choose another folder, or add --overwrite"
        )

    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        remedy = "choose another folder"
        if error.errno in DISK_FULL:
            remedy = f"free some space or {remedy}"
        raise UserError(
            f"--output_dir {folder} is not writable: {error.strerror}; {remedy}"
        ) from error
    return folder


def check_outside_images(folder: str | os.PathLike, images: str | os.PathLike) -> None:
    """Check that an output folder is not inside a folder of images: the next run would train on its pictures.

    Raises:
        UserError: It is the image folder, or inside of it.
    """
    if os.path.isdir(images) and Path(folder).resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--output_dir {folder} is inside the image folder {images}, so the next run would use its pictures as "
            "images: choose another folder"
        )


def write_text(path: str | os.PathLike, text: str, shared: bool = False) -> Path:
    """Write text in UTF-8, see `write_atomically`.

    Paths that are not UTF-8 and names from JSON may have halves of surrogate pairs, which become their codes.
    """
    content = text.encode("utf-8", "backslashreplace")
    return write_atomically(path, lambda file: file.write(content), shared)


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of a text file in UTF-8, or in UTF-16 with a byte order mark, as PowerShell writes it.

    Raises:
        OSError: it can't be read.
        UnicodeDecodeError: another encoding, or no text.
    """
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.splitlines()


def to_json(content: Any, **options: Any) -> str:
    """Return JSON that every parser reads: NaN and infinite numbers become null.

    options: of `json.dumps`.
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(content), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


class _ErrorRecorder:
    """A binary file that keeps its first OSError: torch.save turns "disk full" into an error that does not say so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None

    def __enter__(self) -> "_ErrorRecorder":
        # Unbuffered, so that an error occurs in `write` and not when the file is closed.
        self.file = self.path.open("wb", buffering=0)
        return self

    def write(self, data: bytes) -> int:
        remaining = memoryview(data).cast("B")
        total = len(remaining)
        try:
            while remaining:  # an unbuffered write may be partial
                remaining = remaining[self.file.write(remaining) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return total

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def __exit__(self, *_error: Any) -> None:
        self.file.close()


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        reason = f"disk full ({reason}{_free_space(path.parent)})"
    kept = "the previous file is kept; " if os.path.exists(path) else ""
    return f"cannot write {path}: {reason}; {kept}free some space or choose another --output_dir"


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free on the disk"
    except OSError:  # the folder could not be created
        return ""
