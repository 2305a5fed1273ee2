"""Checkpoints within an epoch: when they are due, and which of them stay."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.checkpoints.checkpoint import save_checkpoint
from util.checkpoints.newest import step_checkpoints, step_path
from util.distributed import is_main_process
from util.files import disk_errors, list_folder

UNFINISHED = re.compile(r"\.checkpoint.*\.pth\.tmp")


@dataclass
class SaveSchedule:
    """When a run saves within an epoch.

    Attributes:
        steps: after every this many optimizer steps; 0: never.
        seconds: when this many seconds have passed since the last checkpoint; 0: never.
        saved_at: time of the last checkpoint, by `time.monotonic`.
    """

    steps: int = 0
    seconds: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)

    def is_time(self) -> bool:
        """Return True on rank 0 once `seconds` have passed: clocks differ, so the others have to be told."""
        passed = time.monotonic() - self.saved_at
        return self.seconds > 0 and is_main_process() and passed >= self.seconds

    def is_due(self, step: int, is_time: bool) -> bool:
        """Return whether to save after `step` steps. `is_time`: the answer of rank 0."""
        return is_time or (self.steps > 0 and step % self.steps == 0)


def write_step_checkpoint(
    folder: Path, step: int, entries: Mapping[str, Any], keep_last: int
) -> None:
    """Write the checkpoint of a step, and then remove all but the last `keep_last` of these files.

    Raises:
        UserError: the disk is full, or the folder can't be written. No file is removed then.
    """
    save_checkpoint(entries, step_path(folder, step))
    _remove(list(step_checkpoints(folder).values())[:-keep_last])


def remove_later_steps(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: training went back, and `--resume auto` must not return to them."""
    _remove([path for number, path in step_checkpoints(folder).items() if number > step])


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of checkpoints whose process was killed while it wrote them."""
    _remove([folder / name for name in list_folder(folder) if UNFINISHED.fullmatch(name)])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with disk_errors("remove", path):
            path.unlink(missing_ok=True)
