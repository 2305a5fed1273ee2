"""Boxes drawn on images by Pillow.

Boxes are (x1, y1, x2, y2) in pixels of their image, images uint8 [H, W, 3] RGB. Boxes, labels and scores may be NumPy
arrays, lists or tensors on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Colours that differ for colour-blind eyes too, and against photographs.
PALETTE: tuple[Colour, ...] = (
    (230, 85, 13), (0, 114, 178), (0, 158, 115), (204, 51, 139), (240, 190, 30),
    (86, 180, 233), (138, 75, 8), (118, 60, 190), (150, 200, 30), (90, 90, 90),
)  # fmt: skip


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_abs: Any,
    labels: Sequence[int | str] | None = None,
    scores: Sequence[float] | None = None,
    colours: Sequence[Colour] | None = None,
) -> np.ndarray:
    """A copy of the image with boxes and "label score" on them.

    `colours` are one a box; without them a label keeps its colour over all images. Boxes are cut at the image's border;
    one that is not finite is left out.
    """
    boxes, image = as_array(boxes_xyxy_abs).reshape(-1, 4), np.asarray(image)
    texts = _texts(len(boxes), labels, scores)
    colours = colours or [
        label_colour(label) for label in (as_list(labels) if labels is not None else range(len(boxes)))
    ]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 200))
    font = load_font(max(11, round(max(picture.size) / 32)))
    # Small boxes last, and names after all boxes, so that nothing covers them.
    order = [i for i in np.argsort(-_areas(boxes)) if np.isfinite(boxes[i]).all()]
    limit = np.array([picture.width - 1, picture.height - 1] * 2)
    clipped = np.clip(boxes, 0, limit)
    for i in order:
        x1, y1, x2, y2 = clipped[i]
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=tuple(colours[i]), width=line)
    for i in order:
        if texts[i]:
            draw_label(draw, texts[i], clipped[i, :2], tuple(colours[i]), font, picture.size)
    return np.asarray(picture)


def draw_label(
    draw: ImageDraw.ImageDraw, text: str, corner: np.ndarray, colour: Colour, font: Any, size: tuple
) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 150
    draw.text((x + 3 - left, y + 2 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _texts(count: int, labels: Any, scores: Any) -> list[str]:
    names = [""] * count if labels is None else [str(label) for label in as_list(labels)]
    numbers = [""] * count if scores is None else [f"{score:.2f}" for score in as_list(scores)]
    return [" ".join(filter(None, pair)) for pair in zip(names, numbers, strict=True)]


def label_colour(label: int | str) -> Colour:
    number = label if isinstance(label, int) else sum(map(ord, label))
    return PALETTE[(number - 1) % len(PALETTE)]


def cycle_colours(count: int) -> list[Colour]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def as_array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)


def as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def load_font(size: int) -> Any:
    return ImageFont.load_default(size)
