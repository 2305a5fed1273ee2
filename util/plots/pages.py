"""Pages of images with boxes, written as PNG: predictions, training samples, query patches.

Boxes are (x1, y1, x2, y2) in pixels of their image, images uint8 [H, W, 3] RGB. Boxes, labels and scores may be NumPy
arrays, lists or tensors on the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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

Boxes = Mapping[str, Any]  # "boxes" [N, 4], and "labels" [N], "scores" [N] where there are any

PAGE, FAINT = (255, 255, 255), (120, 120, 120)
FONT = ImageFont.load_default(13)
MARGIN = 12  # pixels around and between the pictures of a page
MAX_SIDE = 640  # pixels; larger images are shown smaller
MIN_SIDE = 280  # pixels; smaller ones larger, so that names can be read


def prediction_page(
    rows: Sequence[tuple[np.ndarray, Boxes, Boxes]],
    class_names: Mapping[int, str],
    out_png: str | Path,
    score_threshold: float | None = None,
    max_boxes: int = 20,
    columns: int = 2,
) -> Path:
    """Draws predictions beside the ground truth, one image per cell, `columns` cells per line.

    `rows`: (image, predictions, ground truth); both are mappings with `boxes` [N, 4] and `labels` [N], predictions also
    with `scores` [N]. Predictions with a score of at least `score_threshold` are drawn, at most `max_boxes` per image.
    None is 0.5, or less until the page has as many predictions as ground-truth boxes: focal scores stay low for long.
    """
    score_threshold = _page_threshold(rows) if score_threshold is None else score_threshold
    cells = []
    for image, predictions, ground_truth in rows:
        scores = as_array(predictions["scores"])
        keep = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= score_threshold][
            :max_boxes
        ]
        shown = _zoomed(image, as_array(predictions["boxes"]).reshape(-1, 4)[keep])
        predicted = _named(shown, as_array(predictions["labels"])[keep], class_names, scores[keep])
        real = _named(
            _zoomed(image, ground_truth["boxes"]), as_array(ground_truth["labels"]), class_names
        )
        cells.append(
            _beside(
                [predicted, real], [f"predictions (score >= {score_threshold:.2g})", "ground truth"]
            )
        )
    return _save(_grid(cells, columns), out_png)


def found_page(
    rows: Sequence[tuple[str, np.ndarray, Boxes]], out_png: str | Path, columns: int = 3
) -> Path:
    """Draws predictions in images without ground truth: (title, image, boxes with class names as `labels` and with
    `scores`).
    """
    return panel_page([[row] for row in rows], out_png, columns)


def panel_page(
    rows: Sequence[Sequence[tuple[str, np.ndarray, Boxes]]], out_png: str | Path, columns: int = 1
) -> Path:
    """Draws images in several panels: each row has (title, image, boxes with names as `labels`, and with `scores` or
    None).
    """
    cells = []
    for panels in rows:
        shown = [
            draw_boxes(*_zoomed(image, b["boxes"]), b["labels"], b["scores"])
            for _, image, b in panels
        ]
        titles = [
            title[: picture.shape[1] // 8]
            for (title, _, _), picture in zip(panels, shown, strict=True)
        ]
        cells.append(_beside(shown, titles))
    return _save(_grid(cells, columns), out_png)


def _page_threshold(rows: Sequence[tuple[np.ndarray, Boxes, Boxes]]) -> float:
    scores = np.concatenate(
        [np.zeros(0), *(as_array(predictions["scores"]) for _, predictions, _ in rows)]
    )
    count = min(sum(len(ground_truth["boxes"]) for _, _, ground_truth in rows), len(scores))
    return min(0.5, float(np.sort(scores)[-count])) if count else 0.5


def patch_page(
    rows: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Any, Boxes]],
    out_png: str | Path,
    columns: int = 2,
) -> Path:
    """Draws what a model that was pre-trained with query patches finds, each patch in its own color.

    `rows`: (image, patches, patch_boxes_xyxy_abs [M, 4], predictions). The M patches are uint8 [h, w, 3], cut from
    these boxes; predictions have `boxes` [K, 4], `scores` [K] and, unless box i belongs to patch i, `patches` [K] with
    the patch's index. Left: the image with the patches' places; middle: the boxes found; right: the patches.
    """
    cells = []
    for image, patches, patch_boxes, predictions in rows:
        colors = cycle_colors(len(patches))
        places = _zoomed(image, patch_boxes)
        found = _zoomed(image, predictions["boxes"])
        owners = [int(i) for i in as_list(predictions.get("patches", range(len(found[1]))))]
        left = draw_boxes(*places, [str(i + 1) for i in range(len(places[1]))], None, colors)
        middle = draw_boxes(
            *found,
            [f"{i + 1}:" for i in owners],
            predictions["scores"],
            [colors[i] for i in owners],
        )
        strip = _patch_strip(patches, colors, left.shape[0])
        cells.append(
            _beside(
                [left, middle, strip], ["the patches' places", "found by their queries", "patches"]
            )
        )
    return _save(_grid(cells, columns), out_png)


def sample_page(
    rows: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    out_png: str | Path,
    columns: int = 2,
) -> Path:
    """Draws training images as a model gets them.

    A row has `image` (with its padding), `boxes` [N, 4], `labels` [N], `patches` (M of uint8 [h, w, 3], cut from the
    boxes; often none) and `title`. Boxes are labelled with their class name, or with the number and color of their
    patch.
    """
    cells = []
    for row in rows:
        shown, patches = _zoomed(row["image"], row["boxes"]), row["patches"]
        if len(patches):
            colors = cycle_colors(len(patches))
            drawn = draw_boxes(
                *shown,
                [str(i + 1) for i in range(len(shown[1]))],
                None,
                cycle_colors(len(shown[1])),
            )
            cells.append(
                _beside(
                    [drawn, _patch_strip(patches, colors, drawn.shape[0])],
                    [row["title"], "patches"],
                )
            )
        else:
            cells.append(
                _beside([_named(shown, as_array(row["labels"]), class_names)], [row["title"]])
            )
    return _save(_grid(cells, columns), out_png)


def _patch_strip(patches: Sequence[np.ndarray], colors: Sequence[Color], height: int) -> np.ndarray:
    """Patches below each other with colored frames and numbers, in as few columns as keep them legible."""
    columns = max(1, math.ceil(len(patches) * 56 / height))
    lines = max(1, math.ceil(len(patches) / columns))
    side = min(height // lines, 110)
    strip = Image.new("RGB", (columns * side, height), PAGE)
    for i, patch in enumerate(patches):
        inner = side - 4
        cell = Image.new("RGB", (inner, inner), colors[i])
        cell.paste(
            Image.fromarray(np.asarray(patch)).resize(
                (inner - 8, inner - 8), Image.Resampling.BILINEAR
            ),
            (4, 4),
        )
        draw_label(cell, str(i + 1), np.zeros(2), colors[i], FONT)
        strip.paste(cell, (i // lines * side + 2, i % lines * side + 2))
    return np.asarray(strip)


def _zoomed(image: np.ndarray, boxes_xyxy_abs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Image and boxes at a size that is good to look at."""
    image, boxes = np.asarray(image), as_array(boxes_xyxy_abs).reshape(-1, 4)
    longest = max(image.shape[:2])
    factor = min(max(longest, MIN_SIDE), MAX_SIDE) / longest
    if factor == 1:
        return image, boxes
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)), boxes * factor


def _named(
    shown: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    class_names: Mapping[int, str],
    scores: Any = None,
) -> np.ndarray:
    names = [class_names.get(int(label), f"class {int(label)}") for label in labels]
    return draw_boxes(*shown, names, scores, [label_color(int(label)) for label in labels])


def _beside(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> Image.Image:
    """Pictures side by side with a title over each."""
    title = 20
    gap = MARGIN // 2
    size = (
        sum(p.shape[1] + gap for p in pictures) - gap,
        max(p.shape[0] for p in pictures) + title,
    )
    cell = Image.new("RGB", size, PAGE)
    draw, x = ImageDraw.Draw(cell), 0
    for picture, text in zip(pictures, titles, strict=True):
        draw.text((x, 2), text, fill=FAINT, font=FONT)
        cell.paste(Image.fromarray(picture), (x, title))
        x += picture.shape[1] + gap
    return cell


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Cells of any sizes in lines of `columns`; torchvision.utils.make_grid takes images of one size only."""
    if not cells:
        return _beside([np.full((40, MIN_SIDE, 3), 255, np.uint8)], ["no image to show"])
    columns = min(columns, len(cells))
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    widths = [max(line[c].width for line in lines if c < len(line)) for c in range(columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    page = Image.new(
        "RGB", (sum(widths) + 2 * MARGIN * columns, sum(heights) + MARGIN * (len(lines) + 1)), PAGE
    )
    y = MARGIN
    for line, height in zip(lines, heights, strict=True):
        x = MARGIN
        for cell, width in zip(line, widths, strict=False):
            page.paste(cell, (x, y))
            x += width + 2 * MARGIN
        y += height + MARGIN
    return page


def _save(page: Image.Image, out_png: str | Path) -> Path:
    # A page is written in each epoch: level 3 takes a ninth of the time of the smallest file, which is a tenth smaller.
    return write_atomically(out_png, lambda file: page.save(file, format="PNG", compress_level=3))
