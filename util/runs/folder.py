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
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.distributed import get_world_size, is_main_process
from util.errors import UserError
from util.files import make_folder, write_text
from util.logger import log
from util.settings.arguments import flags_read, plain_settings, setting_origins

ROOT = Path(__file__).resolve().parents[2]
SETTINGS, EVAL_SETTINGS = "args.json", "eval_args.json"
RUN_FILES = (  # what --overwrite takes away at once, so that nothing of the old run is taken for the new one's
    "log.txt",
    "checkpoint.pth",
    "checkpoint_best.pth",
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
    "faster-coco-eval",
)


def prepare_output(args) -> Path | None:
    """Makes the run's folder and refuses to mix two runs.

    Returns None where nothing is to be saved.

    Raises:
        UserError: the folder can't be written, or holds files with the names of a run's, and this is neither the run
            that is resumed nor is `--overwrite` given.
    """
    if not args.output_dir or args.dry_run:
        if not args.dry_run:
            log.info("--output_dir is not given: nothing of this run will be saved")
        return None
    folder = Path(args.output_dir)
    if not is_main_process():
        return folder
    make_folder(folder)
    found = _replaced(folder, args)
    if found and not args.overwrite:
        goes_on = (
            (folder / "checkpoint.pth").exists() and not args.eval and "resume" not in setting_origins(args)["given"]
        )
        remedy = "add --resume auto to continue it, " if goes_on else ""
        raise UserError(
            f"--output_dir {folder} holds {_what(found, args)} ({found[0].name}): {remedy}--overwrite to replace it, "
            "or choose another folder"
        )
    if found and args.pretrain and Path(args.pretrain).resolve() in [path.resolve() for path in found]:
        raise UserError(
            f"--overwrite would remove what this run starts from, --pretrain {args.pretrain}: choose another "
            f"--output_dir"
        )
    return folder


def _what(found: list[Path], args: Namespace) -> str:
    if args.eval:
        return "other files"
    names = {path.name for path in found}
    return (
        "an evaluation"
        if EVAL_SETTINGS in names and not names & {SETTINGS, "log.txt", "checkpoint.pth"}
        else "another run"
    )


def _replaced(folder: Path, args: Namespace) -> list[Path]:
    """Files of another run, which this one can't share its folder with."""
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    return [*found, *folder.glob("checkpoint[0-9][0-9][0-9][0-9].pth")] if found and not _goes_on(folder, args) else []


def _goes_on(folder: Path, args: Namespace) -> bool:
    """Whether this start belongs to the run that lies in its folder; an evaluation may go beside any run or
    evaluation.
    """
    if args.eval:
        return any((folder / name).exists() for name in (SETTINGS, EVAL_SETTINGS, "log.txt", "checkpoint.pth"))
    if args.resume:
        return Path(args.resume).resolve().parent == folder.resolve()
    # --resume auto of a run that was killed before its first checkpoint: it starts afresh, and nothing is lost.
    auto = "resume" in setting_origins(args)["given"]
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
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if inside else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save_settings(folder: Path | None, args: Namespace, facts: Mapping[str, object]) -> None:
    """The first file of a run, when all else is ready; with `--overwrite` those of the run before go now.

    args.json: every resolved flag, where those that are no defaults come from, versions, device, and `facts` of data
    and model.

    A run that is resumed keeps what args.json said of its earlier starts. An evaluation writes eval_args.json, so that
    it can go into the folder of a run.
    """
    if folder is None or not is_main_process():
        return
    for other in (
        _replaced(folder, args) if args.overwrite else ()
    ):  # not before: a run that can't start must not cost the one before
        other.unlink()
    path = folder / (EVAL_SETTINGS if args.eval else SETTINGS)
    before = read_record(path) if args.resume and not args.eval else {}
    _warn_of_other_data(before.get("data"), facts.get("data"))
    earlier = [*before.get("earlier_starts", []), *([before["environment"]] if "environment" in before else [])]
    record = {
        "settings": plain_settings(args),
        **setting_origins(args),
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


def describe_settings(args: Namespace) -> None:
    """Every resolved flag, in as few lines as fit: those given, those taken over from a checkpoint, and the defaults.
    Without those that only another script, detector or pretext reads."""
    settings, origins = plain_settings(args), setting_origins(args)
    read = flags_read(args) - ({"epochs", "lr_drop"} if args.max_iters else set())
    shown = {name: value for name, value in settings.items() if value not in (None, "", False, []) and name in read}
    defaults = [name for name in shown if name not in (*origins["given"], *origins["adopted"])]
    for title, names in (
        ("given", origins["given"]),
        ("from the checkpoint", origins["adopted"]),
        ("defaults", defaults),
    ):
        text = "  ".join(f"{name}={shown[name]}" for name in names if name in shown)
        if text:
            wrapped = textwrap.fill(text, 140, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            log.info("settings, %s: %s", title, wrapped)
