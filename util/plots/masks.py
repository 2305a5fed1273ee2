"""Draw masks and panoptic segmentations on images.

Images are uint8 [H, W, 3] in RGB. Letters: N masks, H and W the size of the image.
"""

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from util.masks import decode_masks
from util.plots.boxes import Color, draw_label
from util.plots.fonts import class_text

MASK_ALPHA = 0.45  # opacity of the fill
SEGMENT_ALPHA = 0.55
BORDER_COLOR: Color = (255, 255, 255)  # between segments
GOLDEN_RATIO = 0.618034  # multiples of it are spread evenly over the circle of hues
SHADES = ((0.85, 0.95), (0.6, 0.75), (1.0, 0.65))  # saturation and value
INSTANCE_STEP = 37  # from the color of an object to that of the next one of its class
MAX_PLACEMENT_SIDE = 256  # pixels; place labels on a segmentation of this size
MIN_LABELLED_FRACTION = 0.002  # of the image; smaller segments have no label


def draw_masks(
    image: np.ndarray, masks: Iterable[Any], colors: Sequence[Color], alpha: float = MASK_ALPHA
) -> np.ndarray:
    """Return a copy of the image with N half-transparent masks and their outlines.

    Args:
        masks: bool [N, H, W], or an iterable of N masks, of which only one at a time is in memory.
        colors: N colors.
        alpha: opacity of the fill, 0 to 1.
    """
    canvas = Image.fromarray(np.asarray(image))
    line_width = max(1, round(max(canvas.size) / 400))
    outlines = np.zeros((canvas.height, canvas.width), np.int32)  # 1 + index of the mask
    for number, (mask, color) in enumerate(zip(masks, colors, strict=True), start=1):
        mask = np.asarray(mask, bool)
        box = _bounding_box(mask)
        if box is None:
            continue
        inside = mask[box]
        rows, columns = box
        canvas.paste(tuple(color), (columns.start, rows.start), _opacity(inside, alpha))
        outlines[box][inside & ~_erode(inside, line_width)] = number

    # After all fills: an outline that is mixed with another mask would not stand out.
    drawn = np.array(canvas)
    on_outline = outlines > 0
    table = np.array([(0, 0, 0), *colors], np.uint8)  # [N + 1, 3]
    drawn[on_outline] = table[outlines[on_outline]]
    return drawn


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice] | None:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Remove the pixels of a mask, bool [h, w], within `steps` of its border. Outside of the array is no mask."""
    return ndimage.minimum_filter(mask.view(np.uint8), size=2 * steps + 1, mode="constant") > 0


def _opacity(mask: np.ndarray, alpha: float) -> Image.Image:
    """Return how much of a color Pillow mixes in: `alpha` on the mask, bool [h, w]."""
    return Image.fromarray(mask.view(np.uint8) * np.uint8(255 * alpha))


def resize_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize a mask or segment ids [h, w] to [H, W] by nearest neighbor."""
    if mask.shape == size_hw:
        return mask
    # Pillow has no bool that it resizes, and no int64.
    values = mask.astype(np.int32)
    resized = Image.fromarray(values).resize(size_hw[::-1], Image.Resampling.NEAREST)
    return np.asarray(resized).astype(mask.dtype)


def masks_to_draw(masks: Iterable[Any], size_hw: tuple[int, int]) -> Iterable[np.ndarray]:
    """Yield masks of any size as bool [H, W] of the picture, one at a time.

    masks: RLEs of COCO, or bool [h, w] each.
    """
    for mask in masks:
        pixels = decode_masks([mask])[0] if isinstance(mask, Mapping) else np.asarray(mask)
        yield resize_mask(pixels.astype(bool), size_hw)


# ------------------------------------------------------------------------------------------------------------- panoptic


def draw_segments(
    image: np.ndarray,
    ids: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    alpha: float = SEGMENT_ALPHA,
) -> np.ndarray:
    """Return a copy of the image with a panoptic segmentation: each segment in a color of its own, with its class name.

    A class has the same color in all images; further objects of it have others.

    Args:
        ids: [H, W], the segment of each pixel. Pixels of no segment stay as they are.
        segments: mappings with `id` and `category_id`.
        class_names: category id -> name.
    """
    index = np.full(
        int(ids.max(initial=0)) + 2, -1
    )  # id -> position in `segments`; the last one: id -1
    for position, segment in enumerate(segments):
        index[segment["id"]] = position
    owners = index[ids]  # [H, W], -1 without a segment
    colors = _segment_colors(segments)
    table = np.array([*colors, (0, 0, 0)], np.uint8)  # [n + 1, 3]

    canvas = Image.fromarray(np.asarray(image))
    canvas.paste(Image.fromarray(table[owners]), mask=_opacity(owners >= 0, alpha))
    canvas.paste(BORDER_COLOR, mask=_opacity(_borders(owners), 1.0))
    font_size = max(10, round(max(canvas.size) / 45))
    for position, corner in _label_places(owners, len(segments)):
        number = segments[position]["category_id"]
        name = class_text(class_names.get(number, f"class {number}"), number)
        draw_label(canvas, name, corner, colors[position], font_size, centered=True)
    return np.asarray(canvas)


def _segment_colors(segments: Sequence[Mapping[str, Any]]) -> list[Color]:
    seen: Counter[int] = Counter()
    colors = []
    for segment in segments:
        label = segment["category_id"]
        colors.append(distinct_color(label + INSTANCE_STEP * seen[label]))
        seen[label] += 1
    return colors


def distinct_color(number: int) -> Color:
    """Return one of many colors; those of neighboring numbers differ most."""
    saturation, value = SHADES[number % len(SHADES)]
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN_RATIO % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _borders(owners: np.ndarray) -> np.ndarray:
    """Return the pixels [H, W] whose right or lower neighbor belongs to another segment."""
    borders = np.zeros(owners.shape, bool)
    borders[:, :-1] |= owners[:, 1:] != owners[:, :-1]
    borders[:-1] |= owners[1:] != owners[:-1]
    return borders


def _label_places(owners: np.ndarray, count: int) -> list[tuple[int, np.ndarray]]:
    """Return (segment, (x, y)) of the segments that get a label, at the pixel that is farthest from their border.

    The largest come first, so that labels of small ones are on top.
    """
    step = -(-max(owners.shape) // MAX_PLACEMENT_SIDE)
    small = owners[step // 2 :: step, step // 2 :: step]
    areas = np.bincount(small[small >= 0], minlength=count)
    places = []
    for segment in np.argsort(-areas, kind="stable"):
        if areas[segment] <= MIN_LABELLED_FRACTION * small.size:
            continue
        # The border of the image is a border of the segment, too.
        distance = ndimage.distance_transform_edt(np.pad(small == segment, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        places.append((int(segment), np.array([x, y]) * step + step // 2))
    return places


def merge_masks(masks: np.ndarray, labels: Sequence[int]) -> dict[str, Any]:
    """Return the segmentation of ground-truth masks: {"ids" int [H, W] from 0, -1 without one, "segments_info"}.

    masks: bool [N, H, W]. Where masks overlap, the last one counts.
    """
    ids = np.full(masks.shape[1:], -1)
    for number, mask in enumerate(masks):
        ids[mask] = number
    segments = [{"id": i, "category_id": int(label)} for i, label in enumerate(labels)]
    return {"ids": ids, "segments_info": segments}
