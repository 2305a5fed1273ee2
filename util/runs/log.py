"""A run's `log.txt`: one JSON object per epoch, with the published keys."""

import json
from pathlib import Path
from typing import Any

from util.distributed import all_gather_object, is_main_process
from util.errors import UserError
from util.files import write_text


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The epochs in a run's `log.txt` (the file or its folder), oldest first; of an epoch written twice, the last.

    A last line that was cut off is left out.

    Raises:
        UserError: there is no such file or it is no text, a line in its middle is no JSON object, or a line has text
            where numbers belong.
    """
    path = Path(run) / "log.txt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{path}: there is no such log; give a run's output folder or its log.txt")
    epochs: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text ({error.reason} at byte {error.start}): give a run's output folder or its log.txt"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            wrong = next((key for key, value in entry.items() if not _as_logged(key, value)), None)
            if wrong is not None:
                raise UserError(
                    f"{path}, line {number}: {wrong} is {str(entry[wrong])[:60]!r}; correct or remove the line"
                )
            epochs[entry.get("epoch", number - 1)] = entry
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _as_logged(key: str, value: Any) -> bool:
    """Whether what is read of a log's line is of the right kind; all other keys are anyone's."""
    if key == "epoch":
        return type(value) is int
    if key == "test_coco_eval_bbox":
        return (
            not value or isinstance(value, list) and len(value) > 1 and all(map(_is_number, value))
        )
    return _is_number(value) or not key.startswith(("train_loss", "train_seconds", "n_parameters"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def append_log(folder: Path | None, record: dict[str, object]) -> None:
    """One JSON object a line, as the published `log.txt`. A line of the same epoch, left by an interrupted run, is
    replaced.
    """
    if folder is None or not is_main_process():
        return
    kept = [entry for entry in _entries(folder) if entry["epoch"] < record["epoch"]]
    write_text(folder / "log.txt", "".join(json.dumps(entry) + "\n" for entry in [*kept, record]))


def is_logged(folder: Path | None, epoch: int) -> bool:
    """Whether log.txt has the line of `epoch`; the same answer on every process."""
    logged = (
        folder is not None and any(entry["epoch"] == epoch for entry in _entries(folder))
        if is_main_process()
        else False
    )
    return any(all_gather_object(logged))


def _entries(folder: Path) -> list[dict]:
    return read_log(folder) if (folder / "log.txt").exists() else []
