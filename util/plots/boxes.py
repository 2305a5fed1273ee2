"""Draw boxes on images with Pillow.

Images are uint8 [H, W, 3] in RGB, boxes (x1, y1, x2, y2) in pixels of their image. Boxes, labels and scores may be
NumPy arrays, lists or tensors on the CPU. Letters: N boxes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from util.plots.fonts import font_for, legible

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Colors that stand out from images and that color-blind readers can tell apart.
PALETTE: tuple[Color, ...] = (
    (230, 85, 13), (0, 114, 178), (0, 158, 115), (204, 51, 139), (240, 190, 30),
    (86, 180, 233), (138, 75, 8), (118, 60, 190), (150, 200, 30), (90, 90, 90),
)  # fmt: skip
LUMA = (0.299, 0.587, 0.114)  # brightness of red, green and blue (ITU-R BT.601)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_abs: Any,
    labels: Sequence[int | str] | None = None,
    scores: Sequence[float] | None = None,
    colors: Sequence[Color] | None = None,
) -> np.ndarray:
    """Return a copy of the image with N boxes and their "label score".

    torchvision's `draw_bounding_boxes` hides small boxes under their labels and cuts labels off at the border.

    Args:
        boxes_xyxy_abs: [N, 4]. Clipped to the image; a box that is not finite is skipped.
        labels: N names or class ids.
        scores: N numbers.
        colors: N colors. By default a label has the same color in all images.
    """
    boxes = as_array(boxes_xyxy_abs).reshape(-1, 4)  # [N, 4]
    texts = _texts(len(boxes), labels, scores)
    if colors is None:
        color_keys = range(len(boxes)) if labels is None else as_list(labels)
        colors = [label_color(key) for key in color_keys]

    canvas = Image.fromarray(np.asarray(image))
    draw = ImageDraw.Draw(canvas)
    line_width = max(2, round(max(canvas.size) / 200))
    font_size = max(11, round(max(canvas.size) / 32))

    # Large boxes first, and all labels after the boxes, so that no small box or label is covered.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)  # [N]
    order = [i for i in np.argsort(-areas) if np.isfinite(boxes[i]).all()]
    clipped = np.clip(boxes, 0, [canvas.width - 1, canvas.height - 1] * 2)  # [N, 4]
    for i in order:
        x1, y1, x2, y2 = clipped[i]
        # Pillow rejects boxes whose corners are swapped, which a detector may predict.
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        draw.rectangle(corners, outline=tuple(colors[i]), width=line_width)
    labels_xyxy: list[Rectangle] = []
    for i in order:
        if texts[i]:
            color, corner = tuple(colors[i]), clipped[i, :2]
            drawn = draw_label(canvas, texts[i], corner, color, font_size, others=labels_xyxy)
            labels_xyxy.append(drawn)
    return np.asarray(canvas)


def draw_label(
    canvas: Image.Image,
    text: str,
    corner: np.ndarray,
    color: Color,
    font_size: float,
    centered: bool = False,
    others: Iterable[Rectangle] = (),
) -> Rectangle:
    """Draw text on a background of `color`: above the corner (x, y), or below it at the top border of the image.

    Args:
        centered: draw it around (x, y) instead.
        others: labels to stay clear of. The text moves to the right of them, if there is room in the image.

    Returns:
        The background, (x1, y1, x2, y2).
    """
    text = legible(text)
    font = font_for(text, font_size)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5

    if centered:
        corner = np.asarray(corner) + (-width / 2, height / 2)
    x = min(max(corner[0], 0), max(canvas.width - width, 0))
    y = corner[1] - height if corner[1] >= height else corner[1]
    clear = x
    for x1, y1, x2, y2 in sorted(others):
        if x1 <= clear + width and clear <= x2 and y1 <= y + height and y <= y2:
            clear = x2 + 1
    if clear + width <= canvas.width:
        x = clear
    background = (x, y, x + width, y + height)
    draw.rectangle(background, fill=color)

    is_bright = sum(weight * value for weight, value in zip(LUMA, color, strict=True)) > 150
    text_color = (0, 0, 0) if is_bright else (255, 255, 255)
    draw.text((x + 3 - left, y + 2 - top), text, fill=text_color, font=font)
    return background


def _texts(count: int, labels: Any, scores: Any) -> list[str]:
    """Return "label score" of each box, or the one of them that exists."""
    names = [""] * count if labels is None else [str(label) for label in as_list(labels)]
    numbers = [""] * count if scores is None else [f"{score:.2f}" for score in as_list(scores)]
    return [" ".join(filter(None, pair)) for pair in zip(names, numbers, strict=True)]


def label_color(label: int | str) -> Color:
    """Return the color of a class id or name, the same in every image."""
    number = label if isinstance(label, int) else sum(map(ord, label))
    return PALETTE[(number - 1) % len(PALETTE)]


def cycle_colors(count: int) -> list[Color]:
    """Return `count` colors, which repeat after the palette's end."""
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def as_array(values: Any) -> np.ndarray:
    """Convert a tensor, array or list to float64."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)


def as_list(values: Any) -> list:
    """Convert a tensor, array or sequence to a list of plain values."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
