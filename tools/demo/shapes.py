"""Shapes of the synthetic images: outlines of the classes and of clutter, and their pixels.

An outline is a list of polygons [K, 2] (x, y) around the origin, at any scale. Each polygon after the first is a hole
in the first.
"""

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4  # subpixels per pixel and axis, for soft edges


def _circle(
    radius: float = 1.0, center: tuple[float, float] = (0.0, 0.0), corners: int = 64
) -> np.ndarray:
    """Return a regular polygon [corners, 2]."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius + center


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    outline = _circle(corners=10)
    outline[1::2] *= rng.uniform(0.38, 0.5)  # every second corner moves in
    return [outline]


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    arm = rng.uniform(0.25, 0.35)
    quarter = np.array([(1, -arm), (1, arm), (arm, arm)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    arms = [quarter @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return [np.concatenate(arms)]  # [12, 2]


def _blob(rng: np.random.Generator) -> list[np.ndarray]:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    # A circle with random harmonics. They start at 2, because the first would mostly shift it.
    waves = [
        rng.uniform(0.1, 0.25) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
    ]
    radius = 1 + sum(waves)  # [64]
    return [np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]]


def _bar(rng: np.random.Generator) -> list[np.ndarray]:
    half = rng.uniform(0.1, 0.25)
    return [np.array([(-1, -half), (1, -half), (1, half), (-1, half)])]


def clutter_outlines(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a blob or a bar: distractors that belong to no class."""
    draw = (_blob, _bar)[int(rng.integers(2))]
    return draw(rng)


OUTLINES = {  # class name -> function that draws an outline
    "disc": lambda rng: [_circle()],
    "triangle": lambda rng: [_circle(corners=3)],
    "star": _star,
    "ring": lambda rng: [_circle(), _circle(rng.uniform(0.5, 0.62))],
    "cross": _cross,
    "crescent": lambda rng: [_circle(), _circle(0.85, center=(rng.uniform(0.45, 0.6), 0.0))],
}


def random_affine(rng: np.random.Generator, outlines: list[np.ndarray]) -> list[np.ndarray]:
    """Squeeze outlines by up to a quarter along y, then rotate them by any angle."""
    angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0)
    rotation = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    return [outline * (1.0, squeeze) @ rotation for outline in outlines]


def rasterize(outlines: list[np.ndarray], length: float) -> np.ndarray:
    """Return the coverage of a shape, float32 [h, w] in 0..1; its longer side is `length` pixels."""
    low, high = outlines[0].min(0), outlines[0].max(0)
    factor = length / (high - low).max()
    width, height = (int(side) for side in np.ceil((high - low) * factor))

    drawing = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(drawing)
    fills = [255] + [0] * (len(outlines) - 1)  # holes are erased
    for outline, fill in zip(outlines, fills, strict=True):
        corners = (outline - low) * factor * SUPERSAMPLING
        draw.polygon([tuple(corner) for corner in corners], fill=fill)
    # `reduce` averages blocks of subpixels.
    return np.asarray(drawing.reduce(SUPERSAMPLING), np.float32) / 255
