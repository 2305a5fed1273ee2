"""Selective search (Uijlings et al., IJCV 2013) by OpenCV: in DETReg's setting (CVPR 2022), or at full resolution."""

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
    """OpenCV's fast mode on the image resized to `side` x `side` pixels, regardless of its aspect ratio.

    As in DETReg's code the channels are in RGB order, where OpenCV expects BGR. OpenCV returns a fixed set of boxes,
    but shuffles them with C's `rand`, which no seed of Python controls. Here they are sorted, and the base class draws
    their order.

    Args:
        side: 0: the image is not resized.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        self.grid = side
        self.settings = {"mode": "fast", "resize": side}

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals.propose`: boxes uint16, in steps of 1 / `side` or in pixels, without scores."""
        # Sorted, so that only the base class's shuffle decides the order.
        return np.unique(self._run_opencv(image), axis=0), None

    def _run_opencv(self, image: np.ndarray) -> np.ndarray:
        """Return boxes uint16 [N, 4], (x0, y0, x1, y1), in OpenCV's order."""
        cv2 = import_opencv()
        if self.grid:
            size = (self.grid, self.grid)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        method = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        with opencv_errors_as_bad_image():
            method.setBaseImage(np.ascontiguousarray(image))
            method.switchToSelectiveSearchFast()
            return xywh_to_xyxy(method.process())


class PublishedSelectiveSearch(SelectiveSearch):
    """`--reproduce_published`: boxes in OpenCV's order, in which small regions tend to come first.

    OpenCV sorts by a random number times the depth of each region. C's generator is seeded from the sample's random
    state here (the published code does not seed it). On a system without POSIX the order is not reproducible.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        super().__init__(side)
        self.settings = {**self.settings, "order": "OpenCV's"}

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        # Without it forked dataloader workers would all continue the same sequence of C's `rand`.
        if os.name == "posix":
            ctypes.CDLL(None).srand(int(rng.numpy.randint(2**31)))
        boxes = self._run_opencv(image.permute(1, 2, 0).numpy())
        return to_pixels(boxes, self.grid, tuple(image.shape[-2:]))


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Convert integer (x, y, width, height) to uint16 (x0, y0, x1, y1) [N, 4]. Boxes without area are dropped."""
    boxes = np.asarray(boxes_xywh, dtype=np.int64).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > 0).all(1)]
    return np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).astype(np.uint16)


def build_selective_search(settings: Settings) -> SelectiveSearch:
    """Build the method from `settings.ss_resize` and `settings.reproduce_published`.

    Raises:
        UserError: OpenCV is missing, and no cache replaces it.
    """
    if not settings.cache_path:
        import_opencv()
    method = PublishedSelectiveSearch if settings.reproduce_published else SelectiveSearch
    return method(settings.ss_resize)
