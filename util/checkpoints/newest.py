"""The checkpoints in a run's folder: those of single steps, and the one that `--resume auto` takes."""

import math
import os
import re
from pathlib import Path

from util.checkpoints.checkpoint import BEST, LATEST, load_checkpoint, read_entries
from util.distributed import compute_on_rank0
from util.errors import UserError
from util.logger import log

NUMBERED_FILES = "checkpoint[0-9][0-9][0-9][0-9].pth"
STEP_FILES = "checkpoint_step_[0-9]*.pth"
_STEP_NAME = re.compile(r"checkpoint_step_(\d+)\.pth")


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return folder / f"checkpoint_step_{step:06d}.pth"


def step_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> path of the step checkpoints in a folder, the oldest first."""
    names = ((_STEP_NAME.fullmatch(path.name), path) for path in folder.glob(STEP_FILES))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def resolve_resume_path(
    path_or_auto: str | None, output_dir: str | os.PathLike | None
) -> str | None:
    """Return the path that `--resume` means, or None to start from scratch.

    `auto` is the newest checkpoint in output_dir that can be read, so that a requeued job can keep its command.
    Collective: all ranks take the one that rank 0 finds.

    Raises:
        UserError: `auto` without an output_dir, or none of the checkpoints there can be read.
    """
    if not path_or_auto:
        return None
    if path_or_auto != "auto":
        return str(path_or_auto)
    if not output_dir:
        raise UserError(
            "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR"
        )
    path = compute_on_rank0(lambda: find_newest(Path(output_dir)))
    return None if path is None else str(path)


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that can be read, None without any. Log which were skipped, and why.

    Raises:
        UserError: none can be read.
    """
    skipped = []
    for path in _newest_first(folder):
        try:
            load_checkpoint(path)
        except UserError as error:
            skipped.append(f"{path.name} ({str(error).removeprefix(f'{path}').lstrip(': ')})")
            continue
        if skipped:
            log.warning("--resume auto takes %s and skipped %s", path.name, ", ".join(skipped))
        return path
    if skipped:
        raise UserError(
            f"--resume auto: no checkpoint in {folder} can be read: {', '.join(skipped)}; move the files to another "
            "folder to start from scratch"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder's run, those first that training should continue from.

    The numbered ones and the best come last. Those of later epochs may be of training that was given up since, by
    going back to an earlier checkpoint.
    """
    # Of the same step, checkpoint.pth is newer: it has the end of the epoch.
    found = [((step, 0), path) for step, path in step_checkpoints(folder).items()]
    latest = folder / LATEST
    if latest.exists():
        found.append(((_step_of(latest) if found else 0, 1), latest))
    newest = [path for _, path in sorted(found, reverse=True)]
    best = [folder / BEST] if (folder / BEST).exists() else []
    return [*newest, *sorted(folder.glob(NUMBERED_FILES), reverse=True), *best]


def _step_of(path: Path) -> float:
    """Return the number of optimizer steps in a checkpoint: 0 in one of an older version, infinity in a damaged one,
    which is then tried first, and reported.
    """
    entries = read_entries(path)
    if entries is None:
        return math.inf
    step = entries.get("step")
    return step if isinstance(step, int) else 0
