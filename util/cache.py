"""What it took long to find out about the user's files, kept for later runs in a folder of the user's, never beside the
data.

A file holds arrays and is found again by its kind and the path that it is about. All of them may be removed at any
time. Whether what is kept is still true only its reader can tell.
"""

import hashlib
import os
from io import BytesIO
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.files import write_atomically
from util.logger import log

FORMAT = 1  # of every kind: a change of what an array means


def cache_folder() -> Path | None:
    """`predetr` in $XDG_CACHE_HOME, or else in ~/.cache; None for a user without a home (XDG Base Directory
    Specification, which does not let a relative path count)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(base) / "predetr" if os.path.isabs(base) else None


def load_arrays(kind: str, source: str) -> dict[str, np.ndarray] | None:
    """What `save_arrays` kept last, None where there is nothing. A file that is damaged or of another format counts as
    nothing, and a line says so."""
    path = _place(kind, source)
    try:
        if path is None or not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # the archive's checksums are compared here
        version, about = int(arrays.pop("format")), arrays.pop("source").tobytes()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive raises any type
        log.info("%s can't be used (%s): it is made anew", path, " ".join(str(error).split()) or type(error).__name__)
        return None
    if version != FORMAT:
        log.info("%s has format %d, this version reads %d: it is made anew", path, version, FORMAT)
        return None
    return arrays if about == os.fsencode(source) else None


def save_arrays(kind: str, source: str, arrays: dict[str, np.ndarray]) -> None:
    """Replaces what was kept of this kind and source. Where the folder can't be written a line says so, and nothing is
    kept.
    """
    path = _place(kind, source)
    if path is None:
        return
    content = BytesIO()
    np.savez(content, format=np.array(FORMAT), source=np.frombuffer(os.fsencode(source), dtype=np.uint8), **arrays)
    try:
        write_atomically(path, lambda file: file.write(content.getbuffer()), shared=True)  # two runs may start together
    except (UserError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        log.info("%s can't be written (%s): the next run finds out anew", path, reason)


def _place(kind: str, source: str) -> Path | None:
    folder = cache_folder()
    return folder and folder / f"{kind}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:24]}.npz"
