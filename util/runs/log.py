"""A run's `log.txt`, one JSON object per epoch with the published keys, and `log_steps.txt`, one every few steps."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.distributed import all_gather_object, is_main_process
from util.errors import UserError
from util.files import append_text, disk_errors, to_json, write_text

LOG = "log.txt"
STEP_LOG = "log_steps.txt"  # of --log_every: one JSON object every few steps

UNDEFINED = -1.0  # COCO's value of a metric without anything to measure

# Keys whose values this project reads as numbers. Other keys may have any value.
NUMERIC_PREFIXES = ("train_loss", "train_seconds", "n_parameters")


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Return the epochs in a run's `log.txt`, oldest first.

    If an epoch was logged twice, its last line counts. A truncated last line is ignored: the published codebases append
    to the file, so that an interrupted run may leave one.

    Args:
        run: the log or its folder.

    Raises:
        UserError: the file is missing or not a text file, a line in the middle is not a JSON object, or a number is
            missing where this project reads one.
    """
    path = Path(run) / LOG if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{path}: no such log; give a run's output folder or its log.txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text file ({error.reason} at byte {error.start}); "
            "give a run's output folder or its log.txt"
        ) from error

    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _parse_line(line)
        if entry is not None:
            _restore_undefined(entry)
            _check_values(entry, f"{path}, line {number}")
            epochs[entry.get("epoch", number - 1)] = entry
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _restore_undefined(entry: dict[str, Any]) -> None:
    """Set an AP that was not a number, null in the file, to -1: COCO's value for an undefined one. In place."""
    stats = entry.get("test_coco_eval_bbox")
    if isinstance(stats, list):
        entry["test_coco_eval_bbox"] = [UNDEFINED if value is None else value for value in stats]


def _check_values(entry: dict[str, Any], where: str) -> None:
    for key, value in entry.items():
        if not _is_valid(key, value):
            raise UserError(f"{where}: {key} is {str(value)[:60]!r}; correct or remove the line")


def _is_valid(key: str, value: Any) -> bool:
    if key == "epoch":
        return type(value) is int  # not bool, which is an int too
    if key == "test_coco_eval_bbox":
        if not value:
            return True  # an epoch without evaluation
        return isinstance(value, list) and len(value) > 1 and all(map(_is_number, value))
    if value is None and key.startswith("train_loss"):
        return True  # a loss that was not finite
    return _is_number(value) or not key.startswith(NUMERIC_PREFIXES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main_metric(values: Mapping[str, Any]) -> float:
    """Return what decides which epoch is the best: PQ of panoptic data, else AP of masks, else AP of boxes.

    With a frozen detector the boxes of all epochs are the same. -1 without an evaluation.

    values: a line of log.txt, or its `test_*` values.
    """
    if "test_PQ_all" in values:
        return values["test_PQ_all"]["pq"]
    stats = values.get("test_coco_eval_masks") or values.get("test_coco_eval_bbox") or [UNDEFINED]
    return stats[0]


def append_log(folder: Path | None, record: dict[str, object]) -> None:
    """Append an epoch to log.txt, on rank 0.

    Lines of this and later epochs, left by an interrupted run, are removed. The file is written as a whole, so that it
    never ends in half a line.
    """
    if folder is None or not is_main_process():
        return
    kept = [entry for entry in log_entries(folder) if entry["epoch"] < record["epoch"]]
    write_log(folder, [*kept, record])


def write_log(folder: Path, entries: Sequence[Mapping[str, object]]) -> None:
    """Write log.txt with these epochs."""
    write_text(folder / LOG, "".join(to_json(entry) + "\n" for entry in entries))


def is_logged(folder: Path | None, epoch: int) -> bool:
    """Return True if log.txt has a line of `epoch`. Collective: every rank gets rank 0's answer."""
    logged = False
    if folder is not None and is_main_process():
        logged = any(entry["epoch"] == epoch for entry in log_entries(folder))
    return any(all_gather_object(logged))


def log_entries(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs in a folder's log, as `read_log` does; [] without a log."""
    with disk_errors("read", folder / LOG):
        return read_log(folder) if (folder / LOG).exists() else []


def append_step(folder: Path | None, record: Mapping[str, object]) -> None:
    """Append a line to the step log, on rank 0. `record` has `epoch`, from 0, and `step`, from 1 in each epoch.

    Raises:
        UserError: the disk is full or fails; the file has whole lines only.
    """
    if folder is None or not is_main_process():
        return
    append_text(folder / STEP_LOG, to_json(record) + "\n")


def trim_step_log(folder: Path, epoch: int, step: int) -> None:
    """Remove the lines after `step` of `epoch`, where training continues: these steps come again.

    A killed run leaves such lines, and maybe half a line at the end.
    """
    path = folder / STEP_LOG
    with disk_errors("read", path):
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= (epoch, step)]
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))


def step_entries(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a folder's step log; [] without one. Damaged lines are left out."""
    path = folder / STEP_LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [entry for entry in map(_parse_line, lines) if entry]


def _step_of(line: str) -> tuple[float, float]:
    """Return (epoch, step) of a line of the step log; infinity for a damaged one."""
    entry = _parse_line(line) or {}
    return entry.get("epoch", math.inf), entry.get("step", math.inf)
