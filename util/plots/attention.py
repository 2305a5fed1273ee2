"""Draw attention on images: heat maps, and the sampling points of deformable attention.

Images are uint8 [H, W, 3] in RGB, points (x, y) in pixels of their image. Letters: h x w cells of an attention map,
which covers the image, N maps, K points.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from util.plots.boxes import Color, as_array, draw_label

# From no attention to the most: dark to bright, so that the order is visible without color, too.
HEAT_STOPS = ((10, 8, 40), (70, 15, 110), (175, 40, 100), (245, 120, 40), (255, 235, 130))
HEAT_OPACITY = 0.85  # where attention is highest
DIMMED = 0.55  # brightness of the image under a map
GAMMA = 0.7  # below 1: also shows cells with a fraction of the highest weight
POINT_COLOR: Color = (255, 255, 255)
SUPERSAMPLING = 3  # subpixels per pixel and axis, for round points


def fit_image(image: Any, longest: int) -> tuple[np.ndarray, float]:
    """Scale an image so that its longest side has this number of pixels. Returns the image and the factor."""
    image = np.asarray(image)
    factor = longest / max(image.shape[:2])
    size_wh = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    resized = Image.fromarray(image).resize(size_wh, Image.Resampling.BICUBIC)
    return np.asarray(resized), factor


def resize_map(weights: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize an attention map [h, w] smoothly to an image of this size and scale it to 0..1, float32 [H, W]."""
    cells = as_array(weights).astype(np.float32)  # [h, w]
    cells = cells / max(float(cells.max()), 1e-12)
    smooth = Image.fromarray(cells).resize(size_hw[::-1], Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), 0, 1)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Return the colors of values in 0..1, float32 [..., 3]."""
    stops = np.asarray(HEAT_STOPS, np.float32)  # [5, 3]
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, places, stops[:, i]) for i in range(3)], -1)


def draw_heat(image: np.ndarray, weights: Any) -> np.ndarray:
    """Return the image in dark gray under the colors of an attention map [h, w]; the highest weight is brightest."""
    heat = resize_map(weights, image.shape[:2])[..., None] ** GAMMA  # [H, W, 1]
    colors = heat_colors(heat[..., 0])
    return _to_pixels(
        _dimmed_gray(image) * (1 - HEAT_OPACITY * heat) + colors * HEAT_OPACITY * heat
    )


def draw_colored_maps(
    image: np.ndarray, maps: Sequence[Any], colors: Sequence[Color]
) -> np.ndarray:
    """Return the image in dark gray under N attention maps [h, w], each in its color; mixed where they overlap."""
    base = _dimmed_gray(image)
    if not maps:
        return _to_pixels(base)
    heats = np.stack([resize_map(weights, image.shape[:2]) for weights in maps])  # [N, H, W]
    mixed = np.einsum("nhw,nc->hwc", heats, np.asarray(colors, np.float32))
    total = heats.sum(0)[..., None]  # [H, W, 1]
    opacity = HEAT_OPACITY * heats.max(0)[..., None] ** GAMMA
    return _to_pixels(base * (1 - opacity) + mixed / np.maximum(total, 1e-6) * opacity)


def draw_samples(
    image: np.ndarray, points_xy: Any, weights: Any, reference_xy: Any | None = None
) -> np.ndarray:
    """Return the image, darker and paler, with K sampling points: bright and large where the weight is high.

    Args:
        points_xy: [K, 2]. Points outside of the image are not drawn.
        weights: [K]. The highest one is brightest.
        reference_xy: a point to mark by a cross, or None.
    """
    points = as_array(points_xy).reshape(-1, 2)
    relative = as_array(weights).reshape(-1)
    relative = (relative / max(float(relative.max(initial=0)), 1e-12)) ** GAMMA  # [K] in 0..1
    colors = heat_colors(0.25 + 0.75 * relative).round().astype(int)
    radius = max(2.0, max(image.shape[:2]) / 90)

    base = Image.fromarray(_to_pixels(image * 0.35 + _dimmed_gray(image) * 0.6))
    size_wh = base.size
    canvas = base.resize((size_wh[0] * SUPERSAMPLING, size_wh[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for i in np.argsort(relative, kind="stable"):  # the heaviest last, on top
        r = radius * (0.45 + 0.65 * relative[i])
        x, y = points[i]
        box = tuple(SUPERSAMPLING * value for value in (x - r, y - r, x + r, y + r))
        draw.ellipse(box, fill=tuple(colors[i]), outline=(0, 0, 0))
    if reference_xy is not None:
        _draw_cross(draw, as_array(reference_xy) * SUPERSAMPLING, radius * 2.2 * SUPERSAMPLING)
    return np.asarray(canvas.resize(size_wh, Image.Resampling.LANCZOS))


def draw_numbered_points(
    image: np.ndarray, points_xy: Any, numbers: Sequence[int], colors: Sequence[Color]
) -> np.ndarray:
    """Return the image with a dot and a number at each point."""
    canvas = Image.fromarray(np.asarray(image))
    draw = ImageDraw.Draw(canvas)
    radius = max(canvas.size) / 70
    for (x, y), number, color in zip(as_array(points_xy), numbers, colors, strict=True):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=tuple(color),
            outline=POINT_COLOR,
            width=max(2, round(radius / 3)),
        )
        corner = np.array([x + radius, y - radius])
        draw_label(canvas, str(number), corner, tuple(color), max(11, 3 * radius))
    return np.asarray(canvas)


def _draw_cross(draw: ImageDraw.ImageDraw, center: np.ndarray, arm: float) -> None:
    x, y = center
    for color, width in (((0, 0, 0), arm / 2.2), ((60, 230, 90), arm / 4)):  # green on black
        draw.line((x - arm, y, x + arm, y), fill=color, width=round(width))
        draw.line((x, y - arm, x, y + arm), fill=color, width=round(width))


def _dimmed_gray(image: np.ndarray) -> np.ndarray:
    gray = np.asarray(Image.fromarray(np.asarray(image)).convert("L"), np.float32)
    return np.repeat(gray[..., None], 3, -1) * DIMMED


def _to_pixels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
