"""A run that is killed at any instant continues as if nothing had happened."""

import contextlib
import itertools
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests import toy_run
from tests.faults import states_between_operations
from tests.tiny import read_checkpoint
from tools import kill_runs
from util.checkpoints.newest import find_newest, step_path
from util.logger import log


def assert_same_files(folder: Path, expected: Path, where: str) -> None:
    """Compare all files of two runs: names, checkpoints bit by bit, and logs except for times.

    A run that is killed before it removes an old checkpoint of a step has it until the next one.
    """
    names = {path.name for path in expected.iterdir()}
    others = {path.name for path in folder.iterdir()} ^ names
    assert others <= {"checkpoint_step_000001.pth"}, where
    for name in sorted(names):
        toy_run.assert_same_content(folder / name, expected / name, where)


def test_killed_between_any_two_file_operations(tmp_path: Path) -> None:
    """Each state of the folder is resumed; the end is that of the run that was not killed, in every file."""
    whole = tmp_path / "whole"
    whole.mkdir()
    states = states_between_operations(whole, lambda: toy_run.start(whole), tmp_path / "states")
    assert len(states) > 25
    left = set()
    for operation, folder in states.items():
        left |= {path.name for path in folder.iterdir() if path.name.startswith(".")}
        toy_run.start(folder)
        assert_same_files(folder, whole, f"killed before {operation}")
    # Not only clean states: a kill in the middle of a write leaves its temporary file.
    assert {".checkpoint.pth.tmp", ".checkpoint_step_000003.pth.tmp", ".log.txt.tmp"} <= left


def test_killed_after_going_back_continues_with_the_new_training(tmp_path: Path) -> None:
    """Its first save is one of a step, when checkpoint.pth is still of the training that was given up."""
    run = tmp_path / "run"
    run.mkdir()
    toy_run.start(run)  # six steps
    resume = str(run / "checkpoint0001.pth")  # of step 4
    states = states_between_operations(
        run, lambda: toy_run.start(run, "--keep_last", "1", resume=resume), tmp_path / "states"
    )

    def is_new(path: Path | None) -> bool:
        return (
            path is not None and path.exists() and read_checkpoint(path)["args"]["keep_last"] == 1
        )

    with_step = [folder for folder in states.values() if is_new(step_path(folder, 5))]
    assert len(with_step) > 3
    for folder in with_step:
        assert is_new(find_newest(folder)), folder


def _train_toy(folder: Path, output: Path) -> None:
    with output.open("a") as file, contextlib.redirect_stdout(file):
        toy_run.start(folder)


@pytest.mark.slow
def test_200_kills_of_a_toy_run(tmp_path: Path) -> None:
    """SIGKILL of a process at random moments, also while it continues after the one before."""
    trainer, random = kill_runs.Trainer(_train_toy), Random(0)
    trainer.first_file = "result.html"
    whole = tmp_path / "whole"
    seconds = kill_runs.train_undisturbed(trainer, whole)
    moments: Counter[str] = Counter()
    for number in itertools.count():
        if moments.total() >= 200:
            break
        run, most = tmp_path / f"run_{number}", 200 - moments.total()
        found = kill_runs.train_with_kills(trainer, run, random, 0.7 * seconds, most)
        assert_same_files(run, whole, f"killed in {found}")
        moments.update(found)
    log.info("%d runs; %s", number, dict(moments))
    # The moments differ: this is no test of one place.
    assert len(moments) > 4
    assert moments["training"] < 150
