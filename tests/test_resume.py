"""A run that is stopped and resumed equals one that was never stopped: weights, optimizer, random states and log."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine
import finetune_main
import main as pretrain_main
import trainer
from models import build_model
from models.backbone import Backbone
from tests.tiny import (
    FROZEN,
    ROOT,
    RUN_FLAGS,
    assert_same,
    assert_same_logs,
    captured_log,
    fine_tune,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import StopRequested, UserError
from util.runs import compilation
from util.runs.session import start_session
from util.settings import FINETUNE, PRETRAIN

# The learning rate drops before the last epoch.
FLAGS = ("--epochs", 4, "--lr_drop", 3, "--lr", 1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_coco(root / "coco", train=5)
    write_images(root / "images", count=5)
    return root


def start_labelled(data: Path, *flags: object) -> None:
    fine_tune("--coco_path", data / "coco", *FLAGS, *flags)


def start_pretext(data: Path, *flags: object) -> None:
    images = ("--imagenet_path", data / "images")
    pre_train(*images, "--feature_recon", "--query_shuffle", *FLAGS, *flags)


TWO_STAGE = ("--detector", "deformable_detr", "--two_stage", "--with_box_refine")
CASES: dict[str, tuple[Callable, tuple]] = {
    # Live batch norm updates its statistics, but the backbone's weights are frozen, which keeps checkpoints small.
    "live": (start_labelled, ("--lr_backbone", 0)),
    "workers": (
        start_labelled,
        (*FROZEN, "--num_workers", 2, "--detector", "conditional_detr", "--amp", "fp16"),
    ),
    "pretext": (start_pretext, (*FROZEN, "--ema", 0.9)),
    "two_stage": (start_labelled, (*FROZEN, *TWO_STAGE, "--lr_drop_epochs", 1, 3)),
}
uninterrupted_runs: dict[str, Path] = {}


def uninterrupted_run(case: str, data: Path) -> Path:
    """Return the folder of the run that is never stopped. It is trained once."""
    if case not in uninterrupted_runs:
        start, flags = CASES[case]
        start(data, "--output_dir", data / case, *flags)
        uninterrupted_runs[case] = data / case
    return uninterrupted_runs[case]


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Compare weights, moments, schedule, progress, random states, best AP and every logged value."""
    ours = read_checkpoint(folder / "checkpoint.pth")
    whole = read_checkpoint(expected / "checkpoint.pth")
    training_state = ("model", "optimizer", "lr_scheduler", "best", "random_states")
    progress = ("epoch", "batch", "averages", "class_names")
    for name in ("raw_model", "scaler"):  # of --ema and --amp fp16
        assert_same(ours.get(name, {}), whole.get(name, {}), name)
    for name in (*training_state, *progress):
        assert_same(ours[name], whole[name], name)
    assert len(read_log(folder)) == 4
    assert_same_logs(folder, expected)


# ---------------------------------------------------------------------------------------------------- between epochs


# Slow: another detector, and a live backbone, which the test after the next one stops in mid-epoch.
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c in ("two_stage", "live") else c for c in CASES],
)
def test_resume_after_two_epochs_equals_four_epochs(case: str, data: Path, tmp_path: Path) -> None:
    start, flags = CASES[case]
    start(data, "--output_dir", tmp_path, *flags, "--epochs", 2)
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1
    torch.manual_seed(999)  # a new process has another random state
    with captured_log() as lines:
        start(data, "--output_dir", tmp_path, *flags, "--resume", "auto")
    assert "continuing at epoch 3 of 4" in lines
    assert_equal_runs(tmp_path, uninterrupted_run(case, data))


def test_epochs_differ_by_dropout_and_augmentation(data: Path) -> None:
    """Otherwise equal runs would not show that random states are restored."""
    losses = [line["train_loss"] for line in read_log(uninterrupted_run("live", data))]
    assert len(set(losses)) == 4
    assert read_checkpoint(data / "live" / "checkpoint.pth")["args"]["dropout"] == 0.1


@pytest.mark.parametrize("by_signal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stop_between_training_and_evaluation(
    by_signal: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch is saved before it is evaluated, so a signal stops immediately. The resumed run evaluates first."""
    evaluate = finetune_main.Evaluation.__call__
    start, flags = CASES["live"]

    def interrupted(self, model, epoch):
        if epoch == 1 and by_signal:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        elif epoch == 1:
            raise KeyboardInterrupt
        return evaluate(self, model, epoch)

    monkeypatch.setattr(finetune_main.Evaluation, "__call__", interrupted)
    with pytest.raises(
        StopRequested if by_signal else KeyboardInterrupt,
        match="during evaluation; saved in" if by_signal else None,
    ):
        start(data, "--output_dir", tmp_path, *flags)
    assert len(read_log(tmp_path)) == 1
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1
    monkeypatch.undo()
    start(data, "--output_dir", tmp_path, *flags, "--resume", "auto")
    assert_equal_runs(tmp_path, uninterrupted_run("live", data))


# ---------------------------------------------------------------------------------------------------- within an epoch


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process at the end of the given training step, counted over epochs from 1."""
    original, steps = engine.train_step, []

    def stopped(*args, **kwargs):
        result = original(*args, **kwargs)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(engine, "train_step", stopped)


@pytest.mark.parametrize(
    ("case", "step", "number"),
    [
        ("live", 3, signal.SIGTERM),
        pytest.param("pretext", 3, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("pretext", 4, signal.SIGTERM, marks=pytest.mark.slow),
        ("pretext", 8, signal.SIGUSR1),
    ],
)
def test_stop_at_the_end_of_an_epoch(
    case: str, step: int, number: int, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """Epochs have two steps. The flag of step 4, the last of epoch 2, reports a signal after step 3.

    No flag reports a signal after step 4, or after the last step of all.
    """
    start, flags = CASES[case]
    stop_at(monkeypatch, step, number)
    with pytest.raises(StopRequested, match=r"after batch 2 of 2; saved in .*--resume auto"):
        start(data, "--output_dir", tmp_path, *flags)
    monkeypatch.undo()
    stopped, epochs_before = read_checkpoint(tmp_path / "checkpoint.pth"), (step - 1) // 2
    assert (stopped["epoch"], stopped["batch"]) == (epochs_before - 1, 2)
    assert len(read_log(tmp_path)) == epochs_before
    start(data, "--output_dir", tmp_path, *flags, "--resume", "auto")
    assert_equal_runs(tmp_path, uninterrupted_run(case, data))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # restored


def test_maps_computed_ahead_change_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with a frozen backbone, here also stopped in an epoch, after the next batch was fetched."""
    used: list[bool] = []
    maps = Backbone.maps

    def counted(
        backbone: Backbone, images: torch.Tensor, mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        if backbone.training:
            used.append(backbone._ahead is not None and backbone._ahead[0].is_set_to(images))
        return maps(backbone, images, mask)

    def ahead() -> None:
        monkeypatch.setattr(engine, "looks_ahead", lambda *_: True)
        monkeypatch.setattr(Backbone, "maps", counted)

    start, flags = CASES["pretext"]
    ahead()
    stop_at(monkeypatch, 3)
    with pytest.raises(StopRequested):
        start(data, "--output_dir", tmp_path, *flags)
    monkeypatch.undo()
    ahead()
    used.clear()
    start(data, "--output_dir", tmp_path, *flags, "--resume", "auto")
    assert used[-4:] == [False, True, False, True]  # epochs of two steps
    assert_equal_runs(tmp_path, uninterrupted_run("pretext", data))


def test_stop_in_the_middle_of_a_longer_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs have five steps. The log of the resumed epoch averages all of them."""
    flags = ("--backbone_norm", "frozen", "--batch_size", 1, "--epochs", 2, "--num_workers", 2)
    flags = (*flags, "--log_every", 2)
    start_labelled(data, "--output_dir", tmp_path / "whole", *flags)
    stop_at(monkeypatch, 7)
    with pytest.raises(StopRequested, match="epoch 2, after batch 3 of 5"):
        start_labelled(data, "--output_dir", tmp_path / "stopped", *flags)
    monkeypatch.undo()
    with captured_log() as lines:
        start_labelled(data, "--output_dir", tmp_path / "stopped", *flags, "--resume", "auto")
    assert "continuing at epoch 2 of 2, batch 3" in lines
    whole, ours = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "stopped")
    )
    assert_same(ours["model"], whole["model"])
    assert_same(ours["optimizer"], whole["optimizer"])
    assert_same_logs(tmp_path / "stopped", tmp_path / "whole")

    whole, ours = (
        [json.loads(line) for line in (tmp_path / name / "log_steps.txt").read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    assert [(line["epoch"], line["step"]) for line in ours] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    # A run that stops reads its last gradient norm then, so that the next line has none.
    ignored = {"images_per_second", "grad_norm"}
    for a, b in zip(whole, ours, strict=True):
        assert a.keys() >= {"loss", "loss_ce", "lr", "images_per_second"}
        assert {k: a[k] for k in a.keys() - ignored} == {k: b[k] for k in b.keys() - ignored}


def test_stop_with_accumulated_gradients(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has five batches, that is three steps of two, two and one. A run stops between steps only."""
    flags = (*FROZEN, "--batch_size", 1, "--accumulate", 2, "--max_iters", 5, "--lr_drop_iters", 4)

    def start(name: str, *more: object) -> None:
        coco = ("--coco_path", data / "coco")
        fine_tune(*coco, "--output_dir", tmp_path / name, *flags, "--lr", 1e-3, *more)

    start("whole")
    stop_at(monkeypatch, 6)
    with pytest.raises(StopRequested, match="epoch 2, after batch 2 of 4"):
        start("stopped")
    monkeypatch.undo()
    start("stopped", "--resume", "auto")
    whole, ours = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "stopped")
    )
    assert_same(ours["model"], whole["model"])
    assert_same(ours["optimizer"], whole["optimizer"])
    assert_same_logs(tmp_path / "stopped", tmp_path / "whole")
    assert ours["lr_scheduler"]["last_epoch"] == 5
    assert {int(state["step"]) for state in ours["optimizer"]["state"].values()} == {5}


@pytest.mark.slow
def test_resume_of_a_compiled_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, by a backend that rounds and draws dropout as the uncompiled operations do."""
    lookup = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lookup("eager"))
    # Tracing a backbone takes seconds.
    monkeypatch.setattr(compilation, "PARTS", {"encoder": "transformer.encoder"})
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", compilation.RECOMPILE_LIMIT)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = (*FROZEN, "--batch_size", 1, "--epochs", 1, "--compile")

    def start(folder: Path, *more: object) -> None:
        torch._dynamo.reset()  # a new process has no graphs
        with captured_log() as lines:
            start_pretext(data, "--output_dir", folder, *flags, *more)
        assert any("graphs compiled so far: encoder" in line for line in lines)

    start(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StopRequested, match="after batch 3 of 5"):
            start(stopped)
    start(stopped, "--resume", "auto")
    torch._dynamo.reset()
    ours, expected = (read_checkpoint(folder / "checkpoint.pth") for folder in (stopped, whole))
    for name in ("model", "optimizer", "random_states"):
        assert_same(ours[name], expected[name], name)
    assert_same_logs(stopped, whole)


def test_stop_in_the_only_step_of_an_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one step per epoch every signal comes in the last step, and must not be lost."""
    stop_at(monkeypatch, 1)
    with pytest.raises(StopRequested):
        start_pretext(data, "--output_dir", tmp_path, *FROZEN, "--batch_size", 5)
    monkeypatch.undo()
    start_pretext(data, "--output_dir", tmp_path, *FROZEN, "--batch_size", 5, "--resume", "auto")
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2, 3]


def test_stop_without_output_dir_warns_that_nothing_was_saved(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 1)
    with pytest.raises(StopRequested, match="not saved: no --output_dir"):
        start_pretext(data, *FROZEN, "--batch_size", 1)


def test_sigterm_to_a_training_process(tmp_path: Path) -> None:
    """Exit status 143, one line that says how to continue, and a checkpoint of exactly that step."""
    command = [
        sys.executable, "finetune_main.py", *RUN_FLAGS, *FROZEN,
        "--coco_path", write_coco(tmp_path / "coco", train=300), "--output_dir", tmp_path / "run",
        "--batch_size", "1", "--log_every", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # The last line before training.
        assert any(line.startswith("optimizer: ") for line in process.stdout)
        while not (tmp_path / "run" / "log_steps.txt").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, rest
    line = rest.strip().splitlines()[-1]
    last = re.fullmatch(
        r"stopped: epoch 1, after batch (\d+) of 300; saved in (.*); continue with --resume auto",
        line,
    )
    assert last, rest
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert (checkpoint["epoch"], checkpoint["batch"]) == (-1, int(last[1]))
    assert last[2] == str(tmp_path / "run")
    assert 0 < checkpoint["batch"] < 300


# -------------------------------------------------------------------------------------- what can be resumed


def test_resume_auto_without_checkpoint_starts_from_scratch(data: Path, tmp_path: Path) -> None:
    with captured_log() as lines:
        start_pretext(
            data, *FROZEN, "--epochs", 1, "--output_dir", tmp_path / "new", "--resume", "auto"
        )
    assert any("--resume auto" in line and "starting from scratch" in line for line in lines)
    assert read_checkpoint(tmp_path / "new" / "checkpoint.pth")["epoch"] == 0


def test_resume_of_a_finished_run_trains_nothing(data: Path, tmp_path: Path) -> None:
    start_pretext(data, *FROZEN, "--epochs", 1, "--output_dir", tmp_path)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with captured_log() as lines:
        start_pretext(data, *FROZEN, "--epochs", 1, "--output_dir", tmp_path, "--resume", "auto")
    assert any("nothing to train" in line and "--epochs is 1" in line for line in lines)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def published_checkpoint(path: Path) -> dict:
    """Save a DETR checkpoint as the published code does with PyTorch 1.5: pickled Namespace, steps as int."""
    torch.manual_seed(1)
    args = tiny_args(FINETUNE, "--backbone_norm", "frozen")
    model, _, _ = build_model(args)
    optimizer = trainer.build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    state, groups = {}, []
    for group in optimizer.param_groups:
        # PyTorch 1.5 numbers parameters by their memory addresses.
        ids = [140_000_000_000 + len(state) + i for i in range(len(group["params"]))]
        for key, parameter in zip(ids, group["params"], strict=True):
            state[key] = {
                "step": 7,
                "exp_avg": torch.full_like(parameter, 1e-3),
                "exp_avg_sq": torch.full_like(parameter, 1e-3),
            }
        groups.append(
            {
                "lr": group["lr"],
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 1e-4,
                "amsgrad": False,
                "initial_lr": group["lr"],
                "params": ids,
            }
        )
    schedule = {
        "step_size": 200,
        "gamma": 0.1,
        "base_lrs": [1e-4, 1e-5],
        "last_epoch": 2,
        "_step_count": 3,
        "_last_lr": [1e-4, 1e-5],
    }
    settings = Namespace(
        lr=1e-4,
        lr_backbone=1e-5,
        batch_size=2,
        epochs=300,
        lr_drop=200,
        backbone="resnet18",
        dilation=False,
        nheads=4,
        position_embedding="sine",
        hidden_dim=32,
        num_queries=20,
        pre_norm=False,
        masks=False,
        frozen_weights=None,
        output_dir="exps",
        aux_loss=True,
        dataset_file="coco",
        distributed=True,
    )
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": {"state": state, "param_groups": groups},
        "lr_scheduler": schedule,
        "epoch": 1,
        "args": settings,
    }
    torch.save(checkpoint, path)
    return checkpoint


def test_resume_of_a_published_checkpoint(data: Path, tmp_path: Path) -> None:
    published = published_checkpoint(tmp_path / "theirs.pth")
    with captured_log() as lines:
        fine_tune(
            "--coco_path", data / "coco", "--resume", tmp_path / "theirs.pth",
            "--output_dir", tmp_path / "ours", "--epochs", 4,
        )  # fmt: skip
    assert "continuing at epoch 3 of 4" in lines
    assert [line["epoch"] for line in read_log(tmp_path / "ours")] == [2, 3]
    ours = read_checkpoint(tmp_path / "ours" / "checkpoint.pth")
    steps = {int(state["step"]) for state in ours["optimizer"]["state"].values()}
    assert steps == {7 + 2 * 2}, "two epochs of two steps"
    assert list(ours["model"]) == list(published["model"])
    frozen = "backbone.0.body.layer1.0.conv1.weight"
    assert torch.equal(ours["model"][frozen], published["model"][frozen])


def test_resume_of_a_published_checkpoint_adopts_its_schedule(data: Path, tmp_path: Path) -> None:
    checkpoint = published_checkpoint(tmp_path / "theirs.pth")
    vars(checkpoint["args"]).update(epochs=3, lr_drop=400, lr_backbone=5e-5, clip_max_norm=0.5)
    checkpoint["lr_scheduler"].update(step_size=400, base_lrs=[1e-4, 5e-5])
    checkpoint["optimizer"]["param_groups"][1].update(lr=5e-5, initial_lr=5e-5)
    torch.save(checkpoint, tmp_path / "theirs.pth")
    with captured_log() as lines:
        fine_tune(
            "--coco_path", data / "coco", "--resume", tmp_path / "theirs.pth",
            "--output_dir", tmp_path / "ours",
        )  # fmt: skip
    assert "continuing at epoch 3 of 3" in lines
    assert not any("replace those of the checkpoint" in line for line in lines)
    ours = read_checkpoint(tmp_path / "ours" / "checkpoint.pth")
    assert [group["initial_lr"] for group in ours["optimizer"]["param_groups"]] == [1e-4, 5e-5]
    assert (ours["lr_scheduler"]["step_size"], ours["args"]["clip_max_norm"]) == (400, 0.5)


def test_evaluation_of_a_published_checkpoint(data: Path, tmp_path: Path) -> None:
    published_checkpoint(tmp_path / "theirs.pth")
    flags = [
        "--batch_size", "2", "--eval", "--no_aux_loss", "--coco_path", str(data / "coco"),
        "--resume", str(tmp_path / "theirs.pth"), "--device", "cpu", "--image_size", "64",
        "--num_workers", "0",
    ]  # fmt: skip
    with captured_log() as lines:
        finetune_main.main(finetune_main.parse(flags))
    assert any(line.startswith("AP ") for line in lines)


def test_resume_of_weights_only_starts_a_new_optimizer(data: Path, tmp_path: Path) -> None:
    torch.save(
        {"model": published_checkpoint(tmp_path / "theirs.pth")["model"]}, tmp_path / "weights.pth"
    )
    with captured_log() as lines:
        fine_tune(
            "--coco_path", data / "coco", "--resume", tmp_path / "weights.pth", "--start_epoch", 2,
            "--epochs", 3, "--output_dir", tmp_path / "run", "--lr_backbone", 0,
            "--backbone_norm", "frozen", "--nheads", 4,
        )  # fmt: skip
    assert any("weights only" in line and "from epoch 3" in line for line in lines)
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert checkpoint["epoch"] == 2
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {2}


def test_given_learning_rate_replaces_the_stored_one_and_is_logged(
    data: Path, tmp_path: Path
) -> None:
    start_pretext(data, *FROZEN, "--epochs", 2, "--output_dir", tmp_path)
    with captured_log() as lines:
        start_pretext(
            data, *FROZEN, "--epochs", 3, "--output_dir", tmp_path, "--resume", "auto",
            "--lr", 5e-3, "--lr_drop", 2,
        )  # fmt: skip
    assert any("0.001" in line and "0.005" in line and "--lr_drop 3 -> 2" in line for line in lines)
    lrs = [line["train_lr"] for line in read_log(tmp_path)]
    assert lrs == pytest.approx([1e-3, 1e-3, 5e-4]), "the drop after 2 epochs counts"


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_batch_size_or_world_size_continues_the_epoch(
    world_size: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five images: two of them with one batch size, the others with another one. None comes twice.

    Two processes of one image each save what one process with a batch of two saves, but for the random states.
    """
    before, after = ((1, 2), (2, 1))[world_size - 1]
    flags = (*FROZEN, "--epochs", 1, "--output_dir", tmp_path)
    original, seen = engine.train_step, []

    def recorded(run, samples, targets, stop, *place):
        seen.extend(targets.tensors["image_id"].tolist())
        return original(run, samples, targets, len(seen) == 2, *place)

    monkeypatch.setattr(engine, "train_step", recorded)
    monkeypatch.setattr(pretrain_main, "train", lambda run, *_: trainer.fit(run))  # no pictures
    with pytest.raises(StopRequested):
        start_pretext(data, *flags, "--batch_size", before)
    path = tmp_path / "checkpoint.pth"
    checkpoint = read_checkpoint(path)
    assert checkpoint["position_unit"] == [5, before]
    assert checkpoint["batch"] * before == len(seen) == 2
    states = checkpoint["random_states"] * world_size
    save_checkpoint({**checkpoint, "random_states": states}, path)

    with captured_log() as lines:
        start_pretext(data, *flags, "--batch_size", after, "--resume", "auto")
    assert any(f"{after} images per step instead of {before}" in line for line in lines)
    assert any("2 processes and this run has 1" in line for line in lines) is (world_size == 2)
    assert len(seen) == len(set(seen)) == 2 + 3 // after * after
    steps = {int(state["step"]) for state in read_checkpoint(path)["optimizer"]["state"].values()}
    assert steps == {2 // before + 3 // after}


def test_given_weight_decay_replaces_the_stored_one(data: Path, tmp_path: Path) -> None:
    start_pretext(data, *FROZEN, "--epochs", 1, "--output_dir", tmp_path)
    start_pretext(
        data, *FROZEN, "--epochs", 2, "--output_dir", tmp_path, "--resume", "auto",
        "--weight_decay", 0.5,
    )  # fmt: skip
    groups = read_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}


def test_batch_norm_statistics_of_a_frozen_backbone_stay_fixed(data: Path, tmp_path: Path) -> None:
    """Trained with live batch norm, then frozen by `--lr_backbone 0`: the running statistics are those of the file."""
    fine_tune(
        "--coco_path", data / "coco", "--output_dir", tmp_path / "live", "--backbone_norm", "live",
        "--epochs", 1,
    )  # fmt: skip
    fine_tune(
        "--coco_path", data / "coco", "--output_dir", tmp_path / "frozen",
        "--pretrain", tmp_path / "live" / "checkpoint.pth", "--lr_backbone", 0, "--epochs", 1,
    )  # fmt: skip
    live, frozen = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("live", "frozen")
    )
    assert (live["args"]["backbone_norm"], frozen["args"]["backbone_norm"]) == ("live", "frozen")
    for key, value in live["model"].items():
        if key.startswith("backbone."):
            assert torch.equal(frozen["model"][key], value), key


def test_resume_adopts_settings_that_are_not_given(data: Path, tmp_path: Path) -> None:
    """`--resume` alone continues with the settings of the run; a given flag wins."""
    start_pretext(
        data, *FROZEN, "--epochs", 2, "--output_dir", tmp_path, "--batch_size", 1,
        "--clip_max_norm", 0.3, "--num_workers", 0,
    )  # fmt: skip
    flags = [
        "--resume", "auto", "--output_dir", str(tmp_path), "--epochs", "3", "--bbox_loss_coef", "4",
        "--device", "cpu",
    ]  # fmt: skip
    args = start_session(pretrain_main.parse(flags)).settings
    stored = read_checkpoint(tmp_path / "checkpoint.pth")["args"]
    changed = {name for name, value in stored.items() if getattr(args, name, None) != value}
    assert changed <= {"resume", "epochs", "bbox_loss_coef", "num_workers"}
    assert (args.batch_size, args.clip_max_norm, args.lr, args.hidden_dim, args.imagenet_path) == (
        1,
        0.3,
        1e-3,
        32,
        str(data / "images"),
    )
    assert (args.epochs, args.bbox_loss_coef) == (3, 4.0)


@pytest.mark.parametrize("stored", ["imagenet", "none"])
@pytest.mark.parametrize("flags", [["--resume"], ["--eval", "--resume"], ["--pretrain"]])
def test_a_loaded_detector_downloads_no_backbone_weights(
    stored: str, flags: list[str], tmp_path: Path
) -> None:
    """The run started from downloaded weights. Resuming or evaluating it needs none of them."""
    path = save_model(tmp_path / "checkpoint.pth", FINETUNE, "--backbone_norm", "frozen")
    settings = {
        **tiny_args(FINETUNE).as_dict(),
        "backbone_weights": stored,
        "backbone_norm": "frozen",
    }
    save_checkpoint({**read_checkpoint(path), "args": settings}, path)
    args = start_session(finetune_main.parse([*flags, str(path), "--coco_path", "P"])).settings
    assert (args.backbone, args.backbone_weights, args.backbone_norm) == (
        "resnet18",
        "none",
        "frozen",
    )


def save_model(path: Path, script: str, *flags: str) -> Path:
    args = tiny_args(script, *flags)
    model, _, _ = build_model(args)
    save_checkpoint(
        {"model": model.state_dict(), "args": {"nheads": 4, "pretext": args.pretext}}, path
    )
    return path


def test_resume_refuses_checkpoints_of_another_kind(data: Path, tmp_path: Path) -> None:
    pretext = save_model(tmp_path / "pretext.pth", PRETRAIN)
    detector = save_model(tmp_path / "detector.pth", FINETUNE)
    coco, images = ("--coco_path", data / "coco"), ("--imagenet_path", data / "images")
    for start, flags, words in (
        (fine_tune, (*coco, "--resume", pretext), "pass it as --pretrain"),
        (pre_train, (*images, "--resume", detector), "can only resume its own"),
        (
            fine_tune,
            (*coco, "--resume", detector, "--num_queries", 30),
            "--num_queries 30 contradicts",
        ),
        (fine_tune, (*coco, "--resume", detector, "--pre_norm"), "--pre_norm on contradicts"),
        (fine_tune, (*coco, "--resume", tmp_path / "none.pth"), "none.pth"),
        (
            fine_tune,
            (*coco, "--resume", detector, "--detector", "conditional_detr"),
            "--detector conditional_detr contradicts",
        ),
    ):
        with pytest.raises(UserError, match=words) as error:
            start(*flags, "--dry_run")
        assert "\n" not in str(error.value)


def test_requeued_job_uses_pretrain_once(data: Path, tmp_path: Path) -> None:
    """A requeued job keeps its command: --pretrain counts in the first start, --resume auto afterwards."""
    pretext = save_model(tmp_path / "pretext.pth", PRETRAIN, *FROZEN)
    flags = (
        "--coco_path", data / "coco", "--pretrain", pretext, "--resume", "auto",
        "--output_dir", tmp_path / "run", *FROZEN,
    )  # fmt: skip
    with captured_log() as first:
        fine_tune(*flags, "--epochs", 1)
    assert any("re-initialized" in line for line in first)
    with captured_log() as second:
        fine_tune(*flags, "--epochs", 2)
    assert any("--pretrain is no longer needed" in line for line in second)
    assert not any("re-initialized" in line for line in second)
    assert "continuing at epoch 2 of 2" in second
