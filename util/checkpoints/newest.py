"""The checkpoints in a run's folder: those of single steps, and the one that `--resume auto` takes."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.checkpoints.checkpoint import BEST, LATEST, Checkpoint, load_checkpoint, read_entries
from util.distributed import compute_on_rank0
from util.errors import DiskError, UserError
from util.files import list_folder
from util.logger import log

NUMBERED_FILES = "checkpoint[0-9][0-9][0-9][0-9].pth"
STEP_FILES = "checkpoint_step_[0-9]*.pth"
_NUMBERED_NAME = re.compile(r"checkpoint\d{4}\.pth")
_STEP_NAME = re.compile(r"checkpoint_step_(\d+)\.pth")

# Settings that all checkpoints of a run have in common, whatever its later starts change.
IDENTITY = (
    "script",
    "pretext",
    "detector",
    "backbone",
    "hidden_dim",
    "nheads",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "num_queries",
)


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return folder / f"checkpoint_step_{step:06d}.pth"


def step_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> path of the step checkpoints in a folder, the oldest first.

    Raises:
        DiskError: the folder can't be listed.
    """
    matches = filter(None, map(_STEP_NAME.fullmatch, list_folder(folder)))
    return dict(sorted((int(match[1]), folder / match[0]) for match in matches))


def resolve_resume_path(
    path_or_auto: str | None,
    output_dir: str | os.PathLike | None,
    settings: Mapping[str, Any] | None = None,
) -> str | None:
    """Return the path that `--resume` means, or None to start from scratch.

    `auto` is the newest checkpoint in output_dir that can be read, so that a requeued job can keep its command.
    Collective: all ranks take the one that rank 0 finds.

    Args:
        settings: of the run in output_dir, see `find_newest`.

    Raises:
        UserError: `auto` without an output_dir, none of the checkpoints there can be read, or the disk fails.
    """
    if not path_or_auto:
        return None
    if path_or_auto != "auto":
        return str(path_or_auto)
    if not output_dir:
        raise UserError(
            "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR"
        )
    path = compute_on_rank0(lambda: find_newest(Path(output_dir), settings or {}))
    return None if path is None else str(path)


def find_newest(folder: Path, settings: Mapping[str, Any] | None = None) -> Path | None:
    """Return the newest checkpoint in a folder that can be read, None without any. Log which were skipped, and why.

    Args:
        settings: of the run in this folder, by args.json. A checkpoint with another script or architecture is skipped.

    Raises:
        DiskError: the disk or the network file system fails. A file that can't be read now may be intact, and training
            from an older one would replace it.
        UserError: none can be read.
    """
    skipped = []
    for path in _newest_first(folder):
        try:
            _check_run(load_checkpoint(path), settings or {})
        except DiskError:
            raise
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


def _check_run(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of the run with these settings.

    Raises:
        UserError: it is not.
    """
    for name in IDENTITY:
        if name in settings and checkpoint.args.get(name, settings[name]) != settings[name]:
            raise UserError(
                f"{checkpoint.source} is of another run: --{name} {checkpoint.args[name]}, and {settings[name]} in "
                "args.json"
            )


def _newest_first(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder's run, those first that training should continue from.

    The numbered ones and the best come last. Those of later epochs may be of training that was given up since, by
    going back to an earlier checkpoint.
    """
    # Of the same step, checkpoint.pth is newer: it has the end of the epoch.
    found = [((step, 0), path) for step, path in step_checkpoints(folder).items()]
    names = list_folder(folder)
    latest = folder / LATEST
    if LATEST in names:
        found.append(((step_of(latest) if found else 0, 1), latest))
    newest = [path for _, path in sorted(found, reverse=True)]
    numbered = [folder / name for name in reversed(names) if _NUMBERED_NAME.fullmatch(name)]
    best = [folder / BEST] if BEST in names else []
    return [*newest, *numbered, *best]


def step_of(path: Path) -> float:
    """Return the number of optimizer steps in a checkpoint: 0 in one of an older version, infinity in a damaged one,
    which is then tried first, and reported.
    """
    entries = read_entries(path)
    if entries is None:
        return math.inf
    step = entries.get("step")
    return step if isinstance(step, int) else 0
