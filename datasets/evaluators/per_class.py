"""Metrics of each class as text for the log."""

from collections.abc import Sequence
from typing import Any

MAX_CLASSES = 100  # of more classes, only the best and the worst are shown
EXTREMES = 5  # number of best, and of worst, classes
LINE_WIDTH = 140  # characters
METRICS = ("AP", "AP50", "mask AP", "PQ", "SQ", "RQ")  # columns, if the rows have them


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the METRICS and the number of objects (or segments) per class.

    The classes are in the given order (by id), as many per line as fit. Of more than MAX_CLASSES classes, only those
    with the highest and lowest value of the first metric are shown.

    Args:
        rows: "per_class" or "panoptic_per_class" of an evaluator's summary.
    """
    if not rows:
        return "no class has objects"
    metrics = [name for name in METRICS if name in rows[0]]
    count = "objects" if "objects" in rows[0] else "segments"
    if len(rows) <= MAX_CLASSES:
        title = f"{', '.join(metrics)} and {count} of each class:"
        return "\n".join([title, *_lines(rows, metrics, count)])

    order = sorted(rows, key=lambda row: -row[metrics[0]])
    extremes = order[:EXTREMES] + order[-EXTREMES:]
    title = f"{metrics[0]} of {len(rows)} classes, best and worst:"
    return "\n".join([title, *_lines(extremes, metrics, count)])


def _lines(rows: Sequence[dict[str, Any]], metrics: Sequence[str], count: str) -> list[str]:
    name_width = max(len(_name(row)) for row in rows)
    cells = []
    for row in rows:
        values = "  ".join(f"{row[name]:.3f}" for name in metrics)
        cells.append(f"{_name(row):{name_width}}  {values}  {row[count]:>6}")
    # Cells are separated by 4 spaces; a line starts with 2.
    columns = max(1, (LINE_WIDTH + 2) // (len(cells[0]) + 4))
    return ["  " + "    ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]


def _name(row: dict[str, Any]) -> str:
    return f"{row['id']:>3} {row['name'][:24]}"
