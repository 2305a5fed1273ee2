"""Selective search (Uijlings et al., IJCV 2013) by OpenCV: in DETReg's setting (CVPR 2022), or at full resolution."""

import ctypes
import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou, nms

from datasets.proposals.base import (
    BoxesAndScores,
    CacheableProposals,
    import_opencv,
    opencv_errors_as_bad_image,
    to_pixels,
)
from util.errors import UserError
from util.random_state import SampleRNG
from util.settings import Settings

PUBLISHED_SIDE = 128
# Of `--ss_rank agreement`. Boxes agree above this IoU.
AGREEMENT_IOU = 0.5
DUPLICATE_IOU = 0.6  # of two boxes above this IoU only the better one is kept
MAX_AREA = 0.8  # fraction of the image; larger boxes have score 0


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


class RankedSelectiveSearch(SelectiveSearch):
    """`--ss_rank agreement`: the boxes that most other boxes agree with come first, without near duplicates.

    Selective search merges regions along several similarities. A region that stands out from what is around it is found
    along most of them and changes little over many merges, so many boxes lie close to it. The score of a box is the sum
    over all boxes of IoU - 0.5 where it is positive. Boxes that nearly fill the image have score 0. Then greedy NMS.
    """

    def __init__(self, side: int = PUBLISHED_SIDE) -> None:
        super().__init__(side)
        self.settings = {**self.settings, "rank": "agreement"}

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals.propose`: boxes uint16 with scores float32."""
        height, width = (self.grid, self.grid) if self.grid else image.shape[:2]
        boxes, _ = super().propose(image, name)
        kept, scores = rank_by_agreement(torch.from_numpy(boxes.astype(np.float32)), height * width)
        return boxes[kept.numpy()], scores.numpy()


def rank_by_agreement(boxes_xyxy: Tensor, image_area: float) -> tuple[Tensor, Tensor]:
    """Score boxes float32 [N, 4] by how many others agree with them, and drop near duplicates.

    Args:
        image_area: of the whole image, in the unit of the boxes.

    Returns:
        Indices int64 [K] of the boxes that are kept, best first, and their scores float32 [K].
    """
    scores = (box_iou(boxes_xyxy, boxes_xyxy) - AGREEMENT_IOU).clamp(min=0).sum(1)  # [N]
    scores[box_area(boxes_xyxy) > MAX_AREA * image_area] = 0
    kept = nms(boxes_xyxy, scores, DUPLICATE_IOU)
    return kept, scores[kept]


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
    """Build the method from `settings.ss_resize`, `settings.ss_rank` and `settings.reproduce_published`.

    Raises:
        UserError: OpenCV is missing, and no cache replaces it; a ranking with `--reproduce_published`.
    """
    if not settings.cache_path:
        import_opencv()
    is_ranked = settings.ss_rank == "agreement"
    if is_ranked and settings.reproduce_published:
        raise UserError(
            "--ss_rank agreement is not in the published code; omit it or --reproduce_published"
        )
    if is_ranked:
        return RankedSelectiveSearch(settings.ss_resize)
    method = PublishedSelectiveSearch if settings.reproduce_published else SelectiveSearch
    return method(settings.ss_resize)
