"""How often a run writes its checkpoint, and under which names."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trainer
from tests.tiny import FROZEN, fine_tune, read_checkpoint, write_coco
from util.errors import UserError
from util.files import link_or_copy, write_text


def test_new_best_epoch_writes_checkpoint_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once before the evaluation, which may be killed, and once with its AP. Other names link to the same file."""
    original, written = trainer.save_checkpoint, []

    def counted(checkpoint, path: Path) -> None:
        written.append(path.name)
        original(checkpoint, path)

    monkeypatch.setattr(trainer, "save_checkpoint", counted)
    coco = write_coco(tmp_path / "coco")
    fine_tune(
        "--coco_path",
        coco,
        "--epochs",
        1,
        "--save_every",
        1,
        "--output_dir",
        tmp_path / "run",
        *FROZEN,
    )
    assert written == ["checkpoint0000.pth", "checkpoint0000.pth"]
    latest, best = (
        read_checkpoint(tmp_path / "run" / name)
        for name in ("checkpoint.pth", "checkpoint_best.pth")
    )
    numbered = read_checkpoint(tmp_path / "run" / "checkpoint0000.pth")
    assert latest["best"] == best["best"] == numbered["best"] > -1
    data = json.loads((tmp_path / "run" / "args.json").read_text())["data"]
    assert numbered["data_fingerprint"] == data
    for other in (best, numbered):
        assert all(
            torch.equal(value, other["model"][key]) for key, value in latest["model"].items()
        )


def test_link_keeps_content_when_source_is_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    second.write_text("older")
    link_or_copy(first, second)
    trainer_writes = tmp_path / "new"
    trainer_writes.write_text("new")
    os.replace(trainer_writes, first)
    assert (first.read_text(), second.read_text()) == ("new", "old")


def test_failed_rename_of_a_link_keeps_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary name that is a link must not be opened for writing: that would empty the other file."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("weights")
    second.write_text("old")

    def refuse(*_args) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match="cannot write .*second"):
            link_or_copy(first, second)
    assert (first.read_text(), second.read_text()) == ("weights", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]

    os.link(
        first, tmp_path / ".second.tmp"
    )  # left by a process that was killed before it renamed it
    write_text(second, "new")
    assert (first.read_text(), second.read_text()) == ("weights", "new")


def test_link_falls_back_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "first").write_bytes(b"weights" * 1000)
    link_or_copy(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_page_of_short_epochs_takes_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 2 seconds, a page of 1 second: every fifth epoch, and when an evaluation needs it."""
    clock, called = [0.0], []

    def draw() -> None:
        called.append(clock[0])
        clock[0] += 1

    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    run = SimpleNamespace(on_epoch_end=draw, called_at=-math.inf, call_seconds=0.0)
    for epoch in range(14):
        clock[0] += 2
        trainer._call_on_epoch_end(run, needed=epoch == 13)
    assert called == [2, 15, 28, 31]
