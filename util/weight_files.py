"""Reads weight files without running code in them, fetches them from an address, writes whole files or none."""
import argparse
import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from util.distributed import is_main_process
from util.logger import UserError, log

try:
    import fcntl
except ImportError:  # Windows: two processes may then fetch the same file twice
    fcntl = None

SUFFIXES = (".pth", ".tar", ".pt", ".bin", ".ckpt", ".safetensors")
CONNECT_SECONDS = 30.0


# ---------------------------------------------------------------------------------------------------- reading


def is_address(path_or_url: str | os.PathLike) -> bool:
    """True for an http(s) address, False for a local path."""
    return str(path_or_url).lower().startswith(("https://", "http://"))


def read_weights(path_or_url: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """What a file of torch.save (zip or the older form) or safetensors holds, always with `weights_only=True`.

    Besides tensors and plain containers only harmless classes are accepted, so that files with a pickled `args` load:
    argparse.Namespace, paths (they become text), numpy scalars and arrays, defaultdict (it becomes a dict).
    Raises UserError with one line that names the file, what is wrong, and the remedy.
    """
    path = fetch(str(path_or_url)) if is_address(path_or_url) else Path(path_or_url).expanduser()
    _check_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: {_what_is_wrong(path, error)}") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path to the checkpoint or weights")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name the file in it, such as {path / 'checkpoint.pth'}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; fetch or save it again")


def _read_safetensors(path: Path, map_location: Any) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading .safetensors needs the package safetensors (it comes with timm)") from error
    try:
        return load_file(path, device=str(map_location or "cpu"))
    except Exception as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_first_line(error)}); fetch it again") from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (f"it holds the Python object {refused[1]}, which may run code, so it is not loaded; "
                "save its tensors alone, torch.save({'model': model.state_dict()}, FILE), where it was made")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"not enough memory to load it ({_first_line(error)})"
    with path.open("rb") as file:
        head = file.read(256)
    if _is_text(head):
        return "it is a text file (a web page or a Git LFS pointer?), not a checkpoint; fetch the file itself"
    if head.startswith(b"PK"):
        return f"it is an incomplete checkpoint, or another kind of zip ({_first_line(error)}); fetch it again"
    return f"it is no checkpoint of torch.save, or a damaged one ({_first_line(error)}); fetch or save it again"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and head.decode("utf-8", "ignore") != ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _harmless_globals() -> list:
    """Classes that old checkpoints hold in `args` and `meta`; none of them does anything but hold data."""
    from numpy._core import multiarray  # its public spelling, numpy.core, is deprecated

    names = [(argparse.Namespace, "argparse.Namespace"), (np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(multiarray.scalar, f"{module}.scalar"), (multiarray._reconstruct, f"{module}._reconstruct")]
    names += [type(np.dtype(code)) for code in "?bhilqBHILQefdUS"]
    for module in ("pathlib", "pathlib._local"):
        names += [(_posix_text, f"{module}.{name}") for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")]
        names += [(_windows_text, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    names += [(_empty_dict, "collections.defaultdict")]
    for module in ("builtins", "__builtin__"):  # what defaultdict makes
        names += [(kind, f"{module}.{kind.__name__}") for kind in (list, dict, int, float, str)]
    return names


def _posix_text(*parts: str) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _windows_text(*parts: str) -> str:
    return str(pathlib.PureWindowsPath(*parts))


def _empty_dict(*_factory: Any) -> dict:
    return {}


# ---------------------------------------------------------------------------------------------------- fetching


def fetch(url: str) -> Path:
    """The local file of an address: in torch.hub's folder of checkpoints, downloaded once.

    A name like `NAME-0676ba61.pth` carries the start of the SHA-256 sum, which is checked on download.
    Raises UserError with one line that names the file, its address, and where to put it by hand.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name
    if not name.lower().endswith(SUFFIXES):
        raise UserError(f"{url} does not end in the name of a weight file ({', '.join(SUFFIXES)}); "
                        "download the file with a browser and give its path")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path):
            if not path.exists():
                _download(url, path)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        raise UserError(f"cannot fetch {name} from {url} ({_first_line(error)}); "
                        f"download it elsewhere and put it at {path}") from error
    return path


def _download(url: str, path: Path) -> None:
    suffix = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    log.info(f"Fetching {url} to {path}")
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # a firewall that drops packets must not hang the run
    try:
        torch.hub.download_url_to_file(url, str(path), suffix[1] if suffix else None, progress=is_main_process())
    finally:
        socket.setdefaulttimeout(waiting)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Of the processes of one machine one downloads, the others wait and find the file."""
    if fcntl is None:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- writing


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """`write(file)` fills a hidden file in the same folder, which takes the name `path` only when it is on the disk.

    Whatever happens, `path` is the previous file or the new one, and no temporary file stays. Raises UserError when the
    disk is full or the folder can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
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
                left = left[self.file.write(left):]
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
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free / 2**20
        reason = f"no room ({reason}; {free:.0f} MiB free on the disk)"
    kept = "the previous file is kept; " if path.exists() else ""
    return f"cannot write {path}: {reason}; {kept}make room or choose another --output_dir"
