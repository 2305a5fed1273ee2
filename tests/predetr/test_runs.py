"""`pretrain` and `finetune` from Python: the scripts' runs, without a trace in the process."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from predetr import finetune, pretrain
from tests.tiny import (
    FROZEN,
    ROOT,
    assert_same_logs,
    fine_tune,
    read_checkpoint,
    write_coco,
    write_images,
)
from util.errors import StopRequested, UserError

MODEL = {
    "backbone": "resnet18", "hidden_dim": 32, "nheads": 4, "dim_feedforward": 64, "enc_layers": 1,
    "dec_layers": 1, "num_queries": 20,
}  # fmt: skip
RUN: dict[str, Any] = {
    **MODEL, "device": "cpu", "num_workers": 0, "image_size": 64, "epochs": 1, "lr_backbone": 0,
    "backbone_norm": "frozen",
}  # fmt: skip


def process_state() -> dict[str, Any]:
    """Return what a run changes in the whole process, as plain values."""
    logger = logging.getLogger("predetr")
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "logger": (list(logger.handlers), logger.level, logger.propagate),
        "group": torch.distributed.is_initialized(),
    }


@pytest.fixture
def _unusual_process() -> Iterator[None]:
    """As in a notebook that begins with `torch.set_grad_enabled(False)`."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.usefixtures("_unusual_process")
def test_two_calls_are_the_runs_of_the_scripts_and_leave_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco, images = write_coco(tmp_path / "coco"), write_images(tmp_path / "images")
    before = process_state()
    pretrained = pretrain(
        images=images,
        output_dir=tmp_path / "pretrain",
        detector="conditional_detr",
        **{**RUN, "backbone_weights": "none", "num_patches": 5, "patch_size": 32, "tf32": "no"},
    )
    assert process_state() == before
    run = finetune(data=coco, pretrain=pretrained, output_dir=tmp_path / "run", **RUN, seed=3)
    assert process_state() == before
    printed = capsys.readouterr().out
    assert printed.count("epoch 1/1: 2/2") == 2
    assert printed.count("finished; checkpoints") == 2, "each line once, also in the second run"

    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    words = [word for name in ("hidden_dim", "nheads", "dim_feedforward", "enc_layers", "dec_layers")
             for word in (f"--{name}", MODEL[name])]  # fmt: skip
    fine_tune(
        *("--coco_path", coco, "--pretrain", tmp_path / "pretrain" / "checkpoint.pth"),
        *("--output_dir", tmp_path / "script", "--epochs", 1, "--seed", 3, *words, *FROZEN),
    )
    assert_same_logs(tmp_path / "run", tmp_path / "script")

    assert run.log == [json.loads(line) for line in (run.output_dir / "log.txt").open()]
    assert run.metrics["coco_eval_bbox"] == run.log[-1]["test_coco_eval_bbox"]
    assert run.best_checkpoint == tmp_path / "run" / "checkpoint_best.pth"
    assert run.page == tmp_path / "run" / "result.html"
    image = next((coco / "val2017").iterdir())
    prediction = run.predictor(device="cpu")(image, threshold=0.0)
    assert set(prediction.names) <= {"red", "green", "blue", *(f"class {i}" for i in range(91))}
    boxes = pretrained.predictor(device="cpu")(image, threshold=0.0)
    assert len(boxes.boxes) == MODEL["num_queries"], "class-agnostic: one box per query"


def test_an_interrupt_saves_the_run_and_resume_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco, train_step = write_coco(tmp_path / "coco"), engine.train_step

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr(engine, "train_step", train_step)
        signal.raise_signal(signal.SIGINT)  # what the interrupt of a notebook sends
        return train_step(*args)

    flags = {**RUN, "backbone_weights": "none", "dataset_file": "coco", "batch_size": 2}
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(engine, "train_step", interrupted)
    with pytest.raises(StopRequested, match=r"after batch 2 of 2; saved in .*--resume auto"):
        finetune(coco, output_dir=tmp_path / "run", **flags)
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["batch"] == 2

    run = finetune(coco, output_dir=tmp_path / "run", resume="auto", **flags)
    assert [entry["epoch"] for entry in run.log] == [0]


TWO_CALLS = """
import sys
import torch
from predetr import finetune, pretrain
run, folder = eval(sys.argv[1]), sys.argv[2]
pretrained = pretrain(f"{folder}/images", output_dir=f"{folder}/pretrain", backbone_weights="none",
                      num_patches=5, patch_size=32, **run)
assert not torch.distributed.is_initialized()
done = finetune(f"{folder}/coco", pretrain=pretrained, output_dir=f"{folder}/run", **run)
assert len(done.log) == 1, "complete on every rank"
"""


@pytest.mark.slow
def test_two_calls_under_torchrun(tmp_path: Path) -> None:
    """Each call joins a process group and leaves it."""
    write_coco(tmp_path / "coco")
    write_images(tmp_path / "images")
    (tmp_path / "two_calls.py").write_text(TWO_CALLS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "two_calls.py"), repr(RUN), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    environment = json.loads((tmp_path / "run" / "args.json").read_text())["environment"]
    assert environment["processes"] == "2"


@pytest.mark.parametrize(
    ("call", "flags", "message"),
    [
        (finetune, {"epoch": 1}, "epoch is no flag of finetune_main.py; did you mean epochs."),
        (finetune, {"num_patches": 4}, "num_patches is no flag of finetune_main.py, but of main.py"),
        (finetune, {"cache_mode": True}, "cache_mode is no flag of .*: image files are not kept.*"),
        (finetune, {"lr": "fast"}, "lr='fast': .*"),
        (finetune, {"data": "x", "coco_path": "y"}, "coco_path='y': the first argument .*"),
        (finetune, {"data": "x", "dataset_file": "custom"}, "data: dataset_file='custom' has no .*"),
        (finetune, {"data": "nowhere"}, "nowhere is not a folder: .*"),
        (pretrain, {"images": "x", "imagenet_path": "y"}, "imagenet_path='y': the first .*"),
        (pretrain, {"eval": True}, "--eval needs the model to evaluate: .*"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_line(
    call: Any, flags: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{message}$") as error:
        call(output_dir=tmp_path / "run", **flags)
    assert "\n" not in str(error.value)


def test_other_spellings_of_the_command_line() -> None:
    from util.settings import FINETUNE, arguments

    args = arguments(FINETUNE, {"no_aux_loss": True, "load_backbone": "none", "lr": None})
    assert (args.aux_loss, args.backbone_weights, args.lr) == (False, "none", None)
    with pytest.raises(UserError, match="no_aux_loss and aux_loss are the same flag"):
        arguments(FINETUNE, {"aux_loss": True, "no_aux_loss": True})


def test_a_run_without_a_checkpoint_has_no_predictor(tmp_path: Path) -> None:
    from predetr.runs import FinishedRun

    run = FinishedRun(tmp_path)
    assert (run.log, run.metrics, run.best_checkpoint, run.page) == ([], {}, None, None)
    with pytest.raises(UserError, match="has no checkpoint: the run did not train"):
        run.predictor()
    with pytest.raises(UserError, match="pretrain: .* has no checkpoint"):
        finetune("coco", pretrain=run, output_dir=tmp_path)
