"""Helpers for the tests of large datasets: trees of empty files, and tar files."""

import io
import tarfile
from pathlib import Path


def touch(root: Path, *names: str) -> Path:
    """Create empty files below a folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def pack(root: Path, target: Path, style: int = tarfile.GNU_FORMAT) -> Path:
    """Pack each folder in `root` into a tar file of the same name, with a label file per image as WebDataset has it."""
    target.mkdir(parents=True)
    for folder in sorted(root.iterdir()):
        with tarfile.open(target / folder.name, "w", format=style) as tar:
            # In reverse, so that the order in the tar file is not that of the names.
            for path in sorted(folder.rglob("*"), reverse=True):
                name = path.relative_to(folder)
                tar.add(path, name, recursive=False)
                if path.is_file():
                    label = tarfile.TarInfo(str(name.with_suffix(".cls")))
                    label.size = 1
                    tar.addfile(label, io.BytesIO(b"7"))
    return target
