"""What the tests of large data share: trees of empty files, and tar files."""

import io
import tarfile
from pathlib import Path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


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
    return target
