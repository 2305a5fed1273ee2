"""Write files atomically: a reader sees the previous file or the new one, never a part."""

import codecs
import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import DiskError, UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# The disk or the connection to it fails, whatever is in the file. Windows lacks some of these names.
_FAILURE_NAMES = (
    "EIO",
    "ESTALE",
    "ETIMEDOUT",
    "EREMOTEIO",
    "EHOSTDOWN",
    "ENOTCONN",
    "ENODEV",
    "ENXIO",
)
DISK_FAILS = tuple(getattr(errno, name) for name in _FAILURE_NAMES if hasattr(errno, name))
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
            unique name, so that of a killed process stays. Without `shared`, the next writer of `path` replaces it.

    Raises:
        UserError: The disk is full, fails, or the folder is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex if shared else path.name}.tmp")
    recorder = _ErrorRecorder(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not opened if it exists: it may be a link to another file, of a process that was killed in `link_or_copy`.
        temporary.unlink(missing_ok=True)
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
        raise user_error("write", path, cause) from error
    return path


def append_text(path: str | os.PathLike, text: str) -> None:
    """Append text in UTF-8. If that fails, the file ends where it did before, so that later text is not damaged.

    Raises:
        UserError: As `write_atomically`.
    """
    with disk_errors("write", path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            _write_all(file, text.encode("utf-8", "backslashreplace"))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


@contextlib.contextmanager
def disk_errors(action: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in the block into one line: "cannot ACTION PATH: ...".

    Raises:
        DiskError: The disk or the network file system failed, or refuses access.
        UserError: Anything else, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        raise user_error(action, path, error) from error


def is_disk_error(error: BaseException) -> bool:
    """Return whether the disk or the network file system failed, or refuses access, rather than a file's content."""
    return isinstance(error, OSError) and error.errno in (*DISK_FAILS, *READ_ONLY)


def list_folder(folder: str | os.PathLike) -> list[str]:
    """Return the sorted names in a folder; [] if it does not exist.

    `Path.glob` takes a folder that can't be listed for an empty one.

    Raises:
        DiskError: It can't be listed.
    """
    with disk_errors("list", folder):
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []


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
    except OSError:
        with disk_errors("read", source), source.open("rb") as content:
            write_atomically(path, lambda file: shutil.copyfileobj(content, file))
        return
    try:
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise user_error("write", path, error) from error


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
        try:
            return _write_all(self.file, data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def __exit__(self, *_error: Any) -> None:
        self.file.close()


def _write_all(file: Any, data: bytes) -> int:
    """Write to an unbuffered file, which may take a part at a time. Return the number of bytes."""
    remaining = memoryview(data).cast("B")
    total = len(remaining)
    while remaining:
        remaining = remaining[file.write(remaining) :]
    return total


def user_error(action: str, path: str | os.PathLike, error: OSError) -> UserError:
    """Return the error of one line for an action that failed on a file or folder."""
    path = Path(path)
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        reason = f"disk full ({reason}{_free_space(path.parent)})"
    kept = "the previous file is kept; " if action == "write" and os.path.exists(path) else ""
    kind = DiskError if is_disk_error(error) else UserError
    return kind(f"cannot {action} {path}: {reason}; {kept}{disk_remedy(error)}")


def disk_remedy(error: OSError) -> str:
    """Return what the user can do about an error of the disk."""
    if error.errno in DISK_FAILS:
        return "check the disk or the network file system, and start again with --resume auto"
    if error.errno in READ_ONLY:
        return "check the permissions and how the disk is mounted"
    if error.errno in DISK_FULL:
        return "free some space or choose another --output_dir"
    return "check the path or choose another --output_dir"


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free on the disk"
    except OSError:  # the folder could not be created
        return ""
