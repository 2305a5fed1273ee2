"""Whether a file without settings was trained with a dilated last stage (DC5), which no weight shows."""

import hashlib
from functools import lru_cache
from pathlib import Path

# First 8 digits of the SHA-256 of DETR's published files, which are also in their names -> DC5?
PUBLISHED_DC5 = {
    "e632da11": False,  # detr-r50
    "f0fb7ef5": True,  # detr-r50-dc5
    "2c7b67e5": False,  # detr-r101
    "a2e86def": True,  # detr-r101-dc5
    "00ce5173": False,  # detr-r50-panoptic
    "da08f1b1": True,  # detr-r50-dc5-panoptic
    "40021d53": False,  # detr-r101-panoptic
}


def infer_dilation(source: str) -> bool | None:
    """Return True for DC5, False for a published file without it, and None if nothing tells.

    The name of the file decides: `dc5`, or the hash in a published name. A file with another name is hashed, so that a
    published file is recognized after renaming.

    Args:
        source: path or URL of the file.
    """
    name = Path(source).name.lower()
    if "dc5" in name:
        return True
    for digits, is_dc5 in PUBLISHED_DC5.items():
        if digits in name:
            return is_dc5
    path = Path(source).expanduser()
    if not path.is_file():
        return None
    status = path.stat()
    return PUBLISHED_DC5.get(_hash_start(path, status.st_size, status.st_mtime_ns))


@lru_cache
def _hash_start(path: Path, _size: int, _modified_ns: int) -> str:
    """Return the first 8 digits of the SHA-256. Size and time make the cache forget a file that has changed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]
