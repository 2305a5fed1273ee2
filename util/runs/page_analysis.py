"""Tables of a run's page about its last evaluation: AP per class, and what is confused, found and missed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.plots.curves import plot_precision_recall
from util.runs.folder import ANALYSIS, PRECISION_RECALL, read_json_object

MAX_CONFUSION_CLASSES = 15  # rows and columns of the table; other classes are merged
MAX_CONFUSIONS = 10
OTHER, NOTHING = "other classes", "no object"

ClassId = int | None
Confusions = Mapping[tuple[ClassId, ClassId], int]


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion table.

    count: of objects. fraction: of all in its row, which the color shows. is_right: on the diagonal.
    """

    count: int
    fraction: float
    is_right: bool


@dataclass(frozen=True)
class ConfusionTable:
    """Rows are classes of objects, columns what they were detected as; the last column: not at all.

    rows: (class, its cells). The last one, "no object", has detections of something that is not there.
    """

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Analysis:
    """What the page shows of analysis.json. See `datasets.evaluators.analysis` for how it is made."""

    threshold: float
    precision: float
    recall: float
    table: ConfusionTable
    most_frequent: list[tuple[str, str, int]]  # (class of the object, detected as, count)
    images: dict[str, list[str]]  # best_images.png, worst_images.png -> a caption per image


def read_analysis(folder: Path) -> Analysis | None:
    """Return what the folder's last evaluation wrote, None without one."""
    record = read_json_object(folder / ANALYSIS)
    if not record:
        return None
    names = {int(key): name for key, name in record["class_names"].items()}
    confusions = {(truth, found): count for truth, found, count in record["confusions"]}
    return Analysis(
        threshold=record["threshold"],
        precision=record["precision"],
        recall=record["recall"],
        table=confusion_table(confusions, names),
        most_frequent=_most_frequent(confusions, names),
        images={
            f"{key}.png": [_caption(image) for image in record[key]]
            for key in ("best_images", "worst_images")
        },
    )


def draw_precision_recall(folder: Path) -> None:
    """Draw precision_recall.png from analysis.json, if there is one.

    Raises:
        UserError: matplotlib is missing, or the file can't be written.
    """
    record = read_json_object(folder / ANALYSIS)
    if record:
        curves, names = record["precision_recall"], record["class_names"]
        plot_precision_recall(curves, names, folder / PRECISION_RECALL)


def confusion_table(
    confusions: Confusions, names: Mapping[int, str], limit: int = MAX_CONFUSION_CLASSES
) -> ConfusionTable:
    """Return a table of the classes with the most objects; the others are merged into one row and column."""
    objects: Counter[ClassId] = Counter()
    for (truth, _), count in confusions.items():
        objects[truth] += count
    # Also classes that are only predicted: their column would be missing.
    found = {label for pair in confusions for label in pair if label is not None}
    order = sorted(found, key=lambda label: (-objects[label], label))
    shown = sorted(order if len(order) <= limit + 1 else order[:limit])

    places: dict[ClassId, int] = {label: i for i, label in enumerate(shown)}
    titles = [names.get(label, f"class {label}") for label in shown]
    if len(shown) < len(order):
        places |= dict.fromkeys(order[limit:], len(titles))
        titles.append(OTHER)
    places[None] = len(titles)

    counts = [[0] * (len(titles) + 1) for _ in range(len(titles) + 1)]
    for (truth, label), count in confusions.items():
        counts[places[truth]][places[label]] += count
    rows = [
        (title, [_cell(row, j, is_right=i == j < len(shown)) for j in range(len(row))])
        for i, (title, row) in enumerate(zip([*titles, NOTHING], counts, strict=True))
    ]
    return ConfusionTable([*titles, "missed"], rows)


def _cell(row: Sequence[int], column: int, is_right: bool) -> Cell:
    return Cell(row[column], row[column] / max(sum(row), 1), is_right)


def _most_frequent(confusions: Confusions, names: Mapping[int, str]) -> list[tuple[str, str, int]]:
    """Return the most frequent pairs of different classes."""
    pairs = [
        (names.get(truth, f"class {truth}"), names.get(found, f"class {found}"), count)
        for (truth, found), count in confusions.items()
        if truth is not None and found is not None and truth != found
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:MAX_CONFUSIONS]


def _caption(image: Mapping[str, Any]) -> str:
    return f"{image['file_name']}: {image['found']} found, {image['missed']} missed, {image['wrong']} wrong"


def class_bars(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return {"name", "objects", "metrics": (name, value) each} of each class, best first.

    Args:
        rows: of per_class.json.
        metrics: columns to show, if the rows have them. The first one decides the order.
    """
    shown = [name for name in metrics if rows and name in rows[0]]
    bars = [
        {
            "name": row["name"],
            "objects": row.get("objects", row.get("segments")),
            "metrics": [(name, row[name]) for name in shown],
        }
        for row in rows
        if all(isinstance(row[name], int | float) for name in shown)
    ]
    return sorted(bars, key=lambda bar: [-value for _, value in bar["metrics"]])
