"""Kill a training run at random moments, resume it each time, and compare its end with that of an undisturbed run.

    python tools/kill_runs.py --kills 200
    python tools/kill_runs.py --kills 200 --output_dir /mnt/network_disk/kill_runs

A small detector is trained on synthetic images. It writes a checkpoint after each step, and evaluates, draws and logs
after each epoch. SIGKILL ends it at a random moment, `--resume auto` continues it, until it finishes. Then all its
checkpoints, logs and results have to be equal to those of the undisturbed run, bit for bit. The next run follows, until
there were as many kills as wanted. With `--output_dir` it tests the disk of that folder.
"""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot  # noqa: F401 - once here, and not in each process
import psutil
import timm  # noqa: F401
import torch

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune_main
from tools.demo.scenes import write_coco
from util.checkpoints.checkpoint import BEST, LATEST, read_entries
from util.checkpoints.newest import step_checkpoints
from util.errors import UserError
from util.files import make_folder
from util.logger import Progress, log
from util.runs.folder import SETTINGS
from util.runs.log import LOG, STEP_LOG, log_entries
from util.runs.session import run_script
from util.settings import Parser
from util.settings.value_types import positive

EPOCHS, IMAGES = 2, 24
FLAGS = [
    "--backbone", "timm:test_resnet", "--backbone_weights", "none", "--hidden_dim", "32", "--nheads", "4",
    "--dim_feedforward", "64", "--enc_layers", "1", "--dec_layers", "1", "--num_queries", "10",
    "--image_size", "64", "--batch_size", "2", "--num_workers", "0", "--device", "cpu",
    "--epochs", str(EPOCHS), "--lr_drop", "1", "--save_every_steps", "1", "--log_every", "1", "--resume", "auto",
]  # fmt: skip
# Files that an undisturbed run and a killed one have in common, bit by bit or except for times.
RESULTS = ("results.json", "metrics.json", "per_class.json", "analysis.json")
CHECKPOINTS = (LATEST, BEST, "checkpoint0000.pth")
TIMES = re.compile(r'"(train_seconds|images_per_second)": [\d.e+-]+')
# What differs between two runs: where they are, and how long they took.
VARYING = ("args", "seconds")
# Kills are drawn from this part of the undisturbed run's time, so that a run is killed several times.
KILLED_WITHIN = 0.5
POLL_SECONDS = 0.002


# ------------------------------------------------------------------------------------------------------- one process


def train(coco: Path, folder: Path, output: Path) -> None:
    """Run finetune_main.py in this process, with its output in a file."""
    argv = [*FLAGS, "--coco_path", str(coco), "--output_dir", str(folder)]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    run_script(finetune_main.main, finetune_main.parse, argv)


class Trainer:
    """Starts processes that train a run. They are forked from this one, which has imported everything.

    Args:
        train: called in a new process with the run's folder and the file for its output.

    Attributes:
        first_file: the first file that each of these processes writes, when training begins.
    """

    first_file = SETTINGS

    def __init__(self, train: Callable[[Path, Path], None]) -> None:
        self.train = train
        self.context = multiprocessing.get_context("fork")
        torch.set_num_threads(1)  # a forked process has no threads

    def start(self, folder: Path) -> BaseProcess:
        process = self.context.Process(target=self.train, args=(folder, self.output_of(folder)))
        process.start()
        return process

    def output_of(self, folder: Path) -> Path:
        return folder.with_suffix(".txt")

    def check_finished(self, process: BaseProcess, folder: Path) -> None:
        """Raise UserError unless the process ended well."""
        if process.exitcode:
            output = self.output_of(folder)
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(
                f"{folder.name} ended with status {process.exitcode}: {' '.join(last)}; {output} has its output"
            )


def kill_in_training(
    process: BaseProcess, first_file: Path, written_before: float, seconds: float
) -> str | None:
    """Kill a process so many seconds after it began to train. Return what it did then; None if it ended before.

    written_before: time of the `first_file` that an earlier process wrote; this one writes it when training begins.
    """
    while process.is_alive() and time_of(first_file) == written_before:
        time.sleep(POLL_SECONDS)
    process.join(seconds)
    if not process.is_alive():
        return None
    stopped = psutil.Process(process.pid)
    try:
        stopped.suspend()  # so that nothing changes while it is looked at
        moment = moment_of(stopped, first_file.parent)
    except psutil.NoSuchProcess:
        return None  # it has just ended
    process.kill()
    process.join()
    return moment


def time_of(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def moment_of(process: psutil.Process, folder: Path) -> str:
    """Return what a stopped process is doing, by its open files and by what is in its folder."""
    for file in process.open_files():
        if file.path.startswith(f"{folder}/") and file.mode != "r":
            return f"writing {kind_of(Path(file.path).name)}"
    for path in folder.glob(".*.tmp"):
        if time_of(path) > process.create_time():  # not of a process that was killed before
            return f"renaming {kind_of(path.name)}"
    latest = read_entries(folder / LATEST)
    if latest is not None and latest["epoch"] >= len(log_entries(folder)):
        return "evaluation"
    return "training"


def kind_of(name: str) -> str:
    """Return the kind of file of a name, which may be that of its temporary file."""
    name = name.removeprefix(".").removesuffix(".tmp")
    return re.sub(r"step_\d+", "step_NNN", name)


# --------------------------------------------------------------------------------------------------------- comparison


def find_difference(folder: Path, whole: Path) -> str | None:
    """Return the first difference between the files of two finished runs; None if they are equal."""
    for name in (LOG, STEP_LOG, *RESULTS):
        ours, expected = (TIMES.sub("", (run / name).read_text()) for run in (folder, whole))
        if ours != expected:
            return f"{name} differs"
    steps = [path.name for path in step_checkpoints(whole).values()]
    for name in (*CHECKPOINTS, *steps):
        ours, expected = (_read(run / name) for run in (folder, whole))
        difference = _difference(ours, expected, name)
        if difference:
            return difference
    left = [path.name for path in folder.glob(".*")]
    return f"{left[0]} is left" if left else None


def _read(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    return {name: value for name, value in content.items() if name not in VARYING}


def _difference(ours: Any, expected: Any, where: str) -> str | None:
    """Return where two nested containers differ; tensors are compared bit by bit."""
    if type(ours) is not type(expected):
        return f"{where}: {type(ours).__name__} and {type(expected).__name__}"
    if isinstance(ours, torch.Tensor):
        return None if torch.equal(ours, expected) else f"{where} differs"
    if isinstance(ours, list | tuple):
        ours, expected = dict(enumerate(ours)), dict(enumerate(expected))
    if not isinstance(ours, dict):
        return None if ours == expected else f"{where}: {ours} and {expected}"
    if ours.keys() != expected.keys():
        return f"{where}: {sorted(map(str, ours.keys() ^ expected.keys()))} in one of them"
    found = (_difference(ours[key], expected[key], f"{where}/{key}") for key in ours)
    return next(filter(None, found), None)


# --------------------------------------------------------------------------------------------------------------- main


def train_undisturbed(trainer: Trainer, folder: Path) -> float:
    """Train a run to its end. Return the seconds since training began."""
    process = trainer.start(folder)
    while process.is_alive() and not (folder / trainer.first_file).exists():
        time.sleep(POLL_SECONDS)
    start = time.monotonic()
    process.join()
    trainer.check_finished(process, folder)
    return time.monotonic() - start


def train_with_kills(
    trainer: Trainer, folder: Path, random: Random, seconds: float, most: int
) -> list[str]:
    """Train a run to its end with at most so many kills, within `seconds` of each start. Return their moments."""
    moments: list[str] = []
    while True:
        first_file = folder / trainer.first_file
        before = time_of(first_file)
        process = trainer.start(folder)
        moment = None
        if len(moments) < most:
            moment = kill_in_training(process, first_file, before, random.uniform(0, seconds))
        if moment is None:
            process.join()
            trainer.check_finished(process, folder)
            return moments
        moments.append(moment)


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/kill_runs.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=positive(), default=20, metavar="N", help="number of kills (20)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (0)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="an empty folder on the disk to test; a run that differs stays there (a temporary folder)",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    folder = args.output_dir or Path(tempfile.mkdtemp(prefix="kill_runs_"))
    make_folder(folder, ["whole"])
    random, runs = Random(args.seed), 0
    moments: Counter[str] = Counter()
    coco = write_coco(folder / "coco", IMAGES, num_val=2, size=64)
    trainer = Trainer(partial(train, coco))
    seconds = train_undisturbed(trainer, folder / "whole")
    bar = Progress(args.kills, "kills")
    try:
        while moments.total() < args.kills:
            run = folder / f"run_{runs + 1:03d}"
            most = args.kills - moments.total()
            found = train_with_kills(trainer, run, random, KILLED_WITHIN * seconds, most)
            difference = find_difference(run, folder / "whole")
            if difference:
                raise UserError(
                    f"{run} was killed {len(found)} times ({', '.join(found)}) and is not equal to the undisturbed "
                    f"run: {difference}"
                )
            shutil.rmtree(run)
            moments.update(found)
            runs += 1
            bar.step(f"{runs} runs equal", steps=len(found))
    finally:
        for moment, count in moments.most_common():
            log.info("%4d %s", count, moment)
        log.info("%d kills in %d runs that ended like the undisturbed one", moments.total(), runs)
    shutil.rmtree(folder if args.output_dir is None else folder / "whole")


if __name__ == "__main__":
    run_script(main, parse)
