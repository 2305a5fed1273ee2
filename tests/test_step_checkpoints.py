"""`--save_every_steps` and `--save_every_minutes`: checkpoints within an epoch, written in the background."""

import threading
import time
from pathlib import Path

import pytest
import torch

import engine
import main as pretrain_main
import trainer
from tests.tiny import (
    FROZEN,
    assert_same,
    assert_same_logs,
    captured_log,
    pre_train,
    read_checkpoint,
    write_images,
)
from util.errors import UserError
from util.runs import step_checkpoints
from util.runs.background import THREAD_NAME, BackgroundWriter, copy_to_host

FLAGS = (*FROZEN, "--batch_size", 1, "--dec_layers", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", count=5)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only train: drawing samples and the page takes longer than these steps."""
    monkeypatch.setattr(pretrain_main, "train", lambda run, *_: trainer.fit(run))


def test_run_killed_within_an_epoch_resumes_exactly(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs have five steps. The run ends without a word in step 8; the checkpoint of step 6 is its newest."""
    flags = ("--imagenet_path", images, *FLAGS, "--epochs", 2, "--ema", 0.9)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pre_train(*flags, "--output_dir", whole)
    saves = (*flags, "--output_dir", killed, "--save_every_steps", 3, "--resume", "auto")
    train_step, steps = engine.train_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(engine, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pre_train(*saves)
    monkeypatch.setattr(engine, "train_step", train_step)
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join()
    names = ["checkpoint.pth", "checkpoint_step_000003.pth", "checkpoint_step_000006.pth"]
    assert sorted(path.name for path in killed.glob("checkpoint*")) == names
    assert read_checkpoint(killed / "checkpoint.pth")["step"] == 5

    torch.manual_seed(999)  # a new process has another random state
    with captured_log() as lines:
        pre_train(*saves)
    assert "continuing at epoch 2 of 2, batch 1" in lines
    ours, expected = (read_checkpoint(path / "checkpoint.pth") for path in (killed, whole))
    assert set(ours) == set(expected)
    for name in set(ours) - {"args", "seconds"}:
        assert_same(ours[name], expected[name], name)
    assert_same_logs(killed, whole)


def test_failed_write_is_logged_and_training_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint = step_checkpoints.save_checkpoint

    def fail_once(entries: dict, path: Path) -> None:
        if path.name == "checkpoint_step_000002.pth":
            raise UserError(f"cannot write {path}: disk full")
        save_checkpoint(entries, path)

    monkeypatch.setattr(step_checkpoints, "save_checkpoint", fail_once)
    with captured_log() as lines:
        pre_train(
            "--imagenet_path", images, *FLAGS, "--epochs", 1, "--output_dir", tmp_path,
            "--save_every_minutes", 1e-9, "--keep_last", 3,
        )  # fmt: skip
    found = [line for line in lines if "checkpoint_step_000002.pth" in line]
    assert found == [
        f"training continues, but cannot write {tmp_path}/checkpoint_step_000002.pth: disk full"
    ]
    # The end of the epoch, step 5, has its own checkpoint.
    names = [f"checkpoint_step_00000{step}.pth" for step in (1, 3, 4)]
    assert sorted(path.name for path in tmp_path.glob("checkpoint_step_*")) == names


def test_background_writer_runs_one_write_at_a_time() -> None:
    running, most, done = [], [], []

    def write() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        done.append(1)

    with BackgroundWriter() as writer:
        for _ in range(3):
            writer.start(write)
    assert (most, done) == ([1, 1, 1], [1, 1, 1])

    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writer:  # an error of this code
        writer.start(lambda: 1 / 0)
    writer, release = BackgroundWriter(), threading.Event()
    writer.start(release.wait)
    writer.__exit__(KeyboardInterrupt)  # does not wait for the write
    release.set()


def test_copy_to_host_keeps_structure_and_shared_tensors() -> None:
    linear = torch.nn.Linear(2, 2)
    state = {"a": linear.state_dict(), "b": [linear.weight, (1, None)], "c": linear.weight[:1]}
    copied = copy_to_host(state)
    expected = copy_to_host(state)
    linear.weight.data.zero_()
    assert_same(copied, expected)
    assert copied["b"][0] is copied["a"]["weight"]
    assert copied["a"]["weight"].abs().sum() > 0
    assert copied["c"].shape == (1, 2)
