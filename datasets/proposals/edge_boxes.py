"""EdgeBoxes (Zitnick and Dollar, ECCV 2014) by OpenCV, as Siamese DETR (section 4.1) generates its boxes.

Shapes: N boxes, H and W the size of the image.
"""

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

MAX_BOXES = 512  # as published

# Second try on an image without boxes: sharpen, raise the contrast and enlarge by a whole factor, as published.
SHARPEN_KERNEL = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], dtype=np.float32)
CONTRAST_FACTOR = 1.5
RETRY_SHORT_SIDE = 1000  # pixels; the short side is enlarged to at least this
# Pixels. Not published: a strip of 5 x 300 pixels would become 1000 x 60,000.
RETRY_MAX_LONG_SIDE = 4000

# Edges without a structured forest.
BLUR_SIGMA = 2.0  # pixels; finer gradients are texture
STRONG_EDGE_PERCENTILE = 99.0  # a gradient at this percentile is an edge of strength 1


class EdgeBoxes(CacheableProposals):
    """Up to 512 boxes in whole pixels, best first, with OpenCV's default parameters, which are the published ones.

    If there are none, the image is sharpened and enlarged for a second try. If there are none again, the box is the
    middle half of the image with score 0.

    Args:
        model: file of the structured forest that detects edges, as published. Empty: image gradients instead.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        # The forest's content and not its path, so that caches made elsewhere with the same file match.
        edges = f"structured forest {_digest(model)}" if model else "gradients"
        self.settings = {"max_boxes": MAX_BOXES, "edges": edges}

    def propose(self, image: np.ndarray, name: str = "") -> BoxesAndScores:
        """See `CacheableProposals.propose`: boxes uint16 in pixels, scores float32."""
        height, width = image.shape[:2]
        boxes, scores = self._boxes(image)
        if not len(boxes):
            factor = _retry_factor(height, width)
            boxes, scores = self._boxes(_sharpen_and_enlarge(image, factor))
            boxes = boxes // factor

        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)  # [N, 4]
        # The division can leave boxes without width or height.
        kept = (corners[:, 2:] > corners[:, :2]).all(1)
        if not kept.any():
            return _middle_box(height, width), np.zeros(1, dtype=np.float32)
        return corners[kept].astype(np.uint16), scores[kept]

    def _boxes(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (int64 boxes (x, y, width, height) [N, 4], scores float32 [N]), best first."""
        cv2 = import_opencv()
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # [H, W, 3]
        with opencv_errors_as_bad_image():
            if self.model:
                edges, orientation = structured_edges(self.model, pixels)
            else:
                edges, orientation = gradient_edges(pixels)
            method = cv2.ximgproc.createEdgeBoxes(maxBoxes=MAX_BOXES)
            result = method.getBoundingBoxes(edges, orientation)

        # OpenCV 5 returns scores [N], older versions [N, 1].
        boxes, scores = result if isinstance(result, tuple) else (result, np.ones(len(result)))
        boxes = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
        return boxes, np.asarray(scores, dtype=np.float32).reshape(-1)


def _retry_factor(height: int, width: int) -> int:
    factor = -(-RETRY_SHORT_SIDE // min(height, width))  # rounded up
    return min(factor, max(RETRY_MAX_LONG_SIDE // max(height, width), 1))


def _middle_box(height: int, width: int) -> np.ndarray:
    """Return the middle half of an image as one box of at least a pixel: uint16 [1, 4]."""
    x0, y0 = width // 4, height // 4
    x1, y1 = max(3 * (width // 4), x0 + 1), max(3 * (height // 4), y0 + 1)
    return np.array([[x0, y0, x1, y1]], dtype=np.uint16)


def structured_edges(model: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Detect edges in RGB float32 [H, W, 3] in [0, 1] with a structured forest.

    Returns:
        edges: float32 [H, W], thinned by non-maximum suppression.
        orientation: float32 [H, W], in radians, [0, pi].
    """
    detector = _detector(model)
    edges = detector.detectEdges(pixels)
    orientation = detector.computeOrientation(edges)
    return detector.edgesNms(edges, orientation), orientation


def gradient_edges(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Detect edges from the gradients of the blurred image; arguments and results as in `structured_edges`.

    Each pixel uses the color channel with the largest gradient. Strength 1 is reached by the strongest 1 % of the
    pixels. An edge is kept where it is at least as strong as its neighbors on both sides.
    """
    cv2 = import_opencv()
    smooth = cv2.GaussianBlur(pixels, (0, 0), BLUR_SIGMA)
    dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0).reshape(pixels.shape)  # [H, W, 3]
    dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1).reshape(pixels.shape)

    channel = np.hypot(dx, dy).argmax(2)[..., None]  # [H, W, 1]
    dx = np.take_along_axis(dx, channel, 2)[..., 0]  # [H, W]
    dy = np.take_along_axis(dy, channel, 2)[..., 0]
    strength = np.hypot(dx, dy)
    orientation = np.mod(np.arctan2(dy, dx), np.float32(np.pi))

    # Non-maximum suppression: compare with the strength one pixel away on both sides, across the edge.
    y, x = np.indices(strength.shape, dtype=np.float32)
    step_x, step_y = np.cos(orientation), np.sin(orientation)
    neighbors = [
        cv2.remap(strength, x + sign * step_x, y + sign * step_y, cv2.INTER_LINEAR)
        for sign in (1, -1)
    ]
    is_maximum = (strength >= neighbors[0]) & (strength >= neighbors[1])
    thin = np.where(is_maximum, strength, np.float32(0))

    # The lower limit avoids a division by zero on a flat image.
    scale = max(float(np.percentile(strength, STRONG_EDGE_PERCENTILE)), 1e-6)
    return np.minimum(thin / np.float32(scale), np.float32(1)), orientation


def _sharpen_and_enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [factor * H, factor * W, 3]"""
    cv2 = import_opencv()
    sharp = Image.fromarray(cv2.filter2D(np.ascontiguousarray(image), -1, SHARPEN_KERNEL))
    contrast = np.asarray(ImageEnhance.Contrast(sharp).enhance(CONTRAST_FACTOR))
    return cv2.resize(contrast, None, fx=factor, fy=factor)


def _digest(path: str) -> str:
    """Return a short hex digest of a file.

    Raises:
        UserError: the file can't be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"--edge_model {path} can't be read ({error.strerror}); docs/proposals.md says how to get it"
        ) from error


@cache
def _detector(model: str) -> Any:
    """Load a structured forest. Cached per process, because reading the published file takes seconds."""
    cv2 = import_opencv()
    try:
        return cv2.ximgproc.createStructuredEdgeDetection(model)
    except cv2.error as error:
        raise UserError(
            f"--edge_model {model} is no structured forest of OpenCV; docs/proposals.md says how to get one"
        ) from error


def build_edge_boxes(settings: Settings) -> EdgeBoxes:
    """Build the method from `settings.edge_model`.

    Raises:
        UserError: OpenCV is missing, and no cache replaces it; or the model can't be read.
    """
    model = settings.edge_model
    method = EdgeBoxes(os.path.abspath(model) if model else "")
    if settings.cache_path:
        return method  # its settings are compared with the cache's; it detects nothing

    import_opencv()
    if model:
        _detector(method.model)  # so that a wrong file is an error at the start
    else:
        log.warning(
            "edge_boxes: edges are plain image gradients, not the published structured forest; give --edge_model FILE, "
            "see docs/proposals.md"
        )
    return method
