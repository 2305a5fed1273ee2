"""The folder of a study: its settings, and one record per step. They keep two studies from being mixed.

study.json      settings, the manifest of the data, and every step that was ever planned
KIND/NAME/      what a step wrote
KIND/NAME.json  the record of a step: flags, state, seconds
KIND/NAME.log   its output
"""

import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.study.plan import Plan, Step
from tools.study.prepare import portable_command
from tools.study.presets import DETECTOR_FLAGS
from util.errors import UserError
from util.files import write_text
from util.runs.folder import read_json_object

STUDY_FILE = "study.json"
RESULT_FILES = {  # kind of step -> the file that tells that it finished
    "proposals": "header.json",
    "pretrain": "checkpoint.pth",
    "recall": "proposal_metrics.json",
    "finetune": "log.txt",
}


def study_settings(plan: Plan, args: Namespace) -> dict[str, Any]:
    """Return what all runs of a study have in common, over all calls that add runs to it.

    The hashes detect changes that no flag shows: other data in the same folder, or an edited preset. The hash of the
    preset covers every field of `Preset`, so renaming a field also separates studies.
    """
    model = {f"--{name}": value for name, value in plan.model.items()}
    return {
        "--preset": args.preset,
        "--lr": plan.lr,
        "--evaluate_on": plan.eval_split,
        **model,
        "--edge_model": plan.edge_model,
        "the sha256 of the data": _sha256(json.dumps(plan.manifest["sha256"], sort_keys=True)),
        "the sha256 of the preset": _sha256(repr((plan.preset, DETECTOR_FLAGS))),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_study(plan: Plan, args: Namespace) -> None:
    """Check that `--output_dir` is new, or has this study.

    Raises:
        UserError: the folder has a study with other settings, or other files.
    """
    folder = args.output_dir
    study = read_json_object(folder / STUDY_FILE)
    if not study:
        # A call that was killed early leaves only its lock.
        if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            raise UserError(
                f"--output_dir {folder} has files that are not a study's: choose another folder"
            )
        return

    for name, now in study_settings(plan, args).items():
        before = study.get("settings", {}).get(name)
        if before != now:
            change = f"{name} {before}, now it is {now}"
            raise UserError(f"--output_dir {folder} was made with {change}: choose another folder")


def record_start(
    plan: Plan, steps: list[Step], args: Namespace, environment: dict[str, Any]
) -> None:
    """Add this call and its steps to study.json."""
    study = read_json_object(args.output_dir / STUDY_FILE)
    start = {**environment, "command": portable_command(), "cores": args.cores, "jobs": args.jobs}

    study = {
        "settings": study_settings(plan, args),
        "title": plan.preset.title,
        "data": plan.manifest,
        # Steps of earlier calls stay: the report shows all of them.
        "steps": {**study.get("steps", {}), **{step.name: step.metadata() for step in steps}},
        "starts": [*study.get("starts", []), start],
    }
    write_text(args.output_dir / STUDY_FILE, json.dumps(study, indent=1) + "\n")


def read_step(name: str, folder: Path) -> dict[str, Any]:
    """Return the record of a step, empty before it starts.

    Keys: script, flags, needed, code, state, pid, seconds, finished_at.
    """
    return read_json_object(folder / f"{name}.json")


def has_result(name: str, kind: str, folder: Path) -> bool:
    """Return whether a step wrote the file that only a finished one has."""
    return (folder / name / RESULT_FILES[kind]).is_file()


def step_state(name: str, kind: str, folder: Path) -> str:
    """Return `to do`, `interrupted`, `failed` or `done`."""
    state = read_step(name, folder).get("state", "to do")
    if state == "done" and not has_result(name, kind, folder):
        return "to do"
    # Left behind by a call that was killed, unless another call is running right now.
    if state == "running":
        return "interrupted"
    return state


def finish_times(step: Step, folder: Path) -> dict[str, int | None]:
    """Return when each step that this one needs finished, in nanoseconds; None if it has not.

    A step that ran again has another time, and so another result.
    """
    return {name: read_step(name, folder).get("finished_at") for name in step.needs}


def check_steps(steps: list[Step], folder: Path) -> None:
    """Check that the steps that have started were started with the same flags and inputs.

    Raises:
        UserError: a step has other flags, or used a pre-training that has run again since.
    """
    for step in steps:
        step_folder, record = folder / step.name, read_step(step.name, folder)
        if record:
            _check_flags(step, step_folder, record)
            _check_inputs(step, folder, record)
        elif step_folder.exists() and any(step_folder.iterdir()):
            raise UserError(
                f"{step_folder} was not written by this study: move it away, or choose another --output_dir"
            )


def _check_flags(step: Step, step_folder: Path, record: dict[str, Any]) -> None:
    before, now = record["flags"], step.flags
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            change = f"--{name} {before.get(name)} then and {now.get(name)} now"
            remedy = "choose another --output_dir, or remove the folder and the .json next to it"
            raise UserError(f"{step_folder} was made with other settings: {change}; {remedy}")


def _check_inputs(step: Step, folder: Path, record: dict[str, Any]) -> None:
    for name, when in finish_times(step, folder).items():
        # None: the record says nothing about this input.
        if record["needed"].get(name) not in (None, when):
            remedy = "remove the folder and the .json next to it to run it again"
            raise UserError(f"{folder / step.name} was made from an earlier {name}: {remedy}")
