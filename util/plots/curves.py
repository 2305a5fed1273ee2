"""Curves of a run's log, drawn by matplotlib (an extra, imported where used)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.coco import BBOX_METRICS
from util.errors import UserError
from util.files import write_atomically
from util.plots.boxes import cycle_colors
from util.runs.log import read_log

BBOX_STATS = BBOX_METRICS[:6]
DEFAULT_FIELDS = ("loss", "class_error", "mAP")


def curve(
    entries: Sequence[Mapping[str, Any]], key: str, index: int | None = None
) -> tuple[list[int], list[float]]:
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
    runs: Mapping[str, str | Path],
    out_png: str | Path,
    fields: Sequence[str] = ("loss", "AP", "AP50"),
) -> Path:
    """Overlays runs (name -> folder or log.txt), a color each; `fields` as in `plot_logs`, or one of `BBOX_STATS`."""
    return _draw_curves({name: read_log(path) for name, path in runs.items()}, fields, out_png)


def _draw_curves(
    runs: Mapping[str, list[dict]], fields: Sequence[str], out_png: str | Path
) -> Path:
    fields = [
        field for field in fields if any(_series(entries, field) for entries in runs.values())
    ]
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(4.6 * max(len(fields), 1), 3.7), layout="constrained", dpi=110)
    figure_canvas(figure)
    for number, field in enumerate(fields):
        axes = figure.add_subplot(1, len(fields), number + 1)
        for color, (name, entries) in zip(cycle_colors(len(runs)), runs.items(), strict=True):
            for label, style, (xs, ys) in _series(entries, field):
                shown = f"{name}, {label}" if len(runs) > 1 and label else label or name
                marker = "o" if style == "--" or len(xs) < 20 else None
                axes.plot(
                    xs,
                    ys,
                    style,
                    color=np.divide(color, 255),
                    label=shown,
                    marker=marker,
                    markersize=3.5,
                )
        _dress(axes, field)
    if not fields:
        figure.text(0.5, 0.5, "no epoch has been logged yet", ha="center")
    return write_atomically(out_png, lambda file: figure.savefig(file, format="png"))


def _series(
    entries: Sequence[Mapping], field: str
) -> list[tuple[str, str, tuple[list[int], list[float]]]]:
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
        raise UserError(
            "drawing needs matplotlib: pip install matplotlib (in requirements-extras.txt)"
        ) from None
    return Figure, FigureCanvasAgg
