"""The output folder of a run: which files it contains, and how they are written."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.checkpoints.checkpoint import BEST, LATEST
from util.checkpoints.newest import NUMBERED_FILES, STEP_FILES
from util.distributed import get_world_size, is_main_process
from util.errors import UserError
from util.files import make_folder, to_json, write_text
from util.logger import log
from util.settings import Settings, flags_read
from util.settings.frozen import CHECKPOINT, GIVEN

ROOT = Path(__file__).resolve().parents[2]
SETTINGS, EVAL_SETTINGS = "args.json", "eval_args.json"
ANALYSIS = "analysis.json"
BEST_IMAGES, WORST_IMAGES = "best_images.png", "worst_images.png"
PRECISION_RECALL = "precision_recall.png"
WANDB_RUN = "wandb_run.json"

# Removed by --overwrite, so that no file of the old run is taken for one of the new run.
RUN_FILES = (
    "log.txt",
    "log_steps.txt",
    LATEST,
    BEST,
    SETTINGS,
    EVAL_SETTINGS,
    "metrics.json",
    "results.json",
    "result.html",
    "curves.png",
    "predictions.png",
    "per_class.json",
    ANALYSIS,
    BEST_IMAGES,
    WORST_IMAGES,
    PRECISION_RECALL,
    WANDB_RUN,
    "subset.json",
    "samples.png",
    "patches.png",
)

# What a run keeps of its earlier starts, see `util.runs.resuming`.
KEPT_FILES = ("log_old_[0-9]*.txt", "checkpoint_best_old_[0-9]*.pth")

# All files of a run with numbers in their names.
NUMBERED_RUN_FILES = (
    NUMBERED_FILES,
    STEP_FILES,
    "nonfinite/step_[0-9]*_rank_[0-9]*.pth",
    *KEPT_FILES,
)

# Environment variables with the number of times that a job was started again.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

# Packages whose versions are stored with each run.
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "scipy",
    "timm",
    "matplotlib",
    "pycocotools",
    "hotcoco",
)


def prepare_output_dir(settings: Settings) -> Path | None:
    """Create the output folder of a run. A folder with another run is refused.

    Returns:
        The folder, or None if nothing is to be saved.

    Raises:
        UserError: the folder can't be written, or it contains files of another run and neither `--resume` nor
            `--overwrite` allows that. A job that was restarted must not overwrite what it has trained before.
    """
    if settings.dry_run:
        return None
    if not settings.output_dir:
        log.warning("nothing of this run will be saved: add --output_dir DIR")
        return None
    folder = Path(settings.output_dir)
    if not is_main_process():
        return folder

    make_folder(folder)
    found = _files_of_other_run(folder, settings)
    if found and not settings.overwrite:
        raise UserError(_occupied_message(folder, found, settings))
    if _is_restarted() and any(path.suffix == ".pth" for path in found):
        raise UserError(
            f"--overwrite would remove what this job wrote to {folder} before it was restarted: start it with --resume "
            "auto instead, in an empty --output_dir"
        )
    if found and settings.pretrain:
        source = Path(settings.pretrain).resolve()
        if source in [path.resolve() for path in found]:
            raise UserError(
                f"--overwrite would remove the checkpoint that this run starts from, --pretrain {settings.pretrain}; "
                "choose another --output_dir"
            )
    return folder


def _is_restarted() -> bool:
    """Return whether torchrun (`--max_restarts`) or SLURM (requeue) started the same command before."""
    counts = (os.environ.get(name, "0") for name in RESTART_COUNTS)
    return any(count.isdigit() and int(count) > 0 for count in counts)


def _occupied_message(folder: Path, found: list[Path], settings: Settings) -> str:
    # Only a run with a checkpoint can be resumed, and only a command that did not ask for that needs the advice.
    has_checkpoint = (folder / LATEST).exists() or any(folder.glob(STEP_FILES))
    can_resume = has_checkpoint and not settings.eval
    suggest_resume = can_resume and settings.origins["resume"] != GIVEN
    remedy = "add --resume auto to continue it, " if suggest_resume else ""
    return (
        f"--output_dir {folder} already contains {_name_content(found, settings)} ({found[0].name}); "
        f"{remedy}--overwrite to replace it, or choose another folder"
    )


def _name_content(found: list[Path], settings: Settings) -> str:
    if settings.eval:
        return "other files"
    names = {path.name for path in found}
    is_evaluation = EVAL_SETTINGS in names and not names & {SETTINGS, "log.txt", LATEST}
    return "an evaluation" if is_evaluation else "another run"


def _files_of_other_run(folder: Path, settings: Settings) -> list[Path]:
    """Return the files in a folder that belong to another run than the one that starts now."""
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not found or _is_same_run(folder, settings):
        return []
    return [*found, *(path for name in NUMBERED_RUN_FILES for path in folder.glob(name))]


def _is_same_run(folder: Path, settings: Settings) -> bool:
    """Return True if this start continues the run in the folder, or evaluates in the folder of any run."""
    if settings.eval:
        return any(
            (folder / name).exists() for name in (SETTINGS, EVAL_SETTINGS, "log.txt", LATEST)
        )
    if settings.resume:
        return Path(settings.resume).resolve().parent == folder.resolve()

    # --resume auto without a checkpoint: the run was killed before its first one. It starts from scratch, and nothing
    # is lost, as long as no epoch was logged.
    resume_auto = settings.origins["resume"] == GIVEN
    return resume_auto and (folder / SETTINGS).exists() and not (folder / "log.txt").exists()


def check_disk_space(folder: Path | None, model: nn.Module) -> None:
    """Check that one checkpoint fits on the disk: the weights, and two optimizer moments per trainable parameter.

    Raises:
        UserError: it does not.
    """
    if folder is None or not is_main_process():
        return
    disk = shutil.disk_usage(folder)
    needed = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())
    if disk.total and disk.free < needed:  # some network disks report a size of 0
        raise UserError(
            f"--output_dir {folder}: a checkpoint needs {needed / 2**20:.0f} MiB, the disk has "
            f"{disk.free / 2**20:.0f} MiB left; free some space or choose another folder"
        )


def collect_environment() -> dict[str, object]:
    """Return command, time, versions and device of this start, to be stored with the run. Never raises."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "code": git_revision(),
        "python": platform.python_version(),
        **package_versions(),
        "torch": torch.__version__,  # with the build, such as +cu128, which the package metadata may lack
        "cuda": torch.version.cuda or "none",
        "gpu": gpu,
        "cpu_threads": str(torch.get_num_threads()),
        "processes": str(get_world_size()),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the PACKAGES that are installed, without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(root: Path = ROOT) -> str:
    """Return the git commit of the code, with `-dirty` if files have changed since; "unknown" without a repository."""

    def git(*words: str) -> str:
        # No lock on the index: a run must not get in the way of the user's own git commands.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # A copy of the project inside another repository must not report that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save_settings(
    folder: Path | None,
    settings: Settings,
    facts: Mapping[str, object],
    from_data: Mapping[str, object] | None = None,
) -> None:
    """Write args.json, the first file of a run: settings, their origin, versions, device, data and model.

    A resumed run keeps what args.json stores about its earlier starts. An evaluation writes eval_args.json, so that it
    can go into the folder of a run. With `--overwrite`, the files of the previous run are removed here.

    Args:
        facts: more entries of the file, about data and model.
        from_data: see `log_settings`.
    """
    if folder is None or not is_main_process():
        return
    if settings.overwrite:  # not earlier: a run that fails to start must not cost the previous one
        # The numbered files first: what a kill leaves is still known as another run by one of RUN_FILES.
        for path in reversed(_files_of_other_run(folder, settings)):
            path.unlink()

    path = folder / (EVAL_SETTINGS if settings.eval else SETTINGS)
    before = read_json_object(path) if (settings.resume and not settings.eval) else {}
    earlier_starts = list(before.get("earlier_starts", []))
    if "environment" in before:
        earlier_starts.append(before["environment"])
    record = {
        "settings": {**settings.as_dict(), **(from_data or {})},
        "given": settings.names_from(GIVEN),
        "adopted": settings.names_from(CHECKPOINT),
        "environment": collect_environment(),
        **facts,
        "earlier_starts": earlier_starts,
    }
    write_text(path, to_json(record, indent=1, default=str) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run's folder; {} if it is missing or damaged.

    An old or damaged folder must never stop a run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def log_settings(settings: Settings, from_data: Mapping[str, object] | None = None) -> None:
    """Log the settings that this run reads: those given, those from a checkpoint, and the defaults.

    Args:
        from_data: settings that the data decides in place of a default, by flag name, such as the number of classes.
    """
    read = flags_read(settings)
    if settings.max_iters:
        read = read - {"epochs", "lr_drop"}  # the schedule counts iterations
    values = {**settings.as_dict(), **(from_data or {})}
    shown = {name: values[name] for name in sorted(read) if values[name] not in (None, "", [])}

    given, adopted = settings.names_from(GIVEN), settings.names_from(CHECKPOINT)
    defaults = [name for name in shown if name not in (*given, *adopted)]
    groups = (("given", given), ("from the checkpoint", adopted), ("defaults", defaults))
    for title, names in groups:
        text = "  ".join(f"{name}={shown[name]}" for name in names if name in shown)
        if text:
            wrapped = textwrap.fill(
                text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            log.info("settings, %s: %s", title, wrapped)
