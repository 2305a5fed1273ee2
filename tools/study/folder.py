"""The folder of a study: its settings and the records of its steps, which keep two studies from being mixed.

Each step has a folder below the study's, and beside it NAME.json (command, state, seconds) and NAME.log (its output).
study.json has the study's settings, the data's manifest, and every step that was ever planned.
"""

import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.study.plan import Plan, Step
from tools.study.prepare import shown_command
from tools.study.presets import DETECTOR_FLAGS
from util.errors import UserError
from util.files import write_text
from util.runs.folder import read_record

STUDY = "study.json"
RESULTS = {  # kind of a step -> a file that only a finished one has
    "proposals": "header.json",
    "pretrain": "checkpoint.pth",
    "recall": "proposal_metrics.json",
    "finetune": "log.txt",
}


def study_settings(plan: Plan, args: Namespace) -> dict[str, Any]:
    """What all runs of a study share, whatever the calls that made them."""
    model = {f"--{name}": value for name, value in plan.model.items()}
    return {
        **{"--preset": args.preset, "--lr": plan.lr, "--evaluate_on": plan.part, **model},
        "--edge_model": plan.edge_model,
        "the sha256 of the data": _sha256(json.dumps(plan.manifest["sha256"], sort_keys=True)),
        "the sha256 of the preset": _sha256(repr((plan.preset, DETECTOR_FLAGS))),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_study(plan: Plan, args: Namespace) -> None:
    """
    Raises:
        UserError: the folder holds a study with other settings, or something else.
    """
    folder, study = args.output_dir, read_record(args.output_dir / STUDY)
    if not study and folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(
            f"--output_dir {folder} holds files of something else: choose another folder"
        )
    for name, now in study_settings(plan, args).items() if study else ():
        before = study.get("settings", {}).get(name)
        if before != now:
            change = f"{name} {before}, now it is {now}"
            raise UserError(f"--output_dir {folder} was made with {change}: choose another folder")


def begin_study(
    plan: Plan, steps: list[Step], args: Namespace, environment: dict[str, Any]
) -> None:
    """Adds this call and its steps to study.json."""
    study = read_record(args.output_dir / STUDY)
    start = {**environment, "command": shown_command(), "cores": args.cores, "jobs": args.jobs}
    study = {
        "settings": study_settings(plan, args),
        "title": plan.preset.title,
        "data": plan.manifest,
        "steps": {**study.get("steps", {}), **{step.name: step.facts() for step in steps}},
        "starts": [*study.get("starts", []), start],
    }
    write_text(args.output_dir / STUDY, json.dumps(study, indent=1) + "\n")


def read_step(name: str, folder: Path) -> dict[str, Any]:
    """The record of a step: script, flags, needed, code, state, pid, seconds, finished_at; empty before it begins."""
    return read_record(folder / f"{name}.json")


def has_result(name: str, kind: str, folder: Path) -> bool:
    return (folder / name / RESULTS[kind]).is_file()


def state_of(name: str, kind: str, folder: Path) -> str:
    """`to do`, `interrupted`, `failed` or `done`."""
    state = read_step(name, folder).get("state", "to do")
    if state == "done" and not has_result(name, kind, folder):
        return "to do"
    return "interrupted" if state == "running" else state


def finish_times(step: Step, folder: Path) -> dict[str, int | None]:
    """Each step that it needs -> when that one finished: another time, another result."""
    return {name: read_step(name, folder).get("finished_at") for name in step.needs}


def check_steps(steps: list[Step], folder: Path) -> None:
    """
    Raises:
        UserError: a step was begun with other flags, or from a pre-training that has been replaced since.
    """
    for step in steps:
        place, record = folder / step.name, read_step(step.name, folder)
        if not record:
            if place.exists() and any(place.iterdir()):
                raise UserError(
                    f"{place} was not written by this study: move it away, or choose another --output_dir"
                )
            continue
        before, now = record["flags"], step.flags
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                change = f"--{name} {before.get(name)} then and {now.get(name)} now"
                remedy = "choose another --output_dir, or remove the folder and the .json beside it"
                raise UserError(f"{place} was made with other settings: {change}; {remedy}")
        for name, when in finish_times(step, folder).items():
            if record["needed"].get(name) not in (None, when):
                remedy = "remove the folder and the .json beside it, and it is made again"
                raise UserError(f"{place} was made from an earlier {name}: {remedy}")
