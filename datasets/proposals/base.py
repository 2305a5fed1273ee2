"""Base class of the proposal methods whose boxes can be cached, and access to OpenCV."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.sample import BadImageError
from util.errors import UserError
from util.random_state import SampleRNG

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

OPENCV_PACKAGE = "opencv-contrib-python-headless"  # ximgproc is in the contrib packages only
BoxesAndScores = tuple[np.ndarray, np.ndarray | None]


class CacheableProposals:
    """Base class of methods whose boxes depend on the image, or its name, alone.

    Only the order of boxes without scores is random. A subclass implements `propose` and sets

    settings: everything that the boxes depend on, as plain values. A cache saves them, and compares them with those of
        the run that reads it.
    grid: number of steps along each side of the image that box coordinates count in. 0: coordinates are pixels.
    dtype: of the boxes.
    """

    grid = 0
    dtype: type = np.uint16
    settings: dict[str, object]

    def propose(self, image: np.ndarray, name: str) -> BoxesAndScores:
        """Return the boxes of an RGB image uint8 [H, W, 3].

        Returns:
            boxes: (x0, y0, x1, y1) in steps of the grid, [N, 4], always in the same order.
            scores: float32 [N] in decreasing order, or None if the method has none.

        Raises:
            UserError: something that the method needs is missing.
            BadImageError: the method fails on this image.
        """
        raise NotImplementedError

    def check(self, images: "ImageFiles") -> None:
        """Check that there are boxes for all of these images.

        Raises:
            UserError: boxes are missing.
        """

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        boxes, scores = self.propose(image.permute(1, 2, 0).numpy(), name)
        boxes_abs = to_pixels(boxes, self.grid, tuple(image.shape[-2:]))
        return shuffle_unscored(boxes_abs, scores, rng)


def to_pixels(boxes_xyxy: np.ndarray, grid: int, size_hw: tuple[int, int]) -> Tensor:
    """Convert boxes [N, 4] from steps of a grid (0: pixels) to float32 pixels of an image of this size."""
    boxes = torch.from_numpy(boxes_xyxy.astype(np.float32).reshape(-1, 4))
    if not grid:
        return boxes
    height, width = size_hw
    return boxes / grid * boxes.new_tensor([width, height, width, height])


def shuffle_unscored(boxes: Tensor, scores: np.ndarray | None, rng: SampleRNG) -> Tensor:
    """Shuffle boxes [N, 4] that have no scores; boxes with scores keep their order.

    A fixed order would give every epoch the same first boxes, which users of DETReg found to be worse.
    """
    if scores is not None:
        return boxes
    return boxes[torch.from_numpy(rng.numpy.permutation(len(boxes)))]


@contextmanager
def opencv_errors_as_bad_image() -> Iterator[None]:
    """Turn OpenCV's errors into BadImageError, so that one odd image does not end a run."""
    cv2 = import_opencv()
    try:
        yield
    except cv2.error as error:
        raise BadImageError(
            f"OpenCV fails on this image ({' '.join(str(error).split())})"
        ) from error


def import_opencv() -> ModuleType:
    """Import OpenCV with its module ximgproc, and limit it to one thread.

    Raises:
        UserError: it is not installed, or without ximgproc.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"selective_search and edge_boxes need OpenCV; pip install {OPENCV_PACKAGE}, or use boxes from files"
        ) from error
    if not hasattr(cv2, "ximgproc"):
        # The OpenCV packages share one folder: all of them must go before this one is installed.
        raise UserError(
            f"the installed OpenCV {cv2.__version__} has no ximgproc; pip uninstall opencv-python "
            f"opencv-python-headless, then pip install --force-reinstall {OPENCV_PACKAGE}"
        )
    # Dataloader workers already share the CPU cores; more threads per worker would only compete.
    cv2.setNumThreads(1)
    return cv2
