"""A run that is killed at any instant continues as if nothing had happened."""

import re
from pathlib import Path

from tests import toy_run
from tests.faults import states_between_operations
from tests.tiny import assert_same, read_checkpoint

TIMES = re.compile(r'"(train_seconds|images_per_second)": [\d.e+-]+')


def assert_same_files(folder: Path, expected: Path, where: str) -> None:
    """Compare all files of two runs: names, checkpoints bit by bit, and logs except for times.

    A run that is killed before it removes an old checkpoint of a step has it until the next one.
    """
    names = {path.name for path in expected.iterdir()}
    others = {path.name for path in folder.iterdir()} ^ names
    assert others <= {"checkpoint_step_000001.pth"}, where
    for name in sorted(names):
        ours, other = content_of(folder / name), content_of(expected / name)
        assert_same(ours, other, f"{where}: {name}")


def content_of(path: Path) -> object:
    if path.suffix != ".pth":
        return TIMES.sub("", path.read_text())
    content = read_checkpoint(path)
    del content["seconds"]
    return content


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
    assert {".checkpoint.pth.tmp", ".checkpoint_step_000003.pth.tmp", ".log.txt.tmp"} <= left
