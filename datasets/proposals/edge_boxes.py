"""EdgeBoxes (Zitnick and Dollar, ECCV 2014) by OpenCV, as Siamese DETR (section 4.1) makes its boxes."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from datasets.proposals.base import (
    BoxesAndScores,
    CacheableProposals,
    import_opencv,
    opencv_errors_as_bad_image,
)
from util.errors import UserError
from util.logger import log
from util.settings import Settings

MAX_BOXES = 512
RETRY_SHORT_SIDE = (
    1000  # pixels that the short side of an image without boxes is enlarged to at least
)
SHARPEN_KERNEL = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], dtype=np.float32)
CONTRAST_FACTOR = 1.5
RETRY_MAX_LONG_SIDE = (
    4000  # pixels that an enlarged long side has at most: a strip of 5 x 300 would grow without end
)
BLUR_SIGMA = 2.0  # pixels, before gradients: finer ones are texture
STRONG_EDGE_PERCENTILE = 99.0  # percentile of gradients that counts as an edge of strength 1


class EdgeBoxes(CacheableProposals):
    """Up to 512 boxes in whole pixels, best first, with OpenCV's default parameters, which are the published ones.

    Where there are none, the image is sharpened and enlarged, and where there are none again the box is the middle half
    of the image with score 0.

    Args:
        model: file of the structured forest that finds edges, as published; empty: gradients instead.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        edges = f"structured forest {_digest(model)}" if model else "gradients"
        self.settings = {"max_boxes": MAX_BOXES, "edges": edges}

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals`: uint16 boxes in pixels, float32 scores."""
        height, width = image.shape[:2]
        boxes, scores = self._boxes(image)
        if not len(boxes):
            factor = min(
                -(-RETRY_SHORT_SIDE // min(height, width)),
                max(RETRY_MAX_LONG_SIDE // max(height, width), 1),
            )
            boxes, scores = self._boxes(_sharpened(image, factor))
            boxes = boxes // factor
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        kept = (corners[:, 2:] > corners[:, :2]).all(1)
        if not kept.any():
            middle = [
                [
                    width // 4,
                    height // 4,
                    max(3 * (width // 4), width // 4 + 1),
                    max(3 * (height // 4), height // 4 + 1),
                ]
            ]
            return np.array(middle, dtype=np.uint16), np.zeros(1, dtype=np.float32)
        return corners[kept].astype(np.uint16), scores[kept]

    def _boxes(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int boxes (x, y, width, height) [N, 4], scores float32 [N]), best first."""
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        with opencv_errors_as_bad_image():
            edges, orientation = (
                structured_edges(self.model, pixels) if self.model else gradient_edges(pixels)
            )
            found = (
                import_opencv()
                .ximgproc.createEdgeBoxes(maxBoxes=MAX_BOXES)
                .getBoundingBoxes(edges, orientation)
            )
        boxes, scores = found if isinstance(found, tuple) else (found, np.ones(len(found)))
        return np.asarray(boxes, dtype=np.int64).reshape(-1, 4), np.asarray(
            scores, dtype=np.float32
        ).reshape(-1)


def structured_edges(model: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RGB float32 [H, W, 3] in [0, 1] -> (thin edges float32 [H, W], their orientation [H, W] in radians, [0, pi])."""
    detector = _detector(model)
    edges = detector.detectEdges(pixels)
    orientation = detector.computeOrientation(edges)
    return detector.edgesNms(edges, orientation), orientation


def gradient_edges(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from gradients of the smoothed image: per pixel the channel with the largest one, 1 where it is as
    strong as the strongest 1 % of the image; only where it is no smaller than on both sides across the edge."""
    cv2 = import_opencv()
    smooth = cv2.GaussianBlur(pixels, (0, 0), BLUR_SIGMA)
    dx, dy = (
        cv2.Sobel(smooth, cv2.CV_32F, *axis).reshape(pixels.shape) for axis in ((1, 0), (0, 1))
    )
    strongest = np.hypot(dx, dy).argmax(2)[..., None]
    dx, dy = (np.take_along_axis(part, strongest, 2)[..., 0] for part in (dx, dy))
    strength = np.hypot(dx, dy)
    orientation = np.mod(np.arctan2(dy, dx), np.float32(np.pi))
    y, x = np.indices(strength.shape, dtype=np.float32)
    across = (np.cos(orientation), np.sin(orientation))
    sides = [
        cv2.remap(strength, x + sign * across[0], y + sign * across[1], cv2.INTER_LINEAR)
        for sign in (1, -1)
    ]
    thin = np.where((strength >= sides[0]) & (strength >= sides[1]), strength, np.float32(0))
    scale = max(float(np.percentile(strength, STRONG_EDGE_PERCENTILE)), 1e-6)
    return np.minimum(thin / np.float32(scale), np.float32(1)), orientation


def _sharpened(image: np.ndarray, factor: int) -> np.ndarray:
    cv2 = import_opencv()
    sharp = Image.fromarray(cv2.filter2D(np.ascontiguousarray(image), -1, SHARPEN_KERNEL))
    contrast = np.asarray(ImageEnhance.Contrast(sharp).enhance(CONTRAST_FACTOR))
    return cv2.resize(contrast, None, fx=factor, fy=factor)


def _digest(path: str) -> str:
    """
    Raises:
        UserError: the file can't be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"--edge_model {path} can't be read ({error.strerror}): docs/proposals.md says how to get it"
        ) from error


@cache
def _detector(model: str) -> Any:
    """Once a process: reading the published file takes seconds."""
    cv2 = import_opencv()
    try:
        return cv2.ximgproc.createStructuredEdgeDetection(model)
    except cv2.error as error:
        raise UserError(
            f"--edge_model {model} is no structured forest of OpenCV: docs/proposals.md says how to get one"
        ) from error


def build_edge_boxes(settings: Settings) -> EdgeBoxes:
    """With `settings.edge_model`.

    Raises:
        UserError: no OpenCV, unless a store takes its place; the model can't be read.
    """
    model = settings.edge_model
    method = EdgeBoxes(os.path.abspath(model) if model else "")
    if not settings.cache_path:
        import_opencv()
        if model:
            _detector(method.model)
        else:
            log.warning(
                "edge_boxes: edges are plain image gradients, not the published structured forest: give --edge_model "
                "FILE, see docs/proposals.md"
            )
    return method
