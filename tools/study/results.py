"""What a study has measured so far as pandas tables, and paired differences between their rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from tools.study.folder import STUDY_FILE, read_step, step_state
from util.errors import UserError
from util.plots.curves import BBOX_STATS
from util.runs.folder import read_json_object
from util.runs.log import read_log

CONFIDENCE = 0.95
RUN_COLUMNS = ["detector", "row", "fraction", "seed", "pretrain_seed"]  # identify a fine-tuning
METRICS = [
    *(name.replace(" ", "_") for name in BBOX_STATS),
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
]
LOSSES = ["test_loss", "test_loss_ce", "test_loss_bbox", "test_loss_giou"]


def read_study(folder: Path) -> dict[str, Any]:
    """Read study.json.

    Raises:
        UserError: the folder has no study.
    """
    study = read_json_object(folder / STUDY_FILE)
    if "steps" not in study or "settings" not in study:
        raise UserError(
            f"{folder} has no study: give the --output_dir of `tools/transfer_study.py run`"
        )
    return study


def read_steps(folder: Path, study: dict[str, Any]) -> pd.DataFrame:
    """Return one row per planned step: its metadata, its record, and `done`, whether it has finished."""
    rows = []
    for name, metadata in study["steps"].items():
        done = step_state(name, metadata["kind"], folder) == "done"
        rows.append({"name": name, **metadata, **read_step(name, folder), "done": done})

    steps = pd.DataFrame(rows).rename(columns={"variant": "row"})
    # Int64 is pandas' integer with missing values: proposals have no seed, and `none` has no pre-training.
    return steps.astype({"seed": "Int64", "pretrain_seed": "Int64", "fraction": float})


def read_evaluations(folder: Path, steps: pd.DataFrame) -> pd.DataFrame:
    """Return one row per evaluation of each finished fine-tuning.

    Columns: `RUN_COLUMNS`, epoch (from 1), `METRICS` from 0 to 1, `LOSSES`.
    """
    rows = []
    for step in steps[steps["done"] & (steps["kind"] == "finetune")].to_dict("records"):
        run = {name: step[name] for name in RUN_COLUMNS}
        for entry in read_log(folder / step["name"]):
            if not entry.get("test_coco_eval_bbox"):  # an epoch without evaluation
                continue
            # Not strict: VOC's metric has no AP by object size.
            metrics = dict(zip(METRICS, entry["test_coco_eval_bbox"], strict=False))
            losses = {name: entry.get(name) for name in LOSSES}
            rows.append({**run, "epoch": entry["epoch"] + 1, **metrics, **losses})

    table = pd.DataFrame(rows, columns=[*RUN_COLUMNS, "epoch", *METRICS, *LOSSES])
    table = table.astype({"seed": "Int64", "pretrain_seed": "Int64"})
    return table.sort_values([*RUN_COLUMNS[:4], "epoch"], ignore_index=True)


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        mean: of the differences.
        half_width: half the width of its 95 % interval; NaN with fewer than two differences.
        count: number of differences.
        unit: what is paired, "seeds" or "pre-trainings".
    """

    mean: float
    half_width: float
    count: int
    unit: str = "seeds"

    @property
    def verdict(self) -> str:
        if self.count == 0:
            return "not measured"
        if self.count == 1:
            return "one seed only"
        if abs(self.mean) <= self.half_width:
            return "no difference shown"
        return "higher" if self.mean > 0 else "lower"

    def __str__(self) -> str:
        if not self.count:
            return "-"
        mean = f"{round(self.mean, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0
        return f"{mean} ± {self.half_width:.1f}" if self.count > 1 else mean


def paired_difference(
    values: pd.Series, baseline: pd.Series, pretrain_seeds: pd.Series | None = None
) -> Difference:
    """Return the mean of values - baseline with its interval by Student's t.

    Args:
        values, baseline: indexed by seed; seeds that only one of them has are ignored.
        pretrain_seeds: seed -> seed of the pre-training that it started from.
    """
    differences, unit = (values - baseline).dropna(), "seeds"

    # Fine-tunings from one pre-training are not independent samples of the pretext task. With several
    # pre-trainings the independent unit is the pre-training, so the interval is over their means.
    if pretrain_seeds is not None:
        means = differences.groupby(pretrain_seeds).mean()
        if 1 < len(means) < len(differences):
            differences, unit = means, "pre-trainings"

    count = len(differences)
    half_width = float("nan")
    if count > 1:
        half_width = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.sem()
    return Difference(float(differences.mean()), float(half_width), count, unit)
