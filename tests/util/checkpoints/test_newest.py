"""Which checkpoint `--resume auto` takes, and which step checkpoints stay."""

from pathlib import Path

import pytest
import torch

from tests.tiny import captured_log
from util.checkpoints.checkpoint import read_entries, save_checkpoint
from util.checkpoints.newest import find_newest, step_checkpoints
from util.errors import UserError
from util.runs.step_checkpoints import (
    SaveSchedule,
    remove_later_steps,
    remove_unfinished,
    write_step_checkpoint,
)
from util.settings import FINETUNE


def content(step: int | None, value: float = 1.0) -> dict:
    entries = {"model": {"weight": torch.full((64,), value)}, "args": {"script": FINETUNE}}
    return entries if step is None else {**entries, "step": step}


def write(folder: Path, *names_and_steps: tuple[str, int | None]) -> None:
    for name, step in names_and_steps:
        save_checkpoint(content(step), folder / name)


def newest(folder: Path) -> str | None:
    path = find_newest(folder)
    return path and path.name


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, ("checkpoint0003.pth", 90), ("checkpoint_best.pth", 90))
    assert newest(tmp_path) == "checkpoint0003.pth"
    # Numbered ones may be of training that was given up by going back.
    write(tmp_path, ("checkpoint.pth", 30))
    assert newest(tmp_path) == "checkpoint.pth"
    write(tmp_path, ("checkpoint_step_000020.pth", 20), ("checkpoint_step_000030.pth", 30))
    assert newest(tmp_path) == "checkpoint.pth"  # of the same step, after the end of the epoch
    write(tmp_path, ("checkpoint_step_1000000.pth", 1_000_000))
    assert newest(tmp_path) == "checkpoint_step_1000000.pth"
    write(tmp_path, ("checkpoint.pth", None))  # of an earlier version
    assert newest(tmp_path) == "checkpoint_step_1000000.pth"


def test_damaged_checkpoints_are_skipped_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, ("checkpoint_step_000020.pth", 20), ("checkpoint_step_000030.pth", 30))
    write(tmp_path, ("checkpoint.pth", 40))
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: len(whole) // 2])
    save_checkpoint(content(30, float("nan")), tmp_path / "checkpoint_step_000030.pth")
    with captured_log() as lines:
        assert newest(tmp_path) == "checkpoint_step_000020.pth"
    (line,) = lines
    assert "takes checkpoint_step_000020.pth and skipped checkpoint.pth (it is an inc" in line
    assert "checkpoint_step_000030.pth (1 of 1 tensors have NaN" in line
    assert "\n" not in line

    (tmp_path / "checkpoint_step_000020.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .*step_000020.pth \(.*is empty"):
        find_newest(tmp_path)


def test_a_wrong_byte_in_a_pickle_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    """PyTorch's unpickler then raises errors of many kinds, here IndexError."""
    write(tmp_path, ("checkpoint_step_000020.pth", 20), ("checkpoint.pth", 40))
    path = tmp_path / "checkpoint.pth"
    whole = bytearray(path.read_bytes())
    start = whole.index(b"\x80\x02}")
    whole[start + 2] = ord(".")  # ends a pickle, here without a value
    path.write_bytes(whole)
    assert read_entries(path) is None
    with captured_log() as lines:
        assert newest(tmp_path) == "checkpoint_step_000020.pth"
    assert "skipped checkpoint.pth" in lines[0]


def test_moving_average_and_raw_weights_must_be_finite(tmp_path: Path) -> None:
    raw = {"raw_model": {"weight": torch.full((64,), float("inf"))}}
    save_checkpoint({**content(1), **raw}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="NaN or infinite"):
        find_newest(tmp_path)


def test_the_last_step_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 9, 10, 11):
        write_step_checkpoint(tmp_path, step, content(step), keep_last=2)
    assert list(step_checkpoints(tmp_path)) == [10, 11]

    def disk_full(*_args) -> None:
        raise UserError("cannot write: disk full")

    monkeypatch.setattr("util.runs.step_checkpoints.save_checkpoint", disk_full)
    with pytest.raises(UserError):
        write_step_checkpoint(tmp_path, 12, content(12), keep_last=1)
    assert list(step_checkpoints(tmp_path)) == [10, 11]  # nothing was removed

    remove_later_steps(tmp_path, 10)
    assert list(step_checkpoints(tmp_path)) == [10]
    (tmp_path / ".checkpoint_step_000012.pth.tmp").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_step_000010.pth"]


def test_saves_are_due_by_steps_or_time() -> None:
    schedule = SaveSchedule(steps=3)
    assert [step for step in range(1, 8) if schedule.is_due(step, schedule.is_time())] == [3, 6]
    assert SaveSchedule(seconds=60, saved_at=-1e9).is_time()
    assert not SaveSchedule(seconds=60).is_time()
    assert SaveSchedule().is_due(5, is_time=True)
