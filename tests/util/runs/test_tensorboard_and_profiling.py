"""`--tensorboard` and `--profile`: what a run writes besides its log."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.tiny import FROZEN, captured_log, fine_tune, read_checkpoint, tiny_args, write_coco
from util.errors import UserError
from util.runs.profiling import WARM_UP_STEPS, StepProfiler
from util.runs.tensorboard import scalars
from util.settings import FINETUNE


class Writer:
    """Takes the place of SummaryWriter and keeps what it gets."""

    written: list[tuple[str, float, int]]
    folder: str

    def __init__(self, folder: str) -> None:
        type(self).written, type(self).folder = [], folder

    def add_scalar(self, name: str, value: float, position: int) -> None:
        self.written.append((name, value, position))

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tiny_args(FINETUNE, "--tensorboard", "--output_dir", "somewhere")


def test_names_of_values() -> None:
    record = {
        "test_coco_eval_bbox": [0.5, 0.75],
        "test_PQ_all": {"pq": 0.25},
        "train_loss": 2,
        "flag": True,
        "text": "none",
        "missing": None,
    }
    assert dict(scalars(record)) == {
        "test_coco_eval_bbox/AP": 0.5,
        "test_coco_eval_bbox/AP50": 0.75,
        "test_PQ_all/pq": 0.25,
        "train_loss": 2,
    }


@pytest.mark.usefixtures("_installed")
def test_second_start_writes_both_logs_once_and_keeps_the_chosen_batch_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [
        "--coco_path",
        write_coco(tmp_path / "coco"),
        "--output_dir",
        tmp_path / "run",
        *FROZEN,
    ]
    words += ["--log_every", 1, "--dec_layers", 1, "--eval_every", 5, "--resume", "auto"]
    words += ["--batch_size", "auto"]
    monkeypatch.setattr("memory._largest_batch_size", lambda *args: 2)
    fine_tune(*words, "--epochs", 1)  # without --tensorboard: the next start writes it, too
    monkeypatch.setattr("memory._largest_batch_size", lambda *args: 4)
    fine_tune(*words, "--epochs", 2, "--tensorboard")

    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    epochs = [row[1:] for row in Writer.written if row[0] == "epoch/train_loss"]
    assert epochs == [(entry["train_loss"], entry["epoch"]) for entry in log]
    # Four images in batches of two are two steps per epoch.
    assert [row[2] for row in Writer.written if row[0] == "step/loss"] == [1, 2, 3, 4]
    assert Writer.folder == str(tmp_path / "run" / "tensorboard")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["args"]["batch_size"] == 2


def test_profile_of_two_steps(tmp_path: Path) -> None:
    x = torch.rand(8, 8)
    with captured_log() as lines:
        profiler = StepProfiler(tmp_path, 2, torch.device("cpu"))
        for step in range(WARM_UP_STEPS + 4):
            x @ x if step >= WARM_UP_STEPS else x + x
            assert profiler.finished == (step > WARM_UP_STEPS + 1)
            profiler.step()
        profiler.stop()
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    # Neither the steps of the warm-up nor those after the last one.
    assert names.count("aten::matmul") == 2
    assert "aten::add" not in names
    assert "aten::mm" in (tmp_path / "profile" / "operations.txt").read_text()
    assert len(lines) == 2


def test_a_training_that_is_too_short_for_a_profile(tmp_path: Path) -> None:
    with captured_log() as lines:
        profiler = StepProfiler(tmp_path, 2, torch.device("cpu"))
        profiler.step()
        profiler.stop()
    assert lines == ["--profile: the training ended within the 5 steps of warm-up"]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compile", "--activation_checkpoint"), "omit --activation_checkpoint"),
        (("--batch_size", "auto", "--eval", "--resume", "x"), "give a number to evaluate"),
        (("--profile", "3", "--dry_run", "--output_dir", "x"), "omit --eval and --dry_run"),
        (("--profile", "3"), "no effect without --output_dir"),
    ],
)
def test_refused_combinations(flags: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_args(FINETUNE, *flags)
