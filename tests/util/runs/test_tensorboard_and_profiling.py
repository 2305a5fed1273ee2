"""`--tensorboard`, `--wandb` and `--profile`: what a run writes besides its log."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import FROZEN, captured_log, fine_tune, read_checkpoint, tiny_args, write_coco
from util.errors import UserError
from util.runs.boards import scalars
from util.runs.profiling import WARM_UP_STEPS, StepProfiler
from util.runs.weights_and_biases import WeightsAndBiases
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


class FakeRun:
    """Takes the place of a W&B run."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.finished = options, [], False
        self.id = options["id"] or "chosen-id"

    def define_metric(self, name: str, **options: Any) -> None: ...

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that a stand-in of the package wandb has started."""
    runs: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    module.Settings, module.Error = dict, type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--{name} needs .* pip install {name}"):
        tiny_args(FINETUNE, f"--{name}", "--output_dir", "somewhere")


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb_runs: list[FakeRun]
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
    fine_tune(*words, "--epochs", 2, "--tensorboard", "--wandb")

    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    epochs = [row[1:] for row in Writer.written if row[0] == "epoch/train_loss"]
    assert epochs == [(entry["train_loss"], entry["epoch"]) for entry in log]
    # Four images in batches of two are two steps per epoch.
    assert [row[2] for row in Writer.written if row[0] == "step/loss"] == [1, 2, 3, 4]
    assert Writer.folder == str(tmp_path / "run" / "tensorboard")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["args"]["batch_size"] == 2

    (run,) = wandb_runs
    assert run.finished
    assert run.options["config"]["hidden_dim"] == 32
    assert (run.options["project"], run.options["name"]) == ("predetr", "run")
    sent = [
        (name, value, values.get("epoch", values.get("step")))
        for values in run.logged
        for name, value in values.items()
        if "/" in name
    ]
    assert sent == Writer.written, "both boards get the same"


def test_every_start_continues_the_run_of_wandb(
    tmp_path: Path, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_NAME", "mine")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 2.0}\n')
    for start in range(2):
        board = WeightsAndBiases(tmp_path, 10, {})
        board.add_logs(tmp_path, 1)
        board.add_step({"epoch": 1, "step": 3, "loss": 1.0})
        board.add_epoch({"epoch": 1 + start, "train_loss": 1.0})
        board.close()
    first, second = wandb_runs
    assert (first.options["id"], second.options["id"]) == (None, "chosen-id")
    assert first.options["name"] == "mine"
    assert first.logged == [
        {"epoch": 0, "epoch/train_loss": 2.0},
        {"step": 13, "step/loss": 1.0},
        {"epoch": 1, "epoch/train_loss": 1.0},
    ]
    assert second.logged == [{"epoch": 2, "epoch/train_loss": 1.0}], "nothing is sent twice"


def test_a_missing_login_of_wandb_is_one_line(
    tmp_path: Path, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.Error("api_key not configured\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^--wandb: api_key not configured; run `wandb login`"):
        WeightsAndBiases(tmp_path, 10, {})


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package itself: two starts write two files of one run."""
    wandb = pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for epoch, loss in ((0, 1.5), (1, 1.25)):
        board = WeightsAndBiases(tmp_path, 10, {"lr": 1e-4})
        board.add_epoch({"epoch": 0, "train_loss": 1.5})
        board.add_epoch({"epoch": epoch, "train_loss": loss})
        board.close()
    wandb.teardown()  # waits until the files are complete
    run_id = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    files = [
        path.read_bytes()
        for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    ]
    assert [(b"epoch/train_loss" in file, b"1.5" in file, b"1.25" in file) for file in files] == [
        (True, True, False),
        (True, False, True),
    ]


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
