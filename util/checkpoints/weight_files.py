"""Read weight files without running code in them, and download them."""

import contextlib
import hashlib
import json
import os
import re
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from util.checkpoints.content_check import check_content
from util.checkpoints.download import HTTPS, DownloadError, download
from util.checkpoints.pickle_scan import SAVE_TENSORS, check_file
from util.checkpoints.safe_globals import safe_globals
from util.distributed import is_main_process
from util.errors import UserError
from util.files import disk_errors, is_disk_error
from util.logger import log

try:
    import fcntl
except ImportError:  # Windows has no file locks: two processes may download the same file twice
    fcntl = None

SUFFIXES = (".pth", ".tar", ".pt", ".bin", ".ckpt", ".safetensors")
PRODUCER = "predetr"  # metadata of safetensors files of this project, see `safetensors_file`
# Weight files in a folder of Hugging Face transformers, the preferred one first.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

# torch.hub's convention: NAME-0676ba61.pth ends with the first digits of the file's SHA-256 sum.
HASH_PATTERN = re.compile(r"-([0-9a-f]{8,64})\.")

# Hugging Face's names of the parts of a large checkpoint, and of their list; 00001-of-00001 is complete.
SHARD_PATTERN = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\.|\.index\.json$")

# URLs whose file keeps its plain name in the cache, because other programs store it there under that name too.
PLAIN_NAME_URLS = ("https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",)


# ---------------------------------------------------------------------------------------------------- reading


def is_url(path_or_url: str | os.PathLike) -> bool:
    """Return True for an http(s) URL, False for a local path."""
    return str(path_or_url).lower().startswith(("https://", "http://"))


def read_weights(path_or_url: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Return the content of a torch.save file (zip or legacy format) or a safetensors file.

    A folder that transformers' `save_pretrained` wrote stands for the weight file in it.

    The file is always loaded with `weights_only=True`. Besides tensors and plain containers, a few harmless classes are
    allowed, so that published checkpoints with a pickled `args` load: argparse.Namespace, paths (loaded as str), NumPy
    scalars and arrays, defaultdict (loaded as dict). Sizes are checked before memory is allocated for them.

    Raises:
        DiskError: the disk fails, or the file may not be read.
        UserError: the file is missing, damaged, contains other classes or much more than its size, or can't be
            downloaded.
    """
    path = fetch(str(path_or_url)) if is_url(path_or_url) else Path(path_or_url).expanduser()
    # An error of the disk is none of the file: what calls this may not take another file for it.
    with disk_errors("read", path):
        path = _file_of_folder(path)
        _check_file(path)
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, map_location)
        else:
            content = _read_torch(path, map_location)
    check_content(content, path)
    return content


def _read_torch(path: Path, map_location: Any) -> Any:
    try:
        check_file(path)
        with torch.serialization.safe_globals(safe_globals()), warnings.catch_warnings():
            # PyTorch warns about pickles of other programs. What matters is in the errors below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged files raise many types
        if is_disk_error(error):
            raise
        raise UserError(f"{path}: {_diagnose(path, error)}") from error


def _file_of_folder(path: Path) -> Path:
    """Return the weight file in a folder of Hugging Face transformers; any other path as it is."""
    if not (path / "config.json").is_file():
        return path
    return next((path / name for name in FOLDER_FILES if (path / name).exists()), path)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path to the checkpoint or weights")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        example = files[0] if files else path / "checkpoint.pth"
        raise UserError(
            f"{path} is a folder, not a checkpoint; give the file in it, such as {example}"
        )
    if SHARD_PATTERN.search(path.name):
        raise UserError(
            f"{path} belongs to a checkpoint in several files; load the model where it was saved and save it in one, "
            "such as model.save_pretrained(DIR, max_shard_size='100GB')"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; download or save it again")


def import_safetensors(path: str | os.PathLike) -> ModuleType:
    """Return the module `safetensors.torch`. `path`: the file that needs it, for the message.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            f"{path}: .safetensors needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    """Return the tensors, or for a file of this project the entries of a checkpoint, with the tensors under `model`."""
    safe_open = import_safetensors(path).safe_open
    try:
        with safe_open(path, framework="pt", device=str(map_location or "cpu")) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if PRODUCER not in metadata:
            return tensors
        names = metadata.keys() - {PRODUCER, "format"}
        return {"model": tensors, **{name: json.loads(metadata[name]) for name in names}}
    except Exception as error:
        if is_disk_error(error):
            raise
        raise UserError(
            f"{path} is damaged or not a safetensors file ({_first_line(error)}); download it again"
        ) from error


def check_finite(state: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Check that no weight is NaN or infinite. Published code saves such weights after a diverged epoch.

    Raises:
        UserError: with the number of tensors and the first one.
    """
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all()
    ]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} of {len(state)} tensors have NaN or infinite values (first {bad[0]}), so the "
            "training that wrote it had diverged; choose an earlier checkpoint"
        )


def _diagnose(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that torch.load refuses, and what to do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"not enough memory to load it ({_first_line(error)})"

    with path.open("rb") as file:
        head = file.read(256)
    if _is_text(head):
        return "it is a text file (a web page or a Git LFS pointer?), not a checkpoint; download the file itself"
    if head.startswith(b"PK"):
        return (
            "it is an incomplete checkpoint or another kind of zip file; download or save it again"
        )
    if head.startswith(b"\x80"):  # the first byte of every binary pickle
        return (
            "it is a pickle with more than tensors and plain containers, which may run code, so it is not loaded; "
            f"{SAVE_TENSORS}"
        )
    return (
        "it is not a torch.save file, or it is damaged; choose another file, or download it again"
    )


def _is_text(head: bytes) -> bool:
    # The file's start may end inside a character, so that undecodable bytes are ignored.
    is_printable = all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    return is_printable and head.decode("utf-8", "ignore") != ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


# ---------------------------------------------------------------------------------------------------- downloading


def fetch(url: str, schemes: tuple[str, ...] = HTTPS) -> Path:
    """Return the local file of a URL, downloaded once to torch.hub's `checkpoints` folder.

    The SHA-256 prefix in a name such as `NAME-0676ba61.pth` is verified on download.

    Args:
        schemes: of the URL and of those that it redirects to.

    Raises:
        UserError: the download fails; the message says where to put the file by hand.
    """
    name = _file_name(url)
    if not name.lower().endswith(SUFFIXES):
        raise UserError(
            f"{url} does not end in the name of a weight file ({', '.join(SUFFIXES)}); "
            "download the file with a browser and give its path"
        )
    path = cached_path(url)
    if path.exists():
        log.info("using %s", path)
        return path
    # Searched in the URL's name, not in `path`: digits added by `cached_path` are not a sum of the content.
    content_hash = HASH_PATTERN.search(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(path):
            if not path.exists():  # another process may have downloaded it in the meantime
                log.info("downloading %s to %s", url, path)
                download(
                    url,
                    path,
                    sha256_prefix=content_hash[1] if content_hash else None,
                    schemes=schemes,
                    progress=is_main_process(),
                )
    except (OSError, DownloadError) as error:
        raise UserError(
            f"cannot download {name} from {url} ({_first_line(error)}); "
            f"download it elsewhere and put it at {path}"
        ) from None  # in a notebook, the errors of the connection would fill the screen above this line
    return path


def cached_path(url: str) -> Path:
    """Return where `fetch` stores the file of a URL.

    Many files have names such as `checkpoint.pth`. Where the name has no content hash, the first 8 digits of the URL's
    own SHA-256 sum are added, so that two URLs never share a file.
    """
    name = _file_name(url)
    if url not in PLAIN_NAME_URLS and not HASH_PATTERN.search(name):
        stem, suffixes = re.fullmatch(
            r"(.*?)((?:\.(?:pth|tar|pt|bin|ckpt|safetensors))*)", name, re.IGNORECASE
        ).groups()
        name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{suffixes}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _file_name(url: str) -> str:
    return Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Let one process per machine download `path`, while the others wait and then find the file."""
    if fcntl is None:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
