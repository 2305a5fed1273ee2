"""What the tests of large data share: trees that look old, a cache of their own, tar files, calls that are counted."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from util import cache

LONG_AGO = 1e9, 1e9


def keep_cache_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the user's cache there. (XDG_CACHE_HOME would move those of other packages too.)"""
    monkeypatch.setattr(cache, "cache_folder", lambda: folder)
    return folder


def age(root: Path) -> Path:
    """Makes a tree look as if nothing in it had changed for years: what has just changed is not remembered."""
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            if not os.path.islink(path):
                os.utime(path, LONG_AGO)
    return root


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return age(root)


class Counted:
    """Counts the calls of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.calls, original = 0, getattr(owner, name)

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def of(self, call) -> tuple[int, object]:
        before, result = self.calls, call()
        return self.calls - before, result


def pack(root: Path, target: Path, style: int = tarfile.GNU_FORMAT) -> Path:
    """A tar file for each folder in `root`, as it is called, with the other files of WebDataset's samples."""
    target.mkdir(parents=True)
    for folder in sorted(root.iterdir()):
        with tarfile.open(target / folder.name, "w", format=style) as tar:
            for path in sorted(folder.rglob("*"), reverse=True):
                tar.add(path, path.relative_to(folder), recursive=False)
                if path.is_file():
                    entry = tarfile.TarInfo(str(path.relative_to(folder).with_suffix(".cls")))
                    entry.size = 1
                    tar.addfile(entry, io.BytesIO(b"7"))
    return age(target)
