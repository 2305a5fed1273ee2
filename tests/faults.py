"""The file operations by which a run changes its folder, one by one: to look at the folder between them, or to let one
fail as a full disk or a lost network file system does.

They are: opening a file for writing, writing, sync, rename, link and removal.
"""

import builtins
import contextlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# A checkpoint has hundreds of writes, of which two stand for all: the first, and one between its tensors.
COUNTED_WRITES = (0, 20)


class Operations:
    """Counts the file operations below a folder. One runs at a time, also of several threads.

    Args:
        before: called before each operation with its name and path. It may raise the operation's error. Before a write,
            half of its data are in the file.

    Attributes:
        seen: name and file name of each operation so far.
    """

    def __init__(self, root: Path, before: Callable[[str, str], None]) -> None:
        self.root, self.before = str(root), before
        self.seen: list[str] = []
        self.lock = threading.RLock()

    def check(self, name: str, path: Any) -> None:
        if self.is_below(path):
            with self.lock:
                self.seen.append(f"{name} {os.path.basename(path)}")
                self.before(name, os.fspath(path))

    def is_below(self, path: Any) -> bool:
        return isinstance(path, str | Path) and f"{path}/".startswith(f"{self.root}/")

    @contextlib.contextmanager
    def observed(self) -> Iterator["Operations"]:
        """Observe the operations inside the block."""
        opened = builtins.open
        paths: dict[int, str] = {}

        def open_observed(path, mode="r", *args, **settings):
            if not (set(mode) & set("wax+") and self.is_below(path)):
                return opened(path, mode, *args, **settings)
            self.check("open", path)
            file = opened(path, mode, *args, **settings)
            paths[file.fileno()] = str(path)
            return _ObservedFile(file, str(path), self)

        def fsync(number: int) -> None:  # nothing to wait for: no power fails here
            self.check("fsync", paths.get(number, ""))

        with contextlib.ExitStack() as stack:
            for name in ("replace", "link", "unlink", "rename", "remove"):
                stack.enter_context(mock.patch.object(os, name, self._checked(name)))
            stack.enter_context(mock.patch.object(os, "fsync", fsync))
            for module in (io, builtins):  # Path.open, and open
                stack.enter_context(mock.patch.object(module, "open", open_observed))
            yield self

    def _checked(self, name: str) -> Callable:
        original = getattr(os, name)

        def call(path, *args, **settings):
            with self.lock:
                self.check(name, args[0] if args else path)  # a rename is known by its new name
                return original(path, *args, **settings)

        return call


class _ObservedFile:
    def __init__(self, file: Any, path: str, operations: Operations) -> None:
        self.file, self.path, self.operations = file, path, operations
        self.writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes - 1 not in COUNTED_WRITES:
            return self.file.write(data)
        half = len(data) // 2
        with self.operations.lock:
            self.file.write(data[:half])
            self.file.flush()
            self.operations.check("write", self.path)
            return half + self.file.write(data[half:])

    def __enter__(self) -> "_ObservedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def states_between_operations(root: Path, run: Callable[[], Any], copies: Path) -> dict[str, Path]:
    """Run something that writes to `root`, and copy this folder before each of its file operations.

    These are all states that SIGKILL can leave. Of those that differ in temporary files only, the one with most of them
    is kept.

    Returns:
        The operation that comes next -> the copy, in `copies`.
    """
    found: dict[tuple, tuple[int, str, Path]] = {}

    def copy(name: str, path: str) -> None:
        files = {file.name: file.read_bytes() for file in root.iterdir() if file.is_file()}
        key = tuple(sorted(item for item in files.items() if not item[0].startswith(".")))
        size = sum(len(content) for name, content in files.items() if name.startswith("."))
        if key in found and found[key][0] >= size:
            return
        place = copies / f"{len(operations.seen):04d}"
        shutil.copytree(root, place)
        found[key] = size, f"{len(operations.seen)}: {name} {os.path.basename(path)}", place

    operations = Operations(root, copy)
    with operations.observed():
        run()
    return {operation: place for _, operation, place in found.values()}
