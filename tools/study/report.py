"""The report of a study in Markdown: findings, tables over seeds, curves, and how it was made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets.evaluators.proposals import SWAPPED
from tools.study.folder import RESULT_FILES
from tools.study.presets import ABLATIONS, NO_PRETRAINING
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
from util.markdown import markdown_table
from util.plots.boxes import cycle_colors
from util.plots.curves import figure_classes
from util.runs.folder import read_json_object

# Every report starts with it. A file that does not is the user's, and is never replaced.
REPORT_MARKER = "<!-- Written by tools/transfer_study.py."
NOTES_HINT = "Put your own text into {notes} next to this file. -->"
HOW_TO_READ = """## How to read it

- AP is COCO AP in percent on the evaluated split, after the last step. ± after a mean is the standard deviation over
  seeds.
- ± after a difference is the 95 % interval (Student's t) of the differences by seed. Both runs of a seed see the same
  images in the same order. An interval that contains 0 shows no difference; it does not show that there is none. Of
  many intervals, one in twenty excludes 0 by chance.
- `7 (2)` is fine-tuning seed 7 from pre-training seed 2. With several pre-trainings, an interval is over their means.
  With one, it does not show how much pre-training varies.
- The images of a label fraction were drawn once; another draw may differ."""
RECALL_NOTE = """In percent. AR10 is the recall of the best ten boxes per image, over IoU 0.50 to 0.95. `_swapped`: with
the boxes of another image. Only what is above it comes from looking at the image. Random query patch and Siamese are
trained to localize patches, and this evaluation gives them none."""


def write_report(folder: Path, output: Path) -> None:
    """Write the report, a CSV file with every evaluation, and a folder of curves next to it.

    Raises:
        UserError: `folder` has no study, or `output` exists and is not such a report.
    """
    study = read_study(folder)
    if output.exists():
        text = output.read_text(encoding="utf-8", errors="replace")
        if not text.startswith(REPORT_MARKER):
            raise UserError(
                f"--output {output} exists and is not a report of this tool: choose another name"
            )

    steps = read_steps(folder, study)
    evaluations = read_evaluations(folder, steps)
    write_text(output.with_suffix(".csv"), evaluations.to_csv(index=False))

    # The CSV file has COCO's fractions, the tables have percent.
    evaluations["AP"], evaluations["AP50"] = 100 * evaluations["AP"], 100 * evaluations["AP50"]
    comparisons = _comparisons(steps, evaluations)
    notes = output.with_suffix(".notes.md")
    own_text = [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    parts = [
        f"{REPORT_MARKER} {NOTES_HINT.format(notes=notes.name)}\n\n# Transfer study",
        *_findings(steps, comparisons),
        *own_text,
        *(part for comparison in comparisons for part in _comparison_section(comparison, output)),
        *_recall_section(folder, steps),
        HOW_TO_READ,
        *_reproduction_section(study, steps),
    ]
    write_text(output, "\n\n".join(parts) + "\n")
    log.info("%s", output)


class Comparison:
    """The rows of one table: a detector on a fraction of the labels.

    Attributes:
        rows: names of the rows, in the order in which they were planned.
        ap, ap50: in percent after the last step, [seeds, rows]; NaN where a run has not finished.
        pretrain_seeds: of the pre-trainings that the runs start from, [seeds, rows].
        planned_seeds: row -> its fine-tuning seeds, sorted.
    """

    def __init__(
        self, detector: str, fraction: float, planned: pd.DataFrame, evaluations: pd.DataFrame
    ) -> None:
        self.detector, self.fraction = detector, fraction
        self.title = f"{detector}, {100 * fraction:g} % of the labels"
        self.rows = list(planned["row"].unique())
        self.planned_seeds = planned.groupby("row")["seed"].agg(sorted)
        self.pretrain_seeds = planned.pivot(index="seed", columns="row", values="pretrain_seed")

        mine = (evaluations["detector"] == detector) & (evaluations["fraction"] == fraction)
        self.evaluations = evaluations[mine]
        self.ap, self.ap50 = self._final("AP"), self._final("AP50")

    def _final(self, metric: str) -> pd.DataFrame:
        """Return a metric of the last evaluation of each run, [seeds, rows]."""
        final = self.evaluations.drop_duplicates(["row", "seed"], keep="last")
        table = final.pivot(index="seed", columns="row", values=metric)
        # All planned runs, so that unfinished ones show up as missing values.
        return table.reindex(self.pretrain_seeds.index, columns=self.rows)

    def difference(
        self, row: str, other: str = NO_PRETRAINING, values: pd.DataFrame | None = None
    ) -> Difference:
        """Return the paired difference of two rows, in AP unless other `values` are given."""
        values = self.ap if values is None else values
        baseline = values[other] if other in values else pd.Series(np.nan, values.index)
        return paired_difference(values[row], baseline, self.pretrain_seeds[row])

    def ap_by_seed(self, row: str) -> str:
        """Return `7 (2): 5.1` for each run: fine-tuning seed 7 from pre-training seed 2; `-` if not finished."""
        cells = []
        for seed in self.planned_seeds[row]:
            pretrain_seed, ap = self.pretrain_seeds.loc[seed, row], self.ap.loc[seed, row]
            name = f"{seed}" if pd.isna(pretrain_seed) else f"{seed} ({pretrain_seed})"
            cells.append(f"{name}: -" if pd.isna(ap) else f"{name}: {ap:.1f}")
        return ", ".join(cells)


def _comparisons(steps: pd.DataFrame, evaluations: pd.DataFrame) -> list[Comparison]:
    """Return one comparison per detector and fraction, largest fraction first."""
    cell = ["detector", "fraction"]
    finetunings = steps[steps["kind"] == "finetune"].sort_values(cell, ascending=[True, False])
    return [
        Comparison(detector, fraction, planned, evaluations)
        for (detector, fraction), planned in finetunings.groupby(cell, sort=False)
    ]


def _findings(steps: pd.DataFrame, comparisons: list[Comparison]) -> Iterator[str]:
    """Yield each row's difference from no pre-training, grouped by verdict, and warnings about the study."""
    lines = [f"- {comparison.title}: {_verdicts(comparison)}" for comparison in comparisons]
    heading = f"AP after pre-training against the same fine-tuning without it (`{NO_PRETRAINING}`):"
    yield heading + "\n\n" + "\n".join(lines)

    left = int((~steps["done"]).sum())
    if left:
        yield f"**Not finished: {left} of {len(steps)} runs are left.**"

    if "code" in steps:  # no step has started otherwise
        codes = steps.loc[steps["done"] & (steps["kind"] == "finetune"), "code"].unique()
        if len(codes) > 1:
            yield f"**The fine-tunings were made with {len(codes)} versions of the code: {', '.join(codes)}.**"


def _verdicts(comparison: Comparison) -> str:
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row == NO_PRETRAINING:
            continue
        difference = comparison.difference(row)
        count = f", {difference.count} {difference.unit}" if difference.count > 1 else ""
        found.setdefault(difference.verdict, []).append(f"`{row}` ({difference}{count})")

    if not found:
        return f"only `{NO_PRETRAINING}`"
    return "; ".join(f"{verdict}: {', '.join(rows)}" for verdict, rows in sorted(found.items()))


def _comparison_section(comparison: Comparison, output: Path) -> Iterator[str]:
    yield f"## {comparison.title}"
    yield _main_table(comparison)

    ablations = _ablation_rows(comparison)
    if ablations:
        head = ["ablation", "what it changes", "against", "AP", "verdict"]
        yield markdown_table(head, ablations)

    if len(comparison.evaluations):
        name = f"{comparison.detector}_{comparison.fraction:g}.png"
        path = output.parent / f"{output.stem}_curves" / name
        try:
            draw_curves(comparison.evaluations, path, comparison.title)
            link = path.relative_to(output.parent).as_posix()
            yield f"![AP by epoch, {comparison.title}]({link})"
        except UserError as error:
            log.warning("no curves: %s", error)


def _main_table(comparison: Comparison) -> str:
    metrics = (comparison.ap, comparison.ap50)
    table = []
    for row in comparison.rows:
        differences = ["", ""]
        if row != NO_PRETRAINING:
            differences = [str(comparison.difference(row, values=values)) for values in metrics]
        means = [_mean_and_std(values[row]) for values in metrics]
        table.append([row, *means, *differences, comparison.ap_by_seed(row)])

    differences = [f"AP - {NO_PRETRAINING}", f"AP50 - {NO_PRETRAINING}"]
    return markdown_table(["pre-training", "AP", "AP50", *differences, "AP by seed"], table)


def _ablation_rows(comparison: Comparison) -> list[list[str]]:
    """Return each ablation's difference from its pretext task, and from the row it names itself."""
    table = []
    for row in comparison.rows:
        if row not in ABLATIONS:
            continue
        ablation = ABLATIONS[row]
        for other in (ablation.pretext, ablation.compare_with):
            if other in comparison.rows:
                difference = comparison.difference(row, other)
                cells = [row, ablation.description, other, str(difference), difference.verdict]
                table.append(cells)
    return table


def _mean_and_std(values: pd.Series) -> str:
    values = values.dropna()
    mean = f"{values.mean():.1f}" if len(values) else "-"
    return f"{mean} ± {values.std():.1f}" if len(values) > 1 else mean


def draw_curves(evaluations: pd.DataFrame, path: Path, title: str) -> None:
    """Draw AP by epoch: the mean over seeds as a line, minimum to maximum as a band.

    Raises:
        UserError: matplotlib is missing.
    """
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained", dpi=110)  # inches
    figure_canvas(figure)
    axes = figure.add_subplot()

    rows = evaluations.groupby("row", sort=False)
    colors = np.divide(cycle_colors(len(rows)), 255)  # matplotlib takes 0 to 1
    for color, (row, runs) in zip(colors, rows, strict=True):
        # Only epochs that all seeds have: a mean over changing seeds would jump.
        curves = runs.pivot(index="epoch", columns="seed", values="AP").dropna()
        label = f"{row} ({curves.shape[1]} seeds)"
        mean = curves.mean(axis=1)
        axes.plot(curves.index, mean, marker="o", markersize=3.5, color=color, label=label)
        low, high = curves.min(axis=1), curves.max(axis=1)
        axes.fill_between(curves.index, low, high, color=color, alpha=0.15, linewidth=0)

    axes.set(xlabel="epoch of fine-tuning", ylabel="AP", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _recall_section(folder: Path, steps: pd.DataFrame) -> Iterator[str]:
    done = steps[steps["done"] & (steps["kind"] == "recall")].sort_values("detector", kind="stable")
    if not len(done):
        return

    keys = [key for name in ("AP50", "AR10", "AR100") for key in (name, SWAPPED[name])]
    rows = []
    for step in done.to_dict("records"):
        found = read_json_object(folder / step["name"] / RESULT_FILES["recall"])
        values = [f"{100 * found[key]:.2f}" if key in found else "" for key in keys]
        rows.append([step["detector"], step["row"], str(step["pretrain_seed"]), *values])

    yield "## Class-agnostic boxes, right after pre-training"
    yield markdown_table(["detector", "pre-training", "seed", *keys], rows)
    yield RECALL_NOTE


def _reproduction_section(study: dict[str, Any], steps: pd.DataFrame) -> Iterator[str]:
    data, last = study["data"], study["starts"][-1]
    yield f"## How it was made\n\nPreset: {study['title']}."

    # The hashes of data and preset have no dashes and mean nothing to a reader.
    settings = study["settings"].items()
    flags = [[name, str(value)] for name, value in settings if name.startswith("--") and value]
    yield markdown_table(["setting", "value"], flags)

    parts = [
        [part, str(data[part]["images"]), str(data[part]["boxes"])]
        for part in ("train", "val", "test")
    ]
    unlabelled = ["unlabelled", str(data["unlabelled"]["images"]), ""]
    yield markdown_table(["images", "number", "boxes"], [*parts, unlabelled])

    commands = dict.fromkeys([data["command"], *(start["command"] for start in study["starts"])])
    yield "\n".join(["```text", *commands, "```"])

    packages = ("python", "torch", "torchvision", "timm")
    versions = ", ".join(f"{name} {last[name]}" for name in packages if name in last)
    yield f"GPU: {last['gpu']}; {last['cores']} cores, {last['jobs']} runs at once; {versions}; code {last['code']}."

    yield _time_table(steps[steps["done"]])


def _time_table(done: pd.DataFrame) -> str:
    rows = []
    if len(done):  # "seconds" is a column only if a step has a record
        times = done.groupby("kind", sort=False)["seconds"].agg(["count", "sum", "mean"])
        rows = [
            [kind, str(int(count)), format_seconds(total), format_seconds(mean)]
            for kind, count, total, mean in times.itertuples()
        ]
    return markdown_table(["runs", "finished", "wall time in all", "mean"], rows)
