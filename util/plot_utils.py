"""Pictures of a run: curves from its log, and pages of boxes.

Curves are drawn by matplotlib (an extra, imported where used), pages by Pillow. What is written is written under a
temporary name first. Boxes are (x1, y1, x2, y2) in pixels of their image, images uint8 [H, W, 3] RGB. Boxes, labels and
scores may be NumPy arrays, lists or tensors on the CPU.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.files import write_atomically
from util.logger import UserError

Colour = tuple[int, int, int]
Boxes = Mapping[str, Any]  # "boxes" [N, 4], and "labels" [N], "scores" [N] where there are any

# Colours that differ for colour-blind eyes too, and against photographs.
PALETTE: tuple[Colour, ...] = (
    (230, 85, 13), (0, 114, 178), (0, 158, 115), (204, 51, 139), (240, 190, 30),
    (86, 180, 233), (138, 75, 8), (118, 60, 190), (150, 200, 30), (90, 90, 90),
)  # fmt: skip
PAGE, INK, FAINT = (255, 255, 255), (34, 34, 34), (120, 120, 120)
MARGIN = 12  # pixels around and between the pictures of a page
MAX_SIDE = 640  # pixels; larger images are shown smaller
MIN_SIDE = 280  # pixels; smaller ones larger, so that names can be read

BBOX_STATS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
DEFAULT_FIELDS = ("loss", "class_error", "mAP")

# Curves


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The epochs in a run's `log.txt` (the file or its folder), oldest first; of an epoch written twice, the last.

    A last line that was cut off is left out.

    Raises:
        UserError: there is no such file or it is no text, a line in its middle is no JSON object, or a line has text
            where numbers belong.
    """
    path = Path(run) / "log.txt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{path}: there is no such log; give a run's output folder or its log.txt")
    epochs: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text ({error.reason} at byte {error.start}): give a run's output folder or its log.txt"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            wrong = next((key for key, value in entry.items() if not _as_logged(key, value)), None)
            if wrong is not None:
                raise UserError(
                    f"{path}, line {number}: {wrong} is {str(entry[wrong])[:60]!r}; correct or remove the line"
                )
            epochs[entry.get("epoch", number - 1)] = entry
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _as_logged(key: str, value: Any) -> bool:
    """Whether what is read of a log's line is of the right kind; all other keys are anyone's."""
    if key == "epoch":
        return type(value) is int
    if key == "test_coco_eval_bbox":
        return not value or isinstance(value, list) and len(value) > 1 and all(map(_is_number, value))
    return _is_number(value) or not key.startswith(("train_loss", "train_seconds", "n_parameters"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def curve(entries: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> tuple[list[int], list[float]]:
    """Epochs (counted from 1) and finite values of `key`, or of its item `index`, where the log has it."""
    xs, ys = [], []
    for number, entry in enumerate(entries):
        value = entry.get(key)
        if index is not None and value is not None:
            value = value[index] if index < len(value) else None  # VOC has no AP by size
        if value is not None and math.isfinite(value):
            xs.append(entry.get("epoch", number) + 1)
            ys.append(float(value))
    return xs, ys


def plot_logs(
    logs: str | Path | Iterable[str | Path],
    fields: Sequence[str] = DEFAULT_FIELDS,
    out_png: str | Path = "curves.png",
) -> Path:
    """Draws `fields` of runs (folders or log.txt files), a panel each: training solid, evaluation dashed.

    A field is a name in the published log without `train_` or `test_`; `mAP` is AP and AP50 of `test_coco_eval_bbox`,
    and is left out when no run was evaluated.
    """
    logs = [Path(path) for path in ([logs] if isinstance(logs, str | Path) else logs)]
    names = [path.name if path.is_dir() else path.parent.name for path in logs]
    unique = names if len(set(names)) == len(names) else [str(path) for path in logs]
    return _draw_curves(dict(zip(unique, map(read_log, logs), strict=True)), fields, out_png)


def plot_curves(
    runs: Mapping[str, str | Path], out_png: str | Path, fields: Sequence[str] = ("loss", "AP", "AP50")
) -> Path:
    """Overlays runs (name -> folder or log.txt), a colour each; `fields` as in `plot_logs`, or one of `BBOX_STATS`."""
    return _draw_curves({name: read_log(path) for name, path in runs.items()}, fields, out_png)


def _draw_curves(runs: Mapping[str, list[dict]], fields: Sequence[str], out_png: str | Path) -> Path:
    fields = [field for field in fields if any(_series(entries, field) for entries in runs.values())]
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(4.6 * max(len(fields), 1), 3.7), layout="constrained", dpi=110)
    figure_canvas(figure)
    for number, field in enumerate(fields):
        axes = figure.add_subplot(1, len(fields), number + 1)
        for colour, (name, entries) in zip(_cycle(len(runs)), runs.items(), strict=True):
            for label, style, (xs, ys) in _series(entries, field):
                shown = f"{name}, {label}" if len(runs) > 1 and label else label or name
                marker = "o" if style == "--" or len(xs) < 20 else None
                axes.plot(xs, ys, style, color=np.divide(colour, 255), label=shown, marker=marker, markersize=3.5)
        _dress(axes, field)
    if not fields:
        figure.text(0.5, 0.5, "no epoch has been logged yet", ha="center")
    return write_atomically(out_png, lambda file: figure.savefig(file, format="png"))


def _series(entries: Sequence[Mapping], field: str) -> list[tuple[str, str, tuple[list[int], list[float]]]]:
    """(label, line style, points) of what a panel shows of one run."""
    if field == "mAP":
        series = [("AP", "-", curve(entries, "test_coco_eval_bbox", 0))]
        series.append(("AP50", "--", curve(entries, "test_coco_eval_bbox", 1)))
    elif field in BBOX_STATS:
        series = [("", "-", curve(entries, "test_coco_eval_bbox", BBOX_STATS.index(field)))]
    else:
        series = [("training", "-", curve(entries, f"train_{field}"))]
        series.append(("evaluation", "--", curve(entries, f"test_{field}")))
    return [item for item in series if item[2][0]]


def _dress(axes: Any, field: str) -> None:
    is_ap = field == "mAP" or field in BBOX_STATS
    axes.set_title({"mAP": "average precision"}.get(field, field.replace("_", " ")), fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0, top=1 if is_ap else None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def figure_classes() -> tuple[type, type]:
    """matplotlib's Figure and the canvas that makes it a PNG; UserError where it is not installed."""
    # The Agg canvas by name, so that a run neither needs a display nor changes the backend of a program that plots.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib (in requirements-extras.txt)") from None
    return Figure, FigureCanvasAgg


# Boxes


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
    boxes, image = _as_array(boxes_xyxy_abs).reshape(-1, 4), np.asarray(image)
    texts = _texts(len(boxes), labels, scores)
    colours = colours or [_colour(label) for label in (_as_list(labels) if labels is not None else range(len(boxes)))]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 200))
    font = _font(max(11, round(max(picture.size) / 32)))
    # Small boxes last, and names after all boxes, so that nothing covers them.
    order = [i for i in np.argsort(-_areas(boxes)) if np.isfinite(boxes[i]).all()]
    limit = np.array([picture.width - 1, picture.height - 1] * 2)
    clipped = np.clip(boxes, 0, limit)
    for i in order:
        x1, y1, x2, y2 = clipped[i]
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=tuple(colours[i]), width=line)
    for i in order:
        if texts[i]:
            _label(draw, texts[i], clipped[i, :2], tuple(colours[i]), font, picture.size)
    return np.asarray(picture)


def _label(draw: ImageDraw.ImageDraw, text: str, corner: np.ndarray, colour: Colour, font: Any, size: tuple) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 150
    draw.text((x + 3 - left, y + 2 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def prediction_page(
    rows: Sequence[tuple[np.ndarray, Boxes, Boxes]],
    class_names: Mapping[int, str],
    out_png: str | Path,
    score_threshold: float | None = None,
    max_boxes: int = 20,
    columns: int = 2,
) -> Path:
    """Draws predictions beside the truth, an image a cell, `columns` cells a line.

    `rows`: (image, predictions, truth); both are mappings with `boxes` [N, 4] and `labels` [N], predictions also with
    `scores` [N]. Of the predictions those of at least `score_threshold` are drawn, `max_boxes` an image at most. None
    is 0.5, or less until the page has as many predictions as true boxes: focal scores stay low for long.
    """
    score_threshold = _page_threshold(rows) if score_threshold is None else score_threshold
    cells = []
    for image, predictions, truth in rows:
        scores = _as_array(predictions["scores"])
        keep = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= score_threshold][:max_boxes]
        shown = _zoomed(image, _as_array(predictions["boxes"]).reshape(-1, 4)[keep])
        predicted = _named(shown, _as_array(predictions["labels"])[keep], class_names, scores[keep])
        real = _named(_zoomed(image, truth["boxes"]), _as_array(truth["labels"]), class_names)
        cells.append(_beside([predicted, real], [f"found (score from {score_threshold:.2g})", "truth"]))
    return _save(_grid(cells, columns), out_png)


def found_page(rows: Sequence[tuple[str, np.ndarray, Boxes]], out_png: str | Path, columns: int = 3) -> Path:
    """Draws what was found in images without truth: (title, image, boxes with class names as `labels` and with
    `scores`).
    """
    return panel_page([[row] for row in rows], out_png, columns)


def panel_page(rows: Sequence[Sequence[tuple[str, np.ndarray, Boxes]]], out_png: str | Path, columns: int = 1) -> Path:
    """Draws images in several panels: each row has (title, image, boxes with names as `labels`, and with `scores` or
    None).
    """
    cells = []
    for panels in rows:
        shown = [
            draw_boxes(*_zoomed(image, found["boxes"]), found["labels"], found["scores"]) for _, image, found in panels
        ]
        cells.append(
            _beside(
                shown, [title[: picture.shape[1] // 8] for (title, _, _), picture in zip(panels, shown, strict=True)]
            )
        )
    return _save(_grid(cells, columns), out_png)


def _page_threshold(rows: Sequence[tuple[np.ndarray, Boxes, Boxes]]) -> float:
    scores = np.concatenate([np.zeros(0), *(_as_array(predictions["scores"]) for _, predictions, _ in rows)])
    true_boxes = min(sum(len(truth["boxes"]) for _, _, truth in rows), len(scores))
    return min(0.5, float(np.sort(scores)[-true_boxes])) if true_boxes else 0.5


def patch_page(
    rows: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Any, Boxes]], out_png: str | Path, columns: int = 2
) -> Path:
    """Draws what a model that was pre-trained with query patches finds, each patch in a colour of its own.

    `rows`: (image, patches, truth_boxes_xyxy_abs [M, 4], predictions). The M patches are uint8 [h, w, 3], cut from the
    truth boxes; predictions have `boxes` [K, 4], `scores` [K] and, unless box i belongs to patch i, `patches` [K] with
    the patch's index. Left the image with the patches' places, in the middle the boxes found, right the patches.
    """
    cells = []
    for image, patches, truth_boxes, predictions in rows:
        colours = _cycle(len(patches))
        places = _zoomed(image, truth_boxes)
        found = _zoomed(image, predictions["boxes"])
        owners = [int(i) for i in _as_list(predictions.get("patches", range(len(found[1]))))]
        left = draw_boxes(*places, [str(i + 1) for i in range(len(places[1]))], None, colours)
        middle = draw_boxes(*found, [f"{i + 1}:" for i in owners], predictions["scores"], [colours[i] for i in owners])
        strip = _patch_strip(patches, colours, left.shape[0])
        cells.append(_beside([left, middle, strip], ["the patches' places", "found by their queries", "patches"]))
    return _save(_grid(cells, columns), out_png)


def sample_page(
    rows: Sequence[Mapping[str, Any]], class_names: Mapping[int, str], out_png: str | Path, columns: int = 2
) -> Path:
    """Draws what a model is shown in training.

    A row has `image` (with its padding), `boxes` [N, 4], `labels` [N], `patches` (M of uint8 [h, w, 3], cut from the
    boxes; often none) and `title`. Boxes have the names of their classes, or those of patches the patch's number and
    colour.
    """
    cells = []
    for row in rows:
        shown, patches = _zoomed(row["image"], row["boxes"]), row["patches"]
        if len(patches):
            colours = _cycle(len(patches))
            drawn = draw_boxes(*shown, [str(i + 1) for i in range(len(shown[1]))], None, _cycle(len(shown[1])))
            cells.append(_beside([drawn, _patch_strip(patches, colours, drawn.shape[0])], [row["title"], "patches"]))
        else:
            cells.append(_beside([_named(shown, _as_array(row["labels"]), class_names)], [row["title"]]))
    return _save(_grid(cells, columns), out_png)


def _patch_strip(patches: Sequence[np.ndarray], colours: Sequence[Colour], height: int) -> np.ndarray:
    """Patches with coloured frames and numbers below each other, in as few columns as keep them legible."""
    columns = max(1, math.ceil(len(patches) * 56 / height))
    lines = max(1, math.ceil(len(patches) / columns))
    side = min(height // lines, 110)
    strip = Image.new("RGB", (columns * side, height), PAGE)
    for i, patch in enumerate(patches):
        inner = side - 4
        cell = Image.new("RGB", (inner, inner), colours[i])
        cell.paste(Image.fromarray(np.asarray(patch)).resize((inner - 8, inner - 8), Image.Resampling.BILINEAR), (4, 4))
        _label(ImageDraw.Draw(cell), str(i + 1), np.zeros(2), colours[i], _font(13), cell.size)
        strip.paste(cell, (i // lines * side + 2, i % lines * side + 2))
    return np.asarray(strip)


# Page layout


def _zoomed(image: np.ndarray, boxes_xyxy_abs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Image and boxes at a size that is good to look at."""
    image, boxes = np.asarray(image), _as_array(boxes_xyxy_abs).reshape(-1, 4)
    longest = max(image.shape[:2])
    factor = min(max(longest, MIN_SIDE), MAX_SIDE) / longest
    if factor == 1:
        return image, boxes
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)), boxes * factor


def _named(
    shown: tuple[np.ndarray, np.ndarray], labels: np.ndarray, class_names: Mapping[int, str], scores: Any = None
) -> np.ndarray:
    names = [class_names.get(int(label), f"class {int(label)}") for label in labels]
    return draw_boxes(*shown, names, scores, [_colour(int(label)) for label in labels])


def _beside(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> Image.Image:
    """Pictures side by side with a title over each."""
    title = 20
    gap = MARGIN // 2
    size = (sum(p.shape[1] + gap for p in pictures) - gap, max(p.shape[0] for p in pictures) + title)
    cell = Image.new("RGB", size, PAGE)
    draw, x = ImageDraw.Draw(cell), 0
    for picture, text in zip(pictures, titles, strict=True):
        draw.text((x, 2), text, fill=FAINT, font=_font(13))
        cell.paste(Image.fromarray(picture), (x, title))
        x += picture.shape[1] + gap
    return cell


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    if not cells:
        return _beside([np.full((40, MIN_SIDE, 3), 255, np.uint8)], ["no image to show"])
    columns = min(columns, len(cells))
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    widths = [max(line[c].width for line in lines if c < len(line)) for c in range(columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    page = Image.new("RGB", (sum(widths) + 2 * MARGIN * columns, sum(heights) + MARGIN * (len(lines) + 1)), PAGE)
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


def _texts(count: int, labels: Any, scores: Any) -> list[str]:
    names = [""] * count if labels is None else [str(label) for label in _as_list(labels)]
    numbers = [""] * count if scores is None else [f"{score:.2f}" for score in _as_list(scores)]
    return [" ".join(filter(None, pair)) for pair in zip(names, numbers, strict=True)]


def _colour(label: int | str) -> Colour:
    number = label if isinstance(label, int) else sum(map(ord, label))
    return PALETTE[(number - 1) % len(PALETTE)]


def _cycle(count: int) -> list[Colour]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _as_array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)


def _as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
