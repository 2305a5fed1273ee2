"""What all methods have in common that search an image for boxes."""

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

OPENCV_PACKAGE = "opencv-contrib-python-headless"
BoxesAndScores = tuple[np.ndarray, np.ndarray | None]


class CacheableProposals:
    """A method whose boxes depend on the image, or its name, alone; only the order of boxes without scores is random.

    A subclass has `propose`, and `settings`, which holds everything that its boxes depend on (plain values: they are
    kept with a store and compared). `grid`: boxes are counted on as many steps along each side of the image; 0: in
    pixels. `dtype`: of the boxes.
    """

    grid = 0
    dtype: type = np.uint16
    settings: dict[str, object]

    def propose(self, image: np.ndarray, name: str) -> BoxesAndScores:
        """RGB uint8 [H, W, 3] -> (boxes (x0, y0, x1, y1) [N, 4] in steps of the grid, always in the same order; scores
        float32 [N] in falling order, or None where the method knows none).

        Raises:
            UserError: what is needed is not there.
            datasets.sample.BadImageError: this image can't be searched.
        """
        raise NotImplementedError

    def check(self, images: "ImageFiles") -> None:
        """Refuses a data set for which boxes are missing."""

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        boxes, scores = self.propose(image.permute(1, 2, 0).numpy(), name)
        return shuffle_unscored(to_pixels(boxes, self.grid, tuple(image.shape[-2:])), scores, rng)


def to_pixels(boxes_xyxy: np.ndarray, grid: int, size_hw: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] in steps of a grid (0: pixels) -> float32 pixels of an image of this size."""
    boxes = torch.from_numpy(boxes_xyxy.astype(np.float32).reshape(-1, 4))
    height, width = size_hw
    return boxes / grid * boxes.new_tensor([width, height, width, height]) if grid else boxes


def shuffle_unscored(boxes: Tensor, scores: np.ndarray | None, rng: SampleRNG) -> Tensor:
    """Boxes with scores as they are, others in a random order."""
    return (
        boxes if scores is not None else boxes[torch.from_numpy(rng.numpy.permutation(len(boxes)))]
    )


@contextmanager
def opencv_errors_as_bad_image() -> Iterator[None]:
    """Turns its errors into BadImageError, so that one odd image does not end a run."""
    cv2 = import_opencv()
    try:
        yield
    except cv2.error as error:
        raise BadImageError(f"OpenCV can't search it ({' '.join(str(error).split())})") from error


def import_opencv() -> ModuleType:
    """OpenCV with its module ximgproc, on one thread: dataloader workers share the cores, so that more would only
    compete.

    Raises:
        UserError: it is not installed, or without ximgproc.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"selective_search and edge_boxes need OpenCV: pip install {OPENCV_PACKAGE}, or use boxes from files"
        ) from error
    if not hasattr(cv2, "ximgproc"):
        raise UserError(
            f"the installed OpenCV {cv2.__version__} has no ximgproc: pip uninstall opencv-python "
            f"opencv-python-headless, then pip install --force-reinstall {OPENCV_PACKAGE}"
        )
    cv2.setNumThreads(1)
    return cv2
