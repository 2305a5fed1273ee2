"""Reads weight files without running code in them, and fetches them from an address."""

import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import socket
import urllib.parse
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.distributed import is_main_process
from util.errors import UserError
from util.logger import log

try:
    import fcntl
except ImportError:  # Windows: two processes may then fetch the same file twice
    fcntl = None

SUFFIXES = (".pth", ".tar", ".pt", ".bin", ".ckpt", ".safetensors")
CONNECT_SECONDS = 30.0
HASHED = re.compile(
    r"-([0-9a-f]{8,64})\."
)  # NAME-0676ba61.pth: the start of the file's SHA-256 sum
# Addresses whose file keeps its plain name where it is stored, as users and other programs put it there.
KEPT_NAMES = ("https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",)


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
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # on pickles of other programs; what matters is said below
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: {_what_is_wrong(path, error)}") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path to the checkpoint or weights")
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, not a checkpoint; name the file in it, such as {path / 'checkpoint.pth'}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; fetch or save it again")


def _read_safetensors(path: Path, map_location: Any) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"{path}: reading .safetensors needs the package safetensors (it comes with timm)"
        ) from error
    try:
        return load_file(path, device=str(map_location or "cpu"))
    except Exception as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({_first_line(error)}); fetch it again"
        ) from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (
            f"it holds the Python object {refused[1]}, which may run code, so it is not loaded; "
            "save its tensors alone, torch.save({'model': model.state_dict()}, FILE), where it was made"
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"not enough memory to load it ({_first_line(error)})"
    with path.open("rb") as file:
        head = file.read(256)
    if _is_text(head):
        return "it is a text file (a web page or a Git LFS pointer?), not a checkpoint; fetch the file itself"
    if head.startswith(b"PK"):
        return "it is an incomplete checkpoint, or another kind of zip: fetch or save it again"
    if head.startswith(b"\x80"):
        return (
            "it is a pickle of more than tensors and plain containers, which may run code, so it is not loaded; "
            "save its tensors alone, torch.save({'model': model.state_dict()}, FILE), where it was made"
        )
    return "it is no checkpoint of torch.save, or a damaged one: choose another file, or fetch it again"


def _is_text(head: bytes) -> bool:
    return (
        all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
        and head.decode("utf-8", "ignore") != ""
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _harmless_globals() -> list:
    """Classes that old checkpoints hold in `args` and `meta`; none of them does anything but hold data."""
    from numpy._core import multiarray  # its public spelling, numpy.core, is deprecated

    names = [
        (argparse.Namespace, "argparse.Namespace"),
        (np.ndarray, "numpy.ndarray"),
        (np.dtype, "numpy.dtype"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [
            (multiarray.scalar, f"{module}.scalar"),
            (multiarray._reconstruct, f"{module}._reconstruct"),
        ]
    names += [type(np.dtype(code)) for code in "?bhilqBHILQefdUS"]
    for module in ("pathlib", "pathlib._local"):
        names += [
            (_posix_text, f"{module}.{name}")
            for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")
        ]
        names += [
            (_windows_text, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")
        ]
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

    A name like `NAME-0676ba61.pth` carries the start of the SHA-256 sum, which is checked on download. Other names may
    be those of several files (`checkpoint.pth`), so that the stored one gets a piece of the address's sum
    (`stored_at`).
    Raises UserError with one line that names the file, its address, and where to put it by hand.
    """
    name = _file_name(url)
    if not name.lower().endswith(SUFFIXES):
        raise UserError(
            f"{url} does not end in the name of a weight file ({', '.join(SUFFIXES)}); "
            "download the file with a browser and give its path"
        )
    path = stored_at(url)
    if path.exists():
        log.info("using %s", path)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path):
            if not path.exists():
                _download(url, path)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot fetch {name} from {url} ({_first_line(error)}); download it elsewhere and put it at {path}"
        ) from error
    return path


def stored_at(url: str) -> Path:
    """Where `fetch` keeps the file of an address: the same name for two addresses only where it tells the content."""
    name = _file_name(url)
    if url not in KEPT_NAMES and not HASHED.search(name):
        stem, suffixes = re.fullmatch(
            r"(.*?)((?:\.(?:pth|tar|pt|bin|ckpt|safetensors))*)", name, re.IGNORECASE
        ).groups()
        name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{suffixes}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _file_name(url: str) -> str:
    return Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name


def _download(url: str, path: Path) -> None:
    suffix = HASHED.search(_file_name(url))
    log.info(f"Fetching {url} to {path}")
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # a firewall that drops packets must not hang the run
    try:
        torch.hub.download_url_to_file(
            url, str(path), suffix[1] if suffix else None, progress=is_main_process()
        )
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
