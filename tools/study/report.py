"""The report of a study in Markdown: findings, tables over seeds, curves, and how it was made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets.evaluators.proposals import SWAPPED
from tools.compare_runs import markdown
from tools.study.folder import RESULTS
from tools.study.presets import ABLATIONS, NONE
from tools.study.results import (
    Difference,
    paired_difference,
    read_evaluations,
    read_steps,
    read_study,
)
from util.errors import UserError
from util.files import write_atomically, write_text
from util.logger import format_seconds, log
from util.plots.boxes import cycle_colors
from util.plots.curves import figure_classes
from util.runs.folder import read_record

MARK = (
    "<!-- Written by tools/transfer_study.py. Put your own text into {notes} beside this file. -->"
)
HOW_TO_READ = """## How to read it

- AP is COCO's, in percent, of the images evaluated on, after the last step. ± behind a mean is the standard
  deviation over seeds.
- ± behind a difference is the 95 % interval by Student's t of the differences seed by seed: both runs of a seed see the
  same images in the same order. An interval that contains 0 shows no difference; it does not show that there is none.
  Of many intervals one in twenty excludes 0 by chance.
- `7 (2)` is fine-tuning seed 7 from pre-training seed 2. Where fine-tunings share one of several pre-trainings, the
  interval is over the means of the pre-trainings. With one pre-training it does not show how much pre-training varies.
- The images of a fraction of the labels were drawn once; another draw may differ."""
RECALL = """In percent; AR10 is the recall of the best ten boxes of an image, over IoU 0.50 to 0.95.
`_swapped`: with the boxes of another image. Only what is above it was found by looking at the image. Random query patch
and Siamese learn to answer for patches, and here none are given."""


def write_report(folder: Path, output: Path) -> None:
    """Writes the report, every evaluation as CSV beside it, and curves into a folder beside it.

    Raises:
        UserError: `folder` is no study, or `output` exists and is not such a report.
    """
    study = read_study(folder)
    notes = output.with_suffix(".notes.md")
    mark = MARK.format(notes=notes.name)
    if output.exists() and not output.read_text(encoding="utf-8", errors="replace").startswith(
        MARK[:40]
    ):
        raise UserError(
            f"--output {output} exists and is not a report of this tool: choose another name"
        )
    steps = read_steps(folder, study)
    evaluations = read_evaluations(folder, steps)
    write_text(output.with_suffix(".csv"), evaluations.to_csv(index=False))
    evaluations["AP"], evaluations["AP50"] = 100 * evaluations["AP"], 100 * evaluations["AP50"]
    finetunings = steps[steps["kind"] == "finetune"].sort_values(
        ["detector", "fraction"], ascending=[True, False]
    )
    cells = [
        Cell(detector, fraction, planned, evaluations)
        for (detector, fraction), planned in finetunings.groupby(
            ["detector", "fraction"], sort=False
        )
    ]
    parts = [
        f"{mark}\n\n# Transfer study",
        *_findings(steps, cells),
        *([notes.read_text(encoding="utf-8").strip()] if notes.exists() else []),
        *(part for cell in cells for part in _cell(cell, output)),
        *_recall(folder, steps),
        HOW_TO_READ,
        *_made_with(study, steps),
    ]
    write_text(output, "\n\n".join(parts) + "\n")
    log.info("%s", output)


class Cell:
    """One table: a detector on a fraction of the labels.

    ap, ap50: percent after the last step, [seeds x rows]. seeds: of the pre-trainings, [seeds x rows].
    """

    def __init__(
        self, detector: str, fraction: float, planned: pd.DataFrame, evaluations: pd.DataFrame
    ) -> None:
        self.detector, self.fraction, self.rows = detector, fraction, list(planned["row"].unique())
        self.title = f"{detector}, {100 * fraction:g} % of the labels"
        own = (evaluations["detector"] == detector) & (evaluations["fraction"] == fraction)
        self.evaluations = evaluations[own]
        self.seeds = planned.pivot(index="seed", columns="row", values="pretrain_seed")
        final = self.evaluations.drop_duplicates(["row", "seed"], keep="last")
        self.ap, self.ap50 = (
            final.pivot(index="seed", columns="row", values=name).reindex(
                self.seeds.index, columns=self.rows
            )
            for name in ("AP", "AP50")
        )
        self.planned = planned.groupby("row")["seed"].agg(sorted)

    def difference(
        self, row: str, other: str = NONE, values: pd.DataFrame | None = None
    ) -> Difference:
        values = self.ap if values is None else values
        baseline = values[other] if other in values else pd.Series(np.nan, values.index)
        return paired_difference(values[row], baseline, self.seeds[row])

    def by_seed(self, row: str) -> str:
        """`7 (2): 5.1`: fine-tuning seed 7 from pre-training seed 2. `-`: not finished."""
        cells = []
        for seed in self.planned[row]:
            origin, ap = self.seeds.loc[seed, row], self.ap.loc[seed, row]
            name = f"{seed}" if pd.isna(origin) else f"{seed} ({origin})"
            cells.append(f"{name}: -" if pd.isna(ap) else f"{name}: {ap:.1f}")
        return ", ".join(cells)


def _findings(steps: pd.DataFrame, cells: list[Cell]) -> Iterator[str]:
    """The AP of each row against no pre-training, by what can be said of it."""
    lines = []
    for cell in cells:
        found: dict[str, list[str]] = {}
        for row in cell.rows:
            if row != NONE:
                difference = cell.difference(row)
                paired = f", {difference.count} {difference.what}" if difference.count > 1 else ""
                found.setdefault(difference.verdict, []).append(f"`{row}` ({difference}{paired})")
        text = "; ".join(f"{verdict}: {', '.join(rows)}" for verdict, rows in sorted(found.items()))
        lines.append(f"- {cell.title}: {text}" if text else f"- {cell.title}: only `{NONE}`")
    yield (
        f"AP after pre-training against the same fine-tuning without it (`{NONE}`):\n\n"
        + "\n".join(lines)
    )
    left = int((~steps["done"]).sum())
    if left:
        yield f"**Not finished: {left} of {len(steps)} runs are left.**"
    codes = (
        steps.loc[steps["done"] & (steps["kind"] == "finetune"), "code"].unique()
        if "code" in steps
        else []
    )
    if len(codes) > 1:
        yield f"**The fine-tunings were made with {len(codes)} versions of the code: {', '.join(codes)}.**"


def _cell(cell: Cell, output: Path) -> Iterator[str]:
    yield f"## {cell.title}"
    table = []
    for row in cell.rows:
        compared = (
            [cell.difference(row, values=values) for values in (cell.ap, cell.ap50)]
            if row != NONE
            else ["", ""]
        )
        spreads = [_spread(values[row]) for values in (cell.ap, cell.ap50)]
        table.append([row, *spreads, *map(str, compared), cell.by_seed(row)])
    yield markdown(
        ["pre-training", "AP", "AP50", f"AP - {NONE}", f"AP50 - {NONE}", "AP by seed"], table
    )
    ablations = [
        [row, ABLATIONS[row].meaning, other, str(difference), difference.verdict]
        for row in cell.rows
        if row in ABLATIONS
        for other in (ABLATIONS[row].pretext, ABLATIONS[row].against)
        if other in cell.rows
        for difference in [cell.difference(row, other)]
    ]
    if ablations:
        yield markdown(["ablation", "what it changes", "against", "AP", "verdict"], ablations)
    if len(cell.evaluations):
        path = output.parent / f"{output.stem}_curves" / f"{cell.detector}_{cell.fraction:g}.png"
        try:
            draw_curves(cell.evaluations, path, cell.title)
            yield f"![AP by epoch, {cell.title}]({path.relative_to(output.parent).as_posix()})"
        except UserError as error:
            log.warning("no curves: %s", error)


def _spread(values: pd.Series) -> str:
    values = values.dropna()
    mean = f"{values.mean():.1f}" if len(values) else "-"
    return f"{mean} ± {values.std():.1f}" if len(values) > 1 else mean


def draw_curves(evaluations: pd.DataFrame, path: Path, title: str) -> None:
    """Mean over seeds as a line, from the lowest to the highest as a band; only epochs that all seeds of a row have.

    Raises:
        UserError: matplotlib is missing.
    """
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    figure_canvas(figure)
    axes = figure.add_subplot()
    rows = evaluations.groupby("row", sort=False)
    for colour, (row, runs) in zip(np.divide(cycle_colors(len(rows)), 255), rows, strict=True):
        curves = runs.pivot(index="epoch", columns="seed", values="AP").dropna()
        label = f"{row} ({curves.shape[1]} seeds)"
        axes.plot(
            curves.index, curves.mean(axis=1), marker="o", markersize=3.5, color=colour, label=label
        )
        axes.fill_between(
            curves.index,
            curves.min(axis=1),
            curves.max(axis=1),
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axes.set(xlabel="epoch of fine-tuning", ylabel="AP", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _recall(folder: Path, steps: pd.DataFrame) -> Iterator[str]:
    done = steps[steps["done"] & (steps["kind"] == "recall")].sort_values("detector", kind="stable")
    if len(done):
        keys = [key for name in ("AP50", "AR10", "AR100") for key in (name, SWAPPED[name])]
        rows = []
        for step in done.to_dict("records"):
            found = read_record(folder / step["name"] / RESULTS["recall"])
            numbers = [f"{100 * found[key]:.2f}" if key in found else "" for key in keys]
            rows.append([step["detector"], step["row"], str(step["pretrain_seed"]), *numbers])
        yield "## Class-agnostic boxes, right after pre-training"
        yield markdown(["detector", "pre-training", "seed", *keys], rows)
        yield RECALL


def _made_with(study: dict[str, Any], steps: pd.DataFrame) -> Iterator[str]:
    data, last = study["data"], study["starts"][-1]
    yield f"## How it was made\n\nPreset: {study['title']}."
    model = [
        [name, str(value)]
        for name, value in study["settings"].items()
        if name.startswith("--") and value
    ]
    yield markdown(["setting", "value"], model)
    parts = [
        [part, str(data[part]["images"]), str(data[part]["boxes"])]
        for part in ("train", "val", "test")
    ]
    yield markdown(
        ["images", "number", "boxes"],
        [*parts, ["unlabelled", str(data["unlabelled"]["images"]), ""]],
    )
    commands = dict.fromkeys([data["command"], *(start["command"] for start in study["starts"])])
    yield "\n".join(["```text", *commands, "```"])
    versions = ", ".join(
        f"{name} {last[name]}"
        for name in ("python", "torch", "torchvision", "timm")
        if name in last
    )
    yield f"GPU: {last['gpu']}; {last['cores']} cores, {last['jobs']} runs at once; {versions}; code {last['code']}."
    done = steps[steps["done"]]
    times = (
        done.groupby("kind", sort=False)["seconds"].agg(["count", "sum", "mean"])
        if len(done)
        else pd.DataFrame()
    )
    rows = [
        [kind, str(int(n)), format_seconds(all_of), format_seconds(one)]
        for kind, n, all_of, one in times.itertuples()
    ]
    yield markdown(["runs", "finished", "wall time in all", "mean"], rows)
