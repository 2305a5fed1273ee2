"""What a study has measured so far, as pandas tables, and paired differences between their rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from tools.study.folder import STUDY, read_step, state_of
from util.errors import UserError
from util.plots.curves import BBOX_STATS
from util.runs.folder import read_record
from util.runs.log import read_log

CONFIDENCE = 0.95
RUN = ["detector", "row", "fraction", "seed", "pretrain_seed"]  # what tells fine-tunings apart
STATS = [
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
    """
    Raises:
        UserError: no study there.
    """
    study = read_record(folder / STUDY)
    if "steps" not in study or "settings" not in study:
        raise UserError(
            f"{folder} is no study: give the --output_dir of `tools/transfer_study.py run`"
        )
    return study


def read_steps(folder: Path, study: dict[str, Any]) -> pd.DataFrame:
    """A line for each step that was ever planned: its facts and its record; done: whether it is finished."""
    rows = []
    for name, facts in study["steps"].items():
        done = state_of(name, facts["kind"], folder) == "done"
        rows.append({"name": name, **facts, **read_step(name, folder), "done": done})
    steps = pd.DataFrame(rows).rename(columns={"variant": "row"})
    return steps.astype({"seed": "Int64", "pretrain_seed": "Int64", "fraction": float})


def read_evaluations(folder: Path, steps: pd.DataFrame) -> pd.DataFrame:
    """A line for each evaluation of each finished fine-tuning: `RUN`, epoch (counted from 1), `STATS`, `LOSSES`."""
    rows = []
    for step in steps[steps["done"] & (steps["kind"] == "finetune")].to_dict("records"):
        for entry in read_log(folder / step["name"]):
            if entry.get("test_coco_eval_bbox"):
                numbers = dict(
                    zip(STATS, entry["test_coco_eval_bbox"], strict=False)
                )  # VOC has no AP by size
                run = {name: step[name] for name in RUN}
                rows.append(
                    {
                        **run,
                        "epoch": entry["epoch"] + 1,
                        **numbers,
                        **{name: entry.get(name) for name in LOSSES},
                    }
                )
    table = pd.DataFrame(rows, columns=[*RUN, "epoch", *STATS, *LOSSES])
    return table.astype({"seed": "Int64", "pretrain_seed": "Int64"}).sort_values(
        [*RUN[:4], "epoch"], ignore_index=True
    )


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, half the width of its 95 % interval, and the number of what is paired."""

    mean: float
    half_width: float
    count: int
    what: str = "seeds"

    @property
    def verdict(self) -> str:
        if self.count < 2:
            return "one seed only" if self.count else "not measured"
        if abs(self.mean) <= self.half_width:
            return "no difference shown"
        return "higher" if self.mean > 0 else "lower"

    def __str__(self) -> str:
        if not self.count:
            return "-"
        mean = f"{round(self.mean, 1) + 0.0:+.1f}"  # nothing is -0.0
        return f"{mean} ± {self.half_width:.1f}" if self.count > 1 else mean


def paired_difference(
    values: pd.Series, baseline: pd.Series, origins: pd.Series | None = None
) -> Difference:
    """values - baseline, both indexed by seed, over the seeds that both have; the interval is Student's t.

    origins: seed -> the pre-training that it started from. Runs from one pre-training are not independent: where there
    are several pre-trainings, their means are compared.
    """
    differences, what = (values - baseline).dropna(), "seeds"
    means = differences.groupby(origins).mean() if origins is not None else ()
    if 1 < len(means) < len(differences):
        differences, what = means, "pre-trainings"
    count = len(differences)
    half_width = (
        stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.sem()
        if count > 1
        else float("nan")
    )
    return Difference(float(differences.mean()), float(half_width), count, what)
