"""Curves of a study, and the same test images as each row of its tables sees them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.images.image_folder import open_image
from util.files import write_atomically
from util.plots.boxes import PALETTE
from util.plots.curves import figure_classes
from util.plots.pages import panel_page

SHOWN = 8  # test images on a page of predictions
Curves = Mapping[str, Sequence[Sequence[tuple[int, float]]]]  # row -> for each seed (epoch, AP)


def draw_curves(curves: Curves, path: Path, title: str) -> Path:
    """Mean over seeds as a line, from the smallest to the largest as a band; only epochs that all of a row's runs have.

    Raises:
        UserError: matplotlib is missing.
    """
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    figure_canvas(figure)
    axes = figure.add_subplot()
    for number, (name, runs) in enumerate(curves.items()):
        epochs, values = common_epochs(runs)
        colour = np.divide(PALETTE[number % len(PALETTE)], 255)
        axes.plot(epochs, values.mean(0), marker="o", markersize=3.5, color=colour, label=f"{name} ({len(runs)} seeds)")
        if len(runs) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch of fine-tuning", ylabel="AP on test", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return write_atomically(path, lambda file: figure.savefig(file, format="png"))


def common_epochs(runs: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], np.ndarray]:
    """(epochs [E] that all runs have, values [runs, E])"""
    found = [dict(run) for run in runs]
    epochs = sorted(set.intersection(*(set(run) for run in found)))
    return epochs, np.array([[run[epoch] for epoch in epochs] for run in found]).reshape(len(found), len(epochs))


def draw_predictions(runs: Mapping[str, Path], data: Path, path: Path) -> Path:
    """One line a test image: the truth, then the best boxes of each run, as many as there are true ones.

    runs: row -> folder of a fine-tuning, with its results.json on the test images. data: of the study.
    """
    truth = json.loads((data / "annotations" / "test.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    true_boxes = _by_image([box for box in truth["annotations"] if not box["iscrowd"]])
    labelled = [image for image in truth["images"] if true_boxes.get(image["id"])]
    chosen = [
        labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, min(SHOWN, len(labelled))).round().astype(int))
    ]
    found = {
        name: _by_image(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        for name, folder in runs.items()
    }
    rows = []
    for image in chosen:
        pixels = np.asarray(open_image(str(data / "labelled" / image["file_name"])))
        true = true_boxes[image["id"]]
        panels = [("truth", pixels, _boxes(true, names))]
        for name, results in found.items():
            best = sorted(results.get(image["id"], []), key=lambda box: -box["score"])[: len(true)]
            panels.append((name, pixels, _boxes(best, names)))
        rows.append(panels)
    return panel_page(rows, path)


def _by_image(boxes: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for box in boxes:
        found.setdefault(box["image_id"], []).append(box)
    return found


def _boxes(boxes: list[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    corners = np.array([box["bbox"] for box in boxes], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    scores = [box["score"] for box in boxes] if boxes and "score" in boxes[0] else None
    return {"boxes": corners, "labels": [names.get(box["category_id"], "?") for box in boxes], "scores": scores}
