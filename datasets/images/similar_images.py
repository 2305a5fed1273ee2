"""Images that look the same in two splits: re-encoded, resized or stretched copies, and neighboring frames of a video.

Two thumbnails are compared: by the order of neighboring gray values (a difference hash, which finds candidates fast),
and by their mean difference. Measured with 200 images of COCO and 2,209 others, and 200 of VOC and 1,000 others: copies
(JPEG of quality 70 to 90, half the size, stretched to 320 or 640 pixels) differ by at most 7 bits and 1.2 of 255,
different images by at least 16 of 255. A cropped, mirrored or brightened copy is not found.
"""

from collections.abc import Collection

import numpy as np
from PIL import Image

THUMBNAIL_WH = (9, 8)
MAX_BITS = 10  # of the 64 of the hash
MAX_DIFFERENCE = 4.0  # of 255, mean of all pixels and channels
MIN_DEVIATION = 8.0  # of 255: thumbnails with less contrast are alike because they show nothing

_GRAY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    1, dtype=np.uint8
)


def thumbnail(image: Image.Image) -> bytes:
    """Return the pixels of an RGB image reduced to THUMBNAIL_WH, each the mean of its part of the image."""
    return image.resize(THUMBNAIL_WH, Image.Resampling.BOX).tobytes()


def similar_pairs(
    train: list[bytes], val: list[bytes], skipped: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Return (index in train, index in val) of the images in val that look like one in train: the most similar one.

    Args:
        train, val: thumbnails; empty for an image that has none.
        skipped: indices in val that are not searched.
    """
    train_rows, train_pixels, train_hashes = _unpack(train)
    pairs = []
    for row, pixels, hash_bytes in zip(*_unpack(val), strict=True):
        if row in skipped:
            continue
        num_bits = _BITS_OF_BYTE[train_hashes ^ hash_bytes].sum(1)  # [M]
        candidates = np.flatnonzero(num_bits <= MAX_BITS)  # [C]
        if len(candidates):
            differences = abs(train_pixels[candidates] - pixels).mean((1, 2, 3))  # [C]
            best = int(differences.argmin())
            if differences[best] <= MAX_DIFFERENCE:
                pairs.append((int(train_rows[candidates[best]]), int(row)))
    return pairs


def _unpack(thumbnails: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices [M], pixels [M, 8, 9, 3] and hashes uint8 [M, 8] of the thumbnails that show something."""
    width, height = THUMBNAIL_WH
    rows = np.array([row for row, found in enumerate(thumbnails) if found], dtype=np.int64)
    content = b"".join(thumbnails[row] for row in rows)
    pixels = np.frombuffer(content, np.uint8).reshape(-1, height, width, 3).astype(np.float32)
    gray = pixels @ _GRAY  # [M, 8, 9]
    shows = gray.std((1, 2)) >= MIN_DEVIATION  # [M]
    rows, pixels, gray = rows[shows], pixels[shows], gray[shows]
    rises = gray[..., 1:] > gray[..., :-1]  # [M, 8, 8]
    return rows, pixels, np.packbits(rises.reshape(-1, 64), axis=1)
