"""AP of each class as text for the log."""

from collections.abc import Sequence
from typing import Any

SHOWN = 100  # of more classes only the best and the worst are shown
EXTREMES = 5
WIDTH = 140  # of a line


def class_table(rows: Sequence[dict[str, Any]]) -> str:
    """rows: "per_class" of an evaluator's summary. As many a line as fit, by id; of very many the best and worst, by
    AP.
    """
    if not rows:
        return "no class has objects"
    if len(rows) > SHOWN:
        order = sorted(rows, key=lambda row: -row["AP"])
        return "\n".join(
            [
                f"AP of {len(rows)} classes, best and worst:",
                *_lines(order[:EXTREMES] + order[-EXTREMES:]),
            ]
        )
    return "\n".join(["AP, AP50 and objects of each class:", *_lines(rows)])


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(_name(row)) for row in rows)
    cells = [
        f"{_name(row):{width}}  {row['AP']:.3f}  {row['AP50']:.3f}  {row['objects']:>6}"
        for row in rows
    ]
    columns = max(1, (WIDTH + 2) // (len(cells[0]) + 4))
    return ["  " + "    ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]


def _name(row: dict[str, Any]) -> str:
    return f"{row['id']:>3} {row['name'][:24]}"
