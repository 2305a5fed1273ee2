"""The folder of a run: what is in it, and how it is written."""

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
from util.distributed import get_world_size, is_main_process
from util.errors import UserError
from util.files import make_folder, write_text
from util.logger import log
from util.settings import Settings, flags_read
from util.settings.frozen import CHECKPOINT, GIVEN

ROOT = Path(__file__).resolve().parents[2]
SETTINGS, EVAL_SETTINGS = "args.json", "eval_args.json"
RUN_FILES = (  # what --overwrite removes, so that nothing of the old run is taken for the new one's
    "log.txt",
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
    "subset.json",
    "samples.png",
    "patches.png",
)
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


def prepare_output(settings: Settings) -> Path | None:
    """Makes the run's folder and refuses to mix two runs.

    Returns None where nothing is to be saved.

    Raises:
        UserError: the folder can't be written, or holds files with the names of a run's, and this is neither the run
            that is resumed nor is `--overwrite` given.
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
    found = _replaced(folder, settings)
    if found and not settings.overwrite:
        resumable = (
            (folder / LATEST).exists() and not settings.eval and settings.origins["resume"] != GIVEN
        )
        remedy = "add --resume auto to continue it, " if resumable else ""
        raise UserError(
            f"--output_dir {folder} holds {_what(found, settings)} ({found[0].name}): {remedy}--overwrite to replace "
            "it, or choose another folder"
        )
    if (
        found
        and settings.pretrain
        and Path(settings.pretrain).resolve() in [path.resolve() for path in found]
    ):
        raise UserError(
            f"--overwrite would remove what this run starts from, --pretrain {settings.pretrain}: choose another "
            "--output_dir"
        )
    return folder


def _what(found: list[Path], settings: Settings) -> str:
    if settings.eval:
        return "other files"
    names = {path.name for path in found}
    evaluated = EVAL_SETTINGS in names and not names & {SETTINGS, "log.txt", LATEST}
    return "an evaluation" if evaluated else "another run"


def _replaced(folder: Path, settings: Settings) -> list[Path]:
    """Files of another run, which this one can't share its folder with."""
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not found or _continues(folder, settings):
        return []
    return [*found, *folder.glob("checkpoint[0-9][0-9][0-9][0-9].pth")]


def _continues(folder: Path, settings: Settings) -> bool:
    """Whether this start belongs to the run that lies in its folder; an evaluation may go beside any run or
    evaluation.
    """
    if settings.eval:
        return any(
            (folder / name).exists() for name in (SETTINGS, EVAL_SETTINGS, "log.txt", LATEST)
        )
    if settings.resume:
        return Path(settings.resume).resolve().parent == folder.resolve()
    # --resume auto of a run that was killed before its first checkpoint: it starts from scratch, and nothing is lost.
    auto = settings.origins["resume"] == GIVEN
    return auto and (folder / SETTINGS).exists() and not (folder / "log.txt").exists()


def check_room(folder: Path | None, model: nn.Module) -> None:
    """
    Raises:
        UserError: the disk has less room than one checkpoint needs: the weights, and two moments of those that are
            trained.
    """
    if folder is None or not is_main_process():
        return
    disk = shutil.disk_usage(folder)
    needed = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())
    if disk.total and disk.free < needed:  # some network disks do not tell
        raise UserError(
            f"--output_dir {folder}: a checkpoint needs {needed / 2**20:.0f} MiB, the disk has "
            f"{disk.free / 2**20:.0f} MiB left: make room or choose another folder"
        )


def environment() -> dict[str, object]:
    """Command, time, versions and device of this start, to be kept with the run. Nothing here can fail."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "code": code_revision(),
        "python": platform.python_version(),
        **package_versions(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "gpu": gpu,
        "cpu_threads": str(torch.get_num_threads()),
        "processes": str(get_world_size()),
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed ones among PACKAGES; none of them is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_revision(root: Path = ROOT) -> str:
    """The git commit of the code, with `-dirty` where files were changed since; "unknown" outside a repository of its
    own.
    """

    def git(*words: str) -> str:
        # No lock on the index: a run must not get in the way of the user's own git.
        settings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        inside = Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve()
        return (
            git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
            if inside
            else "unknown"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save_settings(
    folder: Path | None,
    settings: Settings,
    facts: Mapping[str, object],
    from_data: Mapping[str, object] | None = None,
) -> None:
    """The first file of a run, when all else is ready; with `--overwrite` those of the run before go now.

    args.json: every setting (`from_data` as in `describe_settings`), where those that are no defaults come from,
    versions, device, and `facts` of data and model.

    A run that is resumed keeps what args.json said of its earlier starts. An evaluation writes eval_args.json, so that
    it can go into the folder of a run.
    """
    if folder is None or not is_main_process():
        return
    if settings.overwrite:  # not before: a run that can't start must not cost the one before
        for other in _replaced(folder, settings):
            other.unlink()
    path = folder / (EVAL_SETTINGS if settings.eval else SETTINGS)
    before = read_record(path) if settings.resume and not settings.eval else {}
    _warn_of_other_data(before.get("data"), facts.get("data"))
    earlier = [
        *before.get("earlier_starts", []),
        *([before["environment"]] if "environment" in before else []),
    ]
    record = {
        "settings": {**settings.as_dict(), **(from_data or {})},
        "given": settings.names_from(GIVEN),
        "adopted": settings.names_from(CHECKPOINT),
        "environment": environment(),
        **facts,
        "earlier_starts": earlier,
    }
    write_text(path, json.dumps(record, indent=1, default=str) + "\n")


def _warn_of_other_data(before: object, now: object) -> None:
    """The fingerprints of a run's data at its earlier start, none where there was no such, and of today's."""
    if before and before != now:
        log.warning(
            "the data have changed since this run was started: %s then, %s now; its numbers are of a mixture",
            before,
            now,
        )


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object in a run's folder; empty where the file is missing or damaged, so that an old folder never stops a
    run.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def describe_settings(settings: Settings, from_data: Mapping[str, object] | None = None) -> None:
    """Logs every setting: those given, those adopted from a checkpoint, and the defaults. Without those that only
    another script, detector or pretext reads, and those without a value.

    from_data: what the data decides in place of a default, by flag name: the number of classes.
    """
    read = flags_read(settings) - ({"epochs", "lr_drop"} if settings.max_iters else set())
    values = {**settings.as_dict(), **(from_data or {})}
    shown = {name: values[name] for name in sorted(read) if values[name] not in (None, "", [])}
    given, adopted = settings.names_from(GIVEN), settings.names_from(CHECKPOINT)
    defaults = [name for name in shown if name not in (*given, *adopted)]
    for title, names in (
        ("given", given),
        ("from the checkpoint", adopted),
        ("defaults", defaults),
    ):
        text = "  ".join(f"{name}={shown[name]}" for name in names if name in shown)
        if text:
            wrapped = textwrap.fill(
                text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            log.info("settings, %s: %s", title, wrapped)
