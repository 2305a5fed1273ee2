"""Masks as run-length encodings (RLE) in COCO's compressed format."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks bool [K, H, W] as {"size": [H, W], "counts": bytes}, K of them."""
    if not len(masks):
        return []
    return coco_mask.encode(np.asfortranarray(masks.byte().permute(1, 2, 0).cpu().numpy()))


def decode_masks(rles: list[dict[str, Any]]) -> np.ndarray:
    """Return the masks of RLEs of one size, uint8 [K, H, W]."""
    return np.ascontiguousarray(coco_mask.decode(rles).transpose(2, 0, 1))
