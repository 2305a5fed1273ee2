"""The folder of a run: what is in it, and how it is written."""
import json
import platform
import sys
import textwrap
from pathlib import Path

import torch
import torchvision
from torch import nn

from util.distributed import all_gather_object, is_main_process
from util.files import write_text
from util.logger import UserError, log
from util.plot_utils import plot_logs, read_log

RUN_FILES = ("log.txt", "checkpoint.pth", "args.json")


def prepare_output(args) -> Path | None:
    """Makes the run's folder and refuses to mix two runs.

    Returns None where nothing is to be saved.

    Raises:
        UserError: the folder can't be written, or holds another run and neither `--resume` nor `--overwrite` was given.
    """
    if not args.output_dir or args.dry_run:
        if not args.dry_run:
            log.info("--output_dir is not given: nothing of this run will be saved")
        return None
    folder = Path(args.output_dir)
    if not is_main_process():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder} can't be written: {error.strerror}; choose another folder") from error
    found = [name for name in RUN_FILES if (folder / name).exists()]
    continues = args.resume or args.eval
    if found and not continues and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} holds another run ({found[0]}): add --resume auto to continue it, --overwrite to replace it, "
            "or choose another folder"
        )
    if found and not continues and args.overwrite:
        for name in ("log.txt", "checkpoint.pth", "checkpoint_best.pth"):
            (folder / name).unlink(missing_ok=True)
    return folder


def environment() -> dict[str, str]:
    """Versions and device, to be kept with the run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "gpu": gpu, "cpu_threads": str(torch.get_num_threads()), "command": " ".join(sys.argv),
    }


def save_settings(folder: Path | None, settings: dict[str, object], facts: dict[str, object]) -> None:
    """args.json: every resolved flag, versions, device and the data's fingerprint."""
    if folder is not None and is_main_process():
        text = json.dumps({"settings": settings, "environment": environment(), **facts}, indent=1, default=str)
        write_text(folder / "args.json", text + "\n")


def append_log(folder: Path | None, record: dict[str, object]) -> None:
    """One JSON object a line, as the published `log.txt`. A line of the same epoch, left by an interrupted run, is replaced."""
    if folder is None or not is_main_process():
        return
    kept = [entry for entry in _entries(folder) if entry["epoch"] < record["epoch"]]
    write_text(folder / "log.txt", "".join(json.dumps(entry) + "\n" for entry in [*kept, record]))


def is_logged(folder: Path | None, epoch: int) -> bool:
    """Whether log.txt has the line of `epoch`; the same answer on every process."""
    logged = folder is not None and any(entry["epoch"] == epoch for entry in _entries(folder)) if is_main_process() else False
    return any(all_gather_object(logged))


def _entries(folder: Path) -> list[dict]:
    return read_log(folder) if (folder / "log.txt").exists() else []


def draw_curves(folder: Path, fields: tuple[str, ...]) -> None:
    """curves.png from log.txt; where matplotlib is missing it is said once and training goes on."""
    try:
        plot_logs(folder, fields, folder / "curves.png")
    except UserError as error:
        if not _said_without_curves:
            _said_without_curves.append(str(error))
            log.warning("no curves: %s", error)


_said_without_curves: list[str] = []


def describe_settings(settings: dict[str, object]) -> None:
    """Every resolved flag, in as few lines as fit."""
    text = "  ".join(f"{name}={value}" for name, value in settings.items() if value not in (None, "", False))
    log.info("settings: %s", textwrap.fill(text, 140, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def describe_model(model: nn.Module, args) -> None:
    """One line: what is trained and how many parameters it has."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{args.pretext} on {args.detector}" if args.pretext else args.detector
    log.info("%s, %s (%s batch norm, weights: %s): %s parameters, %s trainable; device %s, amp %s",
             what, args.backbone, args.backbone_norm, args.backbone_weights, f"{total:,}", f"{trainable:,}", args.device, args.amp)
    if args.backbone_norm == "live" and trainable and args.lr_backbone <= 0:
        log.warning("the backbone has random weights and is frozen: its features will hardly tell images apart; "
                    "give --backbone_weights or leave it trainable (--lr_backbone above 0, no --fre_cnn)")
