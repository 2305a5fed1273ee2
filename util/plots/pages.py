"""Write pages of images with boxes and masks as PNG: predictions, training samples, query patches.

Images are uint8 [H, W, 3] in RGB, boxes (x1, y1, x2, y2) in pixels of their image. Boxes, labels and scores may be
NumPy arrays, lists or tensors on the CPU. Masks are RLEs or bool arrays and may have another size than their image,
which they cover. Letters: N ground-truth or drawn boxes, K predictions, M patches.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from util.files import write_atomically
from util.plots.boxes import (
    Color,
    as_array,
    as_list,
    cycle_colors,
    draw_boxes,
    draw_label,
    label_color,
)
from util.plots.fonts import class_text, font_for, legible
from util.plots.masks import draw_masks, draw_segments, masks_to_draw, merge_masks, resize_mask

# "boxes" [N, 4], and optionally "labels" [N], "scores" [N], "masks" N, and "panoptic", a segmentation of the image:
# {"ids": [H, W], "segments_info": [{"id", "category_id"}]}
Boxes = Mapping[str, Any]

PAGE_COLOR, TITLE_COLOR = (255, 255, 255), (120, 120, 120)
# All sizes are in pixels.
FONT_SIZE = 13
MARGIN = 12  # around and between the cells of a page
TITLE_HEIGHT = 20
MAX_SIDE = 640  # larger images are scaled down to this
MIN_SIDE = 280  # smaller images are scaled up to this, so that labels are legible
MAX_PATCH_SIDE, MIN_PATCH_SIDE = 110, 56
# Pages are written every epoch. The best level makes files a tenth smaller and takes nine times as long.
COMPRESS_LEVEL = 3

MAX_SCORE_THRESHOLD = 0.5


def prediction_page(
    rows: Sequence[tuple[np.ndarray, Boxes, Boxes]],
    class_names: Mapping[int, str],
    out_png: str | Path,
    score_threshold: float | None = None,
    max_boxes: int = 20,
    columns: int = 2,
) -> Path:
    """Draw predictions next to the ground truth, one image per cell; panoptic segmentations in a cell of their own.

    Args:
        rows: (image, predictions, ground truth). Both have `boxes` [N, 4] and `labels` [N], predictions also `scores`.
            Both may have `masks`, and predictions `panoptic`.
        class_names: Label -> name.
        out_png: Image to write.
        score_threshold: Minimum score of a prediction, 0 to 1. Default: 0.5, or less if fewer predictions than
            ground-truth boxes reach it, because focal scores stay low for many epochs.
        max_boxes: Maximum number of predictions per image; the best are drawn.
        columns: Number of cells per line.
    """
    if score_threshold is None:
        score_threshold = _page_threshold(rows)

    cells = []
    for image, predictions, ground_truth in rows:
        scores = as_array(predictions["scores"])  # [K]
        best_first = np.argsort(-scores, kind="stable")
        keep = [int(i) for i in best_first if scores[i] >= score_threshold][:max_boxes]
        kept = _select(predictions, keep)
        has_segments = "panoptic" in predictions
        if has_segments:  # the next cell shows the masks
            kept, objects = _without_masks(kept), _without_masks(ground_truth)
        else:
            objects = ground_truth

        predicted = _draw_named_boxes(image, kept, class_names)
        real = _draw_named_boxes(image, objects, class_names)
        titles = [f"predictions (score >= {score_threshold:.2g})", "ground truth"]
        cells.append(_side_by_side([predicted, real], titles))
        if has_segments:
            cells.append(_segments_cell(image, predictions["panoptic"], ground_truth, class_names))
    return _save(_grid(cells, columns), out_png)


def _select(boxes: Boxes, keep: Sequence[int]) -> Boxes:
    """Return the boxes with these indices, in this order."""
    chosen: dict[str, Any] = {
        "boxes": as_array(boxes["boxes"]).reshape(-1, 4)[keep],  # [N, 4]
        "labels": as_array(boxes["labels"])[keep],
        "scores": as_array(boxes["scores"])[keep],
    }
    if boxes.get("masks") is not None:
        chosen["masks"] = [boxes["masks"][i] for i in keep]
    return chosen


def _without_masks(boxes: Boxes) -> Boxes:
    return {key: value for key, value in boxes.items() if key != "masks"}


def _segments_cell(
    image: np.ndarray,
    predicted: Mapping[str, Any],
    ground_truth: Boxes,
    class_names: Mapping[int, str],
) -> Image.Image:
    """Draw a predicted panoptic segmentation, next to that of the ground truth if it has masks."""
    panels = [("predicted segments", predicted)]
    if ground_truth.get("masks") is not None:
        masks = np.asarray(ground_truth["masks"], bool)  # [N, H, W]
        panels.append(("ground truth", merge_masks(masks, as_list(ground_truth["labels"]))))
    pictures = [_draw_panoptic(image, segments, class_names) for _, segments in panels]
    return _side_by_side(pictures, [title for title, _ in panels])


def _draw_panoptic(
    image: np.ndarray, panoptic: Mapping[str, Any], class_names: Mapping[int, str]
) -> np.ndarray:
    picture, _ = _resize_for_display(image, np.zeros((0, 4)))
    ids = resize_mask(np.asarray(panoptic["ids"]), picture.shape[:2])
    return draw_segments(picture, ids, panoptic["segments_info"], class_names)


def _page_threshold(rows: Sequence[tuple[np.ndarray, Boxes, Boxes]]) -> float:
    """Return 0.5, or the lower score that leaves as many predictions as there are ground-truth boxes."""
    all_scores = [as_array(predictions["scores"]) for _, predictions, _ in rows]
    scores = np.concatenate([np.zeros(0), *all_scores])
    num_boxes = sum(len(ground_truth["boxes"]) for _, _, ground_truth in rows)
    count = min(num_boxes, len(scores))
    if count == 0:
        return MAX_SCORE_THRESHOLD
    return min(MAX_SCORE_THRESHOLD, float(np.sort(scores)[-count]))


def detection_page(
    rows: Sequence[tuple[str, np.ndarray, Boxes]], out_png: str | Path, columns: int = 3
) -> Path:
    """Draw predictions in images without ground truth, one image per cell, next to its panoptic segmentation if any.

    Args:
        rows: (title, image, predictions with class names as `labels`, and with `scores`). Segments of `panoptic` have a
            `name`.
        columns: maximum number of pictures per line.
    """
    cells = [_detection_panels(*row) for row in rows]
    pictures_per_cell = max(map(len, cells), default=1)
    return panel_page(cells, out_png, max(1, columns // pictures_per_cell))


def _detection_panels(
    title: str, image: np.ndarray, predictions: Boxes
) -> list[tuple[str, np.ndarray, Boxes]]:
    if "panoptic" not in predictions:
        return [(title, image, predictions)]
    objects = {key: value for key, value in predictions.items() if key != "panoptic"}
    segments = {"panoptic": predictions["panoptic"]}
    return [(title, image, objects), ("segments", image, segments)]


def panel_page(
    rows: Sequence[Sequence[tuple[str, np.ndarray, Boxes]]], out_png: str | Path, columns: int = 1
) -> Path:
    """Draw images in several panels, one row per cell.

    Args:
        rows: Panels of each row: (title, image, boxes with names as `labels`, and `scores` or None). A panel may have
            `panoptic` instead of boxes; each segment has a `name`.
    """
    cells = []
    for panels in rows:
        pictures = [_draw_panel(image, boxes) for _, image, boxes in panels]
        cells.append(_side_by_side(pictures, [title for title, _, _ in panels]))
    return _save(_grid(cells, columns), out_png)


def _draw_panel(image: np.ndarray, boxes: Boxes) -> np.ndarray:
    if "panoptic" in boxes:
        segments = boxes["panoptic"]["segments_info"]
        names = {segment["category_id"]: segment["name"] for segment in segments}
        return _draw_panoptic(image, boxes["panoptic"], names)
    labels = boxes["labels"]
    colors = None if labels is None else [label_color(label) for label in as_list(labels)]
    return _draw_objects(image, boxes, labels, colors)


def patch_page(
    rows: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Any, Boxes]],
    out_png: str | Path,
    columns: int = 2,
) -> Path:
    """Draw what a model that was pre-trained on query patches finds, each patch in its own color.

    A cell has the image with the boxes of its patches, the predicted boxes, and the patches.

    Args:
        rows: (image, patches, patch_boxes_xyxy_abs [M, 4], predictions). The M patches are uint8 [h, w, 3], cropped
            from these boxes. Predictions have `boxes` [K, 4], `scores` [K] and `patches` [K], the patch index of each;
            without it, box i belongs to patch i.
    """
    cells = []
    for image, patches, patch_boxes, predictions in rows:
        colors = cycle_colors(len(patches))
        image_with_patches = _resize_for_display(image, patch_boxes)
        image_with_found = _resize_for_display(image, predictions["boxes"])
        num_found = len(image_with_found[1])
        patch_of_box = [int(i) for i in as_list(predictions.get("patches", range(num_found)))]

        left = draw_boxes(*image_with_patches, _numbers(len(image_with_patches[1])), None, colors)
        middle = draw_boxes(
            *image_with_found,
            [f"{i + 1}:" for i in patch_of_box],
            predictions["scores"],
            [colors[i] for i in patch_of_box],
        )
        strip = _patch_strip(patches, colors, left.shape[0])
        titles = ["boxes of the patches", "found by their queries", "patches"]
        cells.append(_side_by_side([left, middle, strip], titles))
    return _save(_grid(cells, columns), out_png)


def sample_page(
    rows: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str] | None,
    out_png: str | Path,
    columns: int = 2,
) -> Path:
    """Draw training images as the model gets them, one image per cell.

    Boxes are labelled with their class name, or with the number and color of their patch.

    Args:
        rows: Mappings with `image` including its padding, `boxes` [N, 4], `labels` [N], `title` and `patches`: M of
            uint8 [h, w, 3], cropped from the boxes, often none. They may have `masks`.
        class_names: Label -> name; None for boxes without classes, which get no label.
    """
    cells = []
    for row in rows:
        patches = row["patches"]
        if not len(patches):
            picture = _draw_named_boxes(row["image"], row, class_names)
            cells.append(_side_by_side([picture], [row["title"]]))
            continue

        image_and_boxes = _resize_for_display(row["image"], row["boxes"])
        num_boxes = len(image_and_boxes[1])
        picture = draw_boxes(*image_and_boxes, _numbers(num_boxes), None, cycle_colors(num_boxes))
        strip = _patch_strip(patches, cycle_colors(len(patches)), picture.shape[0])
        cells.append(_side_by_side([picture, strip], [row["title"], "patches"]))
    return _save(_grid(cells, columns), out_png)


def _numbers(count: int) -> list[str]:
    """Return "1" to `count`."""
    return [str(i + 1) for i in range(count)]


def _patch_strip(patches: Sequence[np.ndarray], colors: Sequence[Color], height: int) -> np.ndarray:
    """Stack patches with colored frames and numbers, in as few columns as keep them legible: [height, w, 3]."""
    columns = max(1, math.ceil(len(patches) * MIN_PATCH_SIDE / height))
    lines = max(1, math.ceil(len(patches) / columns))
    side = min(height // lines, MAX_PATCH_SIDE)
    framed = side - 4  # a gap of 2 pixels on each side
    inner = framed - 8  # a frame of 4 pixels on each side

    strip = Image.new("RGB", (columns * side, height), PAGE_COLOR)
    for i, patch in enumerate(patches):
        cell = Image.new("RGB", (framed, framed), colors[i])
        picture = Image.fromarray(np.asarray(patch))
        cell.paste(picture.resize((inner, inner), Image.Resampling.BILINEAR), (4, 4))
        draw_label(cell, str(i + 1), np.zeros(2), colors[i], FONT_SIZE)
        column, line = divmod(i, lines)
        strip.paste(cell, (column * side + 2, line * side + 2))
    return np.asarray(strip)


def _resize_for_display(image: np.ndarray, boxes_xyxy_abs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale an image and its boxes [N, 4], so that the longest side is between MIN_SIDE and MAX_SIDE."""
    image, boxes = np.asarray(image), as_array(boxes_xyxy_abs).reshape(-1, 4)
    longest = max(image.shape[:2])
    factor = min(max(longest, MIN_SIDE), MAX_SIDE) / longest
    if factor == 1:
        return image, boxes
    size_wh = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    resized = Image.fromarray(image).resize(size_wh, Image.Resampling.BICUBIC)
    return np.asarray(resized), boxes * factor


def _draw_named_boxes(
    image: np.ndarray, boxes: Boxes, class_names: Mapping[int, str] | None
) -> np.ndarray:
    numbers = [int(label) for label in as_list(boxes["labels"])]
    names = None
    if class_names is not None:
        names = [class_text(class_names.get(n, f"class {n}"), n) for n in numbers]
    return _draw_objects(image, boxes, names, [label_color(number) for number in numbers])


def _draw_objects(
    image: np.ndarray,
    boxes: Boxes,
    names: Sequence[str] | None,
    colors: Sequence[Color] | None,
) -> np.ndarray:
    """Scale an image for display and draw boxes on it, above their masks if they have some."""
    picture, scaled = _resize_for_display(image, boxes["boxes"])
    if boxes.get("masks") is not None and colors is not None:
        picture = draw_masks(picture, masks_to_draw(boxes["masks"], picture.shape[:2]), colors)
    return draw_boxes(picture, scaled, names, boxes.get("scores"), colors)


def _side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> Image.Image:
    """Put pictures next to each other, with a title above each."""
    gap = MARGIN // 2
    width = sum(picture.shape[1] + gap for picture in pictures) - gap
    height = max(picture.shape[0] for picture in pictures) + TITLE_HEIGHT
    cell = Image.new("RGB", (width, height), PAGE_COLOR)

    draw = ImageDraw.Draw(cell)
    x = 0
    for picture, title in zip(pictures, titles, strict=True):
        title = _fit_title(title, picture.shape[1])
        draw.text((x, 2), title, fill=TITLE_COLOR, font=font_for(title, FONT_SIZE))
        cell.paste(Image.fromarray(picture), (x, TITLE_HEIGHT))
        x += picture.shape[1] + gap
    return cell


def _fit_title(title: str, width: int) -> str:
    """Return a title as it can be drawn, cut with dots if it is wider than its picture; "" if not even the dots fit."""
    title, dots = legible(title), "..."
    font = font_for(title, FONT_SIZE)
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + dots) > width:
        title = title[:-1]
    return title + dots if title else ""


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange cells in lines of `columns`. torchvision's `make_grid` needs images of one size."""
    if not cells:
        blank = np.full((40, MIN_SIDE, 3), 255, np.uint8)
        return _side_by_side([blank], ["no image to show"])

    columns = min(columns, len(cells))
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    widths = [max(line[c].width for line in lines if c < len(line)) for c in range(columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    page_width = sum(widths) + 2 * MARGIN * columns
    page_height = sum(heights) + MARGIN * (len(lines) + 1)
    page = Image.new("RGB", (page_width, page_height), PAGE_COLOR)

    y = MARGIN
    for line, height in zip(lines, heights, strict=True):
        x = MARGIN
        for cell, width in zip(line, widths, strict=False):  # the last line may be shorter
            page.paste(cell, (x, y))
            x += width + 2 * MARGIN
        y += height + MARGIN
    return page


def _save(page: Image.Image, out_png: str | Path) -> Path:
    def write(file) -> None:
        page.save(file, format="PNG", compress_level=COMPRESS_LEVEL)

    return write_atomically(out_png, write)
