"""Selective search (Uijlings et al., IJCV 2013) by OpenCV, in the setting of DETReg (Bar et al., CVPR 2022) or at full resolution."""
from argparse import Namespace

import numpy as np
from PIL import Image

from datasets.proposals.search import BoxSearch, Found, opencv

PUBLISHED_SIDE = 128


class SelectiveSearch(BoxSearch):
    """OpenCV's fast mode on the image resized to `side` x `side` pixels whatever its shape (0: on the image as it is).

    As in DETReg's code the channels are red, green, blue, where OpenCV expects blue first. OpenCV returns a fixed set of boxes in an
    order of C's `rand`, which no seed controls in worker processes; here they are sorted, and `BoxSearch` draws their order.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        self.grid = side
        self.settings = {"mode": "fast", "resize": side}

    def search(self, image: np.ndarray, name: str = "") -> Found:
        """See `BoxSearch`: uint16 boxes in steps of 1 / `side`, or in pixels; no scores."""
        cv2 = opencv()
        if self.grid:
            image = np.asarray(Image.fromarray(image).resize((self.grid, self.grid), Image.Resampling.BILINEAR))
        method = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        method.setBaseImage(np.ascontiguousarray(image))
        method.switchToSelectiveSearchFast()
        return sorted_boxes(method.process()), None


def sorted_boxes(boxes_xywh: np.ndarray) -> np.ndarray:
    """Whole numbers (x, y, width, height) -> uint16 (x0, y0, x1, y1) [N, 4], each once, in lexicographic order; none without area."""
    boxes = np.asarray(boxes_xywh, dtype=np.int64).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > 0).all(1)]
    return np.unique(np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), axis=0).astype(np.uint16)


def build_selective_search(args: Namespace) -> SelectiveSearch:
    """With `args.ss_resize`.

    Raises:
        UserError: no OpenCV, unless a store takes its place.
    """
    if not getattr(args, "cache_path", None):
        opencv()
    side = getattr(args, "ss_resize", None)
    return SelectiveSearch(PUBLISHED_SIDE if side is None else side)
