"""Plot the curves of runs from their logs, with matplotlib (an extra, imported where it is used)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.coco import BBOX_METRICS
from util.errors import UserError
from util.files import write_atomically
from util.plots.boxes import cycle_colors
from util.plots.fonts import escape, legible, set_fonts
from util.runs.log import read_log

BBOX_STATS = BBOX_METRICS[:6]  # AP, AP50, AP75 and AP by size, in the log's order
DEFAULT_FIELDS = ("loss", "class_error", "mAP")
AP_KEYS = {"mAP": "test_coco_eval_bbox", "mask AP": "test_coco_eval_masks"}
MAX_COLUMNS = 3  # panels next to each other
# Fields whose values are between 0 and 1 -> title of their panel.
FRACTIONS = {
    "mAP": "average precision",
    "mask AP": "average precision of masks",
    "PQ": "panoptic quality",
    "object_AP": "class-agnostic AP",
    "object_AR100": "class-agnostic recall, 100 boxes per image",
}
MAX_NAMED_CLASSES = 10
MAX_MARKED_POINTS = 20  # a longer training curve has no markers

Points = tuple[list[int], list[float]]  # epochs, values


def curve(entries: Sequence[Mapping[str, Any]], key: str, index: int | str | None = None) -> Points:
    """Return the epochs, counted from 1, and finite values of a key. Epochs without one are skipped.

    Args:
        entries: Lines of a log.
        index: Item of a value that is a list, or key of a value that is a dict.
    """
    epochs, values = [], []
    for number, entry in enumerate(entries):
        value = entry.get(key)
        if isinstance(index, str):
            value = (value or {}).get(index)
        elif index is not None and value is not None:
            value = value[index] if index < len(value) else None  # VOC has no AP by size
        if value is not None and math.isfinite(value):
            epochs.append(entry.get("epoch", number) + 1)
            values.append(float(value))
    return epochs, values


def plot_logs(
    logs: str | Path | Iterable[str | Path],
    fields: Sequence[str] = DEFAULT_FIELDS,
    out_png: str | Path = "curves.png",
    ewm_col: float = 0,
) -> Path:
    """Plot fields of runs, one panel per field: training solid, evaluation dashed.

    Args:
        logs: Output folders of runs, or log.txt files.
        fields: Names in the published log without `train_` or `test_`. `mAP` is AP and AP50 of boxes, `mask AP` those
            of masks, `PQ` panoptic quality. A field that no run has logged is skipped.
        out_png: Image to write.
        ewm_col: Smooth the curves as DETR's `plot_logs` does, see `smooth`.
    """
    paths = [Path(path) for path in ([logs] if isinstance(logs, str | Path) else logs)]
    names = [path.name if path.is_dir() else path.parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    return _draw_curves(runs, fields, out_png, ewm_col)


def smooth(values: Iterable[float], center_of_mass: float) -> list[float]:
    """Return exponentially weighted means: the weight of an earlier value decays by c / (1 + c) per step.

    They equal pandas' `ewm(com=c).mean()`. 0 changes nothing.
    """
    decay = center_of_mass / (1 + center_of_mass)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = value + decay * total, 1 + decay * weight
        means.append(total / weight)
    return means


def plot_curves(
    runs: Mapping[str, str | Path],
    out_png: str | Path,
    fields: Sequence[str] = ("loss", "AP", "AP50"),
) -> Path:
    """Plot several runs into the same panels, one color per run.

    Args:
        runs: Name -> output folder or log.txt.
        out_png: Image to write.
        fields: As in `plot_logs`, or names in `BBOX_STATS`.
    """
    logs = {name: read_log(path) for name, path in runs.items()}
    return _draw_curves(logs, fields, out_png)


def _draw_curves(
    runs: Mapping[str, list[dict]],
    fields: Sequence[str],
    out_png: str | Path,
    center_of_mass: float = 0,
) -> Path:
    fields = [
        field for field in fields if any(_series(entries, field) for entries in runs.values())
    ]
    columns = max(min(len(fields), MAX_COLUMNS), 1)
    lines = max(math.ceil(len(fields) / columns), 1)
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(4.6 * columns, 3.7 * lines), layout="constrained", dpi=110)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)  # inches
    figure_canvas(figure)

    for number, field in enumerate(fields, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _draw_panel(axes, runs, field, center_of_mass)
        _style_axes(axes, field)
    if not fields:
        figure.text(0.5, 0.5, "no epoch has been logged yet", ha="center")
    return write_atomically(out_png, lambda file: figure.savefig(file, format="png"))


def _draw_panel(
    axes: Any, runs: Mapping[str, list[dict]], field: str, center_of_mass: float
) -> None:
    """Draw one field of all runs."""
    for color, (name, entries) in zip(cycle_colors(len(runs)), runs.items(), strict=True):
        for label, style, (epochs, values) in _series(entries, field):
            if len(runs) > 1:
                legend = f"{name}, {label}" if label else name
            else:
                legend = label or name
            # Evaluations may be few and far between.
            has_markers = style == "--" or len(epochs) < MAX_MARKED_POINTS
            axes.plot(
                epochs,
                smooth(values, center_of_mass),
                style,
                color=np.divide(color, 255),
                label=escape(legible(legend)),
                marker="o" if has_markers else None,
                # Hollow, so that evaluation can be told from training after one epoch, which has no lines.
                markerfacecolor="white" if style == "--" else None,
                markersize=3.5,
            )


def _series(entries: Sequence[Mapping], field: str) -> list[tuple[str, str, Points]]:
    """Return (label, line style, points) of each curve that a panel shows of one run."""
    if field in AP_KEYS:
        series = [
            ("AP", "-", curve(entries, AP_KEYS[field], 0)),
            ("AP50", "--", curve(entries, AP_KEYS[field], 1)),
        ]
    elif field == "PQ":
        keys = {"all": "test_PQ_all", "things": "test_PQ_th", "stuff": "test_PQ_st"}
        series = [(name, "-", curve(entries, key, "pq")) for name, key in keys.items()]
    elif field in BBOX_STATS:
        series = [("", "-", curve(entries, "test_coco_eval_bbox", BBOX_STATS.index(field)))]
    else:
        series = [
            ("training", "-", curve(entries, f"train_{field}")),
            ("evaluation", "--", curve(entries, f"test_{field}")),
        ]
    return [(label, style, points) for label, style, points in series if points[0]]


def _style_axes(axes: Any, field: str) -> None:
    is_ap = field in FRACTIONS or field in BBOX_STATS
    axes.set_title(FRACTIONS.get(field, field.replace("_", " ")), fontsize=11)
    axes.set_xlabel("epoch")
    # Above the highest value, whose marker would be cut: matplotlib's margin is small if all values are alike.
    axes.set_ylim(bottom=0, top=1.02 if is_ap else 1.05 * axes.get_ylim()[1])
    left, right = axes.get_xlim()
    if right - left < 1:  # a single epoch, whose ticks would be fractions
        axes.set_xlim(left - 1, right + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    set_fonts(axes.legend(fontsize=8, frameon=False).get_texts())


def plot_precision_recall(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    names: Mapping[str, str],
    out_png: str | Path,
) -> Path:
    """Plot precision over recall at each IoU threshold: the mean over all classes, above one thin line per class.

    Args:
        curves: IoU threshold -> class id -> precision at equally spaced recalls from 0 to 1.
        names: Class id -> name. Up to ten classes get a color and their name.
        out_png: Image to write.
    """
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(5.6 * max(len(curves), 1), 4.4), layout="constrained", dpi=110)
    figure_canvas(figure)
    for number, (threshold, of_class) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), number)
        _draw_precision_recall(axes, of_class, names)
        axes.set_title(f"IoU {threshold}", fontsize=11)
    return write_atomically(out_png, lambda file: figure.savefig(file, format="png"))


def _draw_precision_recall(
    axes: Any, of_class: Mapping[str, Sequence[float]], names: Mapping[str, str]
) -> None:
    colors = cycle_colors(len(of_class))
    are_named = len(of_class) <= MAX_NAMED_CLASSES
    for color, (key, precision) in zip(colors, of_class.items(), strict=True):
        axes.plot(
            np.linspace(0, 1, len(precision)),
            precision,
            linewidth=1.2,
            color=np.divide(color, 255) if are_named else "0.75",
            label=escape(legible(names.get(key, key))) if are_named else None,
        )
    if len(of_class) > 1:
        mean = np.mean(list(of_class.values()), axis=0)
        recall = np.linspace(0, 1, len(mean))
        axes.plot(recall, mean, color="black", linewidth=2.2, label="mean of all classes")
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        set_fonts(axes.legend(fontsize=8, frameon=False, loc="best").get_texts())


def figure_classes() -> tuple[type, type]:
    """Return matplotlib's Figure and the canvas that makes it a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    # Without pyplot: a run needs no display, and does not change the backend of a program that plots.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plotting needs matplotlib: pip install matplotlib (in requirements-extras.txt)"
        ) from None
    return Figure, FigureCanvasAgg
