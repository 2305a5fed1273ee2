"""Masks as RLE."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from util.masks import decode_masks, encode_masks


def test_encoded_as_pycocotools_does_and_decoded_again() -> None:
    masks = torch.rand(5, 7, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[3] = False
    masks[4] = True
    rles = encode_masks(masks)
    for mask, rle in zip(masks.numpy(), rles, strict=True):
        assert rle == coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    decoded = decode_masks(rles)
    assert decoded.dtype == np.uint8
    assert decoded.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(decoded, masks.numpy())


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
def test_other_types_and_layouts(dtype: type) -> None:
    masks = np.random.RandomState(0).rand(2, 9, 6) < 0.5
    expected = encode_masks(masks)
    assert encode_masks(masks.astype(dtype) * dtype(1)) == expected
    assert encode_masks(torch.from_numpy(masks).mT.contiguous().mT) == expected
    assert encode_masks(masks * np.uint8(255)) == expected, "not 0 and 1 only"


def test_no_masks() -> None:
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
    assert decode_masks([], (4, 5)).shape == (0, 4, 5)


def test_counts_as_text() -> None:
    masks = np.eye(4, dtype=bool)[None]
    (rle,) = encode_masks(masks)
    assert isinstance(rle["counts"], bytes)
    as_text = {**rle, "counts": rle["counts"].decode()}
    np.testing.assert_array_equal(decode_masks([as_text]), masks)
