"""AP of each class as text for the log."""

from collections.abc import Sequence
from typing import Any

MAX_CLASSES = 100  # of more classes, only the best and the worst are shown
EXTREMES = 5  # number of best, and of worst, classes
LINE_WIDTH = 140  # characters


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of AP, AP50 and number of objects per class.

    The classes are in the given order (by id), as many per line as fit. Of more than MAX_CLASSES classes, only those
    with the highest and lowest AP are shown.

    Args:
        rows: "per_class" of an evaluator's summary.
    """
    if not rows:
        return "no class has objects"
    if len(rows) <= MAX_CLASSES:
        return "\n".join(["AP, AP50 and objects of each class:", *_lines(rows)])

    order = sorted(rows, key=lambda row: -row["AP"])
    extremes = order[:EXTREMES] + order[-EXTREMES:]
    return "\n".join([f"AP of {len(rows)} classes, best and worst:", *_lines(extremes)])


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    name_width = max(len(_name(row)) for row in rows)
    cells = [
        f"{_name(row):{name_width}}  {row['AP']:.3f}  {row['AP50']:.3f}  {row['objects']:>6}"
        for row in rows
    ]
    # Cells are separated by 4 spaces; a line starts with 2.
    columns = max(1, (LINE_WIDTH + 2) // (len(cells[0]) + 4))
    return ["  " + "    ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]


def _name(row: dict[str, Any]) -> str:
    return f"{row['id']:>3} {row['name'][:24]}"
