"""Boxes drawn on images by Pillow.

Boxes are (x1, y1, x2, y2) in pixels of their image, images uint8 [H, W, 3] RGB. Boxes, labels and scores may be NumPy
arrays, lists or tensors on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

# Colors that color-blind eyes tell apart too, and that stand out from images.
PALETTE: tuple[Color, ...] = (
    (230, 85, 13), (0, 114, 178), (0, 158, 115), (204, 51, 139), (240, 190, 30),
    (86, 180, 233), (138, 75, 8), (118, 60, 190), (150, 200, 30), (90, 90, 90),
)  # fmt: skip


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_abs: Any,
    labels: Sequence[int | str] | None = None,
    scores: Sequence[float] | None = None,
    colors: Sequence[Color] | None = None,
) -> np.ndarray:
    """A copy of the image with boxes and "label score" on them.

    `colors`: one per box; without them a label has the same color in all images. Boxes are clipped to the image; a box
    that is not finite is skipped.
    """
    # torchvision.utils.draw_bounding_boxes hides small boxes under their labels and cuts labels at the image's border.
    boxes, image = as_array(boxes_xyxy_abs).reshape(-1, 4), np.asarray(image)
    texts = _texts(len(boxes), labels, scores)
    colors = colors or [
        label_color(label) for label in (range(len(boxes)) if labels is None else as_list(labels))
    ]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 200))
    font = ImageFont.load_default(max(11, round(max(picture.size) / 32)))
    # Small boxes last, and labels after all boxes, so that nothing covers them.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = [i for i in np.argsort(-areas) if np.isfinite(boxes[i]).all()]
    clipped = np.clip(boxes, 0, [picture.width - 1, picture.height - 1] * 2)
    for i in order:
        x1, y1, x2, y2 = clipped[i]
        draw.rectangle(
            (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)),
            outline=tuple(colors[i]),
            width=line,
        )
    for i in order:
        if texts[i]:
            draw_label(picture, texts[i], clipped[i, :2], tuple(colors[i]), font)
    return np.asarray(picture)


def draw_label(
    picture: Image.Image, text: str, corner: np.ndarray, color: Color, font: Any
) -> None:
    """The text on its color above the corner (x, y), or below it where there is no room, inside the picture."""
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5
    x = min(max(corner[0], 0), max(picture.width - width, 0))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 150
    draw.text(
        (x + 3 - left, y + 2 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font
    )


def _texts(count: int, labels: Any, scores: Any) -> list[str]:
    names = [""] * count if labels is None else [str(label) for label in as_list(labels)]
    numbers = [""] * count if scores is None else [f"{score:.2f}" for score in as_list(scores)]
    return [" ".join(filter(None, pair)) for pair in zip(names, numbers, strict=True)]


def label_color(label: int | str) -> Color:
    number = label if isinstance(label, int) else sum(map(ord, label))
    return PALETTE[(number - 1) % len(PALETTE)]


def cycle_colors(count: int) -> list[Color]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def as_array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)


def as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)
