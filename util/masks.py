"""Masks in COCO's formats: binary masks as compressed run-length encodings (RLE), segment ids as PNG.

Shapes: K masks of H x W pixels.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

RLE = dict[str, Any]  # {"size": [H, W], "counts": bytes or str}


def encode_masks(masks: Tensor | np.ndarray) -> list[RLE]:
    """Return the RLE of each mask, with `counts` as bytes.

    Args:
        masks: bool [K, H, W]; in other types, all values but 0 belong to the mask.
    """
    if isinstance(masks, Tensor):
        masks = masks.detach().cpu().numpy()
    pixels = np.asarray(masks, dtype=bool).view(np.uint8).transpose(1, 2, 0)  # [H, W, K]
    # Column by column, the order of the runs. All masks in one call are as fast as one call for each.
    return coco_mask.encode(np.asfortranarray(pixels))


def encode_mask(mask: Tensor | np.ndarray) -> RLE:
    """Return the RLE of one mask [H, W], see `encode_masks`."""
    return encode_masks(mask[None])[0]


def decode_masks(rles: Sequence[RLE], size_hw: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return the masks, uint8 [K, H, W] of 0 and 1.

    Args:
        rles: all of the same size.
        size_hw: (H, W) of the result if there are no masks.
    """
    if not len(rles):
        return np.zeros((0, *size_hw), np.uint8)
    pixels = coco_mask.decode(list(rles))  # [H, W, K]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def ids_to_png(ids: np.ndarray) -> bytes:
    """Return segment ids [H, W] as a PNG with id = R + 256 G + 65536 B, COCO's format."""
    channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    with io.BytesIO() as buffer:
        Image.fromarray(channels).save(buffer, format="PNG")
        return buffer.getvalue()
