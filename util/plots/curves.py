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
MAX_MARKED_POINTS = 20  # a longer training curve has no markers

Points = tuple[list[int], list[float]]  # epochs, values


def curve(entries: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> Points:
    """Return the epochs, counted from 1, and finite values of a key. Epochs without one are skipped.

    Args:
        entries: Lines of a log.
        index: Item of a value that is a list.
    """
    epochs, values = [], []
    for number, entry in enumerate(entries):
        value = entry.get(key)
        if index is not None and value is not None:
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
        fields: Names in the published log without `train_` or `test_`. `mAP` is AP and AP50 of `test_coco_eval_bbox`. A
            field that no run has logged is skipped.
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
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(4.6 * max(len(fields), 1), 3.7), layout="constrained", dpi=110)
    figure_canvas(figure)

    for number, field in enumerate(fields, start=1):
        axes = figure.add_subplot(1, len(fields), number)
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
                markersize=3.5,
            )


def _series(entries: Sequence[Mapping], field: str) -> list[tuple[str, str, Points]]:
    """Return (label, line style, points) of each curve that a panel shows of one run."""
    if field == "mAP":
        series = [
            ("AP", "-", curve(entries, "test_coco_eval_bbox", 0)),
            ("AP50", "--", curve(entries, "test_coco_eval_bbox", 1)),
        ]
    elif field in BBOX_STATS:
        series = [("", "-", curve(entries, "test_coco_eval_bbox", BBOX_STATS.index(field)))]
    else:
        series = [
            ("training", "-", curve(entries, f"train_{field}")),
            ("evaluation", "--", curve(entries, f"test_{field}")),
        ]
    return [(label, style, points) for label, style, points in series if points[0]]


def _style_axes(axes: Any, field: str) -> None:
    is_ap = field == "mAP" or field in BBOX_STATS
    axes.set_title({"mAP": "average precision"}.get(field, field.replace("_", " ")), fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0, top=1 if is_ap else None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    set_fonts(axes.legend(fontsize=8, frameon=False).get_texts())


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
