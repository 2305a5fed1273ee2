"""Memory of a training step: the estimate, what is free, and `--batch_size auto`."""

from pathlib import Path

import pytest
import torch

import engine
import memory
from datasets import build_labelled
from memory import estimate_memory, largest_side, plan_memory
from models import build_model
from tests.tiny import (
    assert_same,
    captured_log,
    tiny_args,
    write_coco,
)
from util.errors import UserError
from util.runs.memory import MemoryEstimate, parameter_bytes
from util.settings import FINETUNE, PRETRAIN

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "coco", train=6)


def build(coco: Path, *flags: str) -> tuple:
    settings = tiny_args(FINETUNE, "--coco_path", str(coco), *flags)
    train_set, _ = build_labelled(settings, None)
    torch.manual_seed(0)
    model, criterion, _ = build_model(settings)
    return settings, model, criterion, train_set, CPU


def test_estimate_changes_nothing_and_counts_the_optimizer(coco: Path) -> None:
    """With live batch norm and dropout, which a forward pass would change."""
    parts = build(coco, "--backbone_norm", "live")
    model = parts[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate = estimate_memory(*parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same({**model.state_dict()}, before)

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.parameters == 3 * 4 * trainable == parameter_bytes(model, "adamw")
    assert parameter_bytes(model, "sgd") == 2 * 4 * trainable
    everything = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert parameter_bytes(model, "sgd", averaged=True) == 2 * 4 * trainable + everything
    assert estimate.activations > 4 * 3 * largest_side(parts[0]) ** 2


def test_maps_computed_ahead_are_counted(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build(coco, "--lr_backbone", "0", "--backbone_norm", "frozen")
    plain = estimate_memory(*parts).activations
    monkeypatch.setattr(engine, "looks_ahead", lambda *_: True)
    side = largest_side(parts[0])
    # Images, and three times the output of the stem: 64 channels at half the resolution.
    expected = 4 * (3 * side**2 + 3 * 64 * (-(-side // 2)) ** 2)
    assert estimate_memory(*parts).activations - plain == pytest.approx(expected, rel=1e-2)


def test_activations_grow_with_the_image_and_shrink_with_checkpoints(coco: Path) -> None:
    small, large = (
        estimate_memory(*build(coco, "--max_size", str(side))).activations for side in (96, 192)
    )
    assert 3 < large / small < 6
    parts = build(coco, "--max_size", "192", "--activation_checkpoint", "--backbone_norm", "frozen")
    kept = estimate_memory(*parts).activations
    with captured_log() as lines:
        plan_memory(*parts)
    assert estimate_memory(*parts).activations < 0.8 * kept
    assert "--activation_checkpoint: 7 layers and blocks" in lines[0]


def test_the_largest_batch_that_fits() -> None:
    estimate = MemoryEstimate(parameters=100, activations=10)
    assert [estimate.largest_batch(free) for free in (99, 109, 110, 195.0)] == [0, 0, 1, 9]
    assert estimate.step(9) == 190


def test_sides() -> None:
    assert largest_side(tiny_args(FINETUNE, "--image_size", "800")) == 1333
    assert largest_side(tiny_args(PRETRAIN, "--image_size", "240")) == 300
    assert largest_side(tiny_args(FINETUNE, "--max_size", "512")) == 512
    assert largest_side(tiny_args(FINETUNE, "--max_size", "500", "--bucket_aspect")) == 512


def plan(monkeypatch: pytest.MonkeyPatch, coco: Path, free: int | None, auto: bool) -> tuple:
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    monkeypatch.setattr(memory, "estimate_memory", lambda *args: MemoryEstimate(100, 10))
    with captured_log() as lines:
        settings = plan_memory(*build(coco), auto)
    return settings.batch_size, lines


def test_batch_size_auto(monkeypatch: pytest.MonkeyPatch, coco: Path) -> None:
    """It fills 70 % of the memory of a CPU, is at most the dataset, and the smallest of all ranks."""
    assert plan(monkeypatch, coco, 200, True)[0] == 4
    assert plan(monkeypatch, coco, 10**6, True)[0] == 6  # images of the dataset
    with pytest.raises(UserError, match="2 images need .* are free: lower --image_size"):
        plan(monkeypatch, coco, 160, True)
    with pytest.raises(UserError, match="does not tell its free memory"):
        plan(monkeypatch, coco, None, True)
    monkeypatch.setattr(memory, "all_gather_object", lambda own: [own, 3])
    assert plan(monkeypatch, coco, 200, True)[0] == 3


def test_warning_where_a_step_may_not_fit(monkeypatch: pytest.MonkeyPatch, coco: Path) -> None:
    assert "available" in plan(monkeypatch, coco, 121, False)[1][-1]
    batch_size, lines = plan(monkeypatch, coco, 119, False)
    assert batch_size == 2
    assert "may not fit into memory" in lines[-1]
