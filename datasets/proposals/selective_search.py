"""Selective search (Uijlings et al., IJCV 2013) by OpenCV, in the setting of DETReg (Bar et al., CVPR 2022) or at full
resolution.
"""

import ctypes
import os

import numpy as np
from PIL import Image
from torch import Tensor

from datasets.proposals.base import (
    BoxesAndScores,
    CacheableProposals,
    import_opencv,
    opencv_errors_as_bad_image,
    to_pixels,
)
from util.random_state import SampleRNG
from util.settings import Settings

PUBLISHED_SIDE = 128


class SelectiveSearch(CacheableProposals):
    """OpenCV's fast mode on the image resized to `side` x `side` pixels whatever its shape (0: on the image as it is).

    As in DETReg's code the channels are red, green, blue, where OpenCV expects blue first. OpenCV returns a fixed set
    of boxes in an order of C's `rand`, which no seed of Python controls; here they are sorted, and `CacheableProposals` draws
    their order.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        self.grid = side
        self.settings = {"mode": "fast", "resize": side}

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals`: uint16 boxes in steps of 1 / `side`, or in pixels; no scores."""
        return np.unique(self._process(image), axis=0), None

    def _process(self, image: np.ndarray) -> np.ndarray:
        """uint16 (x0, y0, x1, y1) [N, 4] in the order of OpenCV."""
        cv2 = import_opencv()
        if self.grid:
            image = np.asarray(
                Image.fromarray(image).resize((self.grid, self.grid), Image.Resampling.BILINEAR)
            )
        method = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        with opencv_errors_as_bad_image():
            method.setBaseImage(np.ascontiguousarray(image))
            method.switchToSelectiveSearchFast()
            return xywh_to_xyxy(method.process())


class PublishedSelectiveSearch(SelectiveSearch):
    """`--reproduce_published`: the order of OpenCV, a random number times the depth of each region, so that small ones
    tend to come first.

    C's generator is seeded from the sample's random state (the published code leaves it alone); a system without it
    gives any order.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        super().__init__(side)
        self.settings = {**self.settings, "order": "OpenCV's"}

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        if os.name == "posix":
            ctypes.CDLL(None).srand(int(rng.numpy.randint(2**31)))
        return to_pixels(
            self._process(image.permute(1, 2, 0).numpy()), self.grid, tuple(image.shape[-2:])
        )


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Whole numbers (x, y, width, height) -> uint16 (x0, y0, x1, y1) [N, 4]; boxes without area are left out."""
    boxes = np.asarray(boxes_xywh, dtype=np.int64).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > 0).all(1)]
    return np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).astype(np.uint16)


def build_selective_search(settings: Settings) -> SelectiveSearch:
    """With `settings.ss_resize` and `settings.reproduce_published`.

    Raises:
        UserError: no OpenCV, unless a store takes its place.
    """
    if not settings.cache_path:
        import_opencv()
    kind = PublishedSelectiveSearch if settings.reproduce_published else SelectiveSearch
    return kind(settings.ss_resize)
