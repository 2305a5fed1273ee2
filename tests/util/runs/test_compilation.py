"""`--compile`: which modules are compiled, into how many graphs, with which values, and what happens if they can't be.

The backend "eager" runs what dynamo traced, operation by operation: it is exact and needs no compiler.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from models import build_model
from tests.tiny import captured_log, make_batch, make_targets, tiny_args
from util.runs import compilation
from util.runs.compilation import PARTS, Compilation
from util.settings import FINETUNE, PRETRAIN
from util.settings.registry import DETECTORS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def build(script: str, *flags: str) -> tuple:
    torch.manual_seed(0)
    small = ("--dec_layers", "1", "--dropout", "0", "--backbone_norm", "frozen")
    model, criterion, _ = build_model(tiny_args(script, *small, *flags))
    return model.train(), criterion.train()


def losses_and_gradients(model, criterion, targets) -> dict[str, torch.Tensor]:
    samples = make_batch([(64, 64), (64, 48)])
    outputs = model(samples, targets) if model.needs_targets else model(samples)
    losses = criterion(outputs, targets)
    criterion.total_loss(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: loss.detach() for name, loss in losses.items()}, **gradients}


@pytest.mark.parametrize("detector", DETECTORS)
def test_three_modules_are_compiled_under_their_own_names(detector: str) -> None:
    model, _ = build(FINETUNE, "--detector", detector)
    names = list(model.state_dict())
    Compilation(model, "eager")
    assert list(model.state_dict()) == names
    assert {name for name, module in model.named_modules() if module._compiled_call_impl} == {
        "backbone.0",
        "transformer.encoder",
        "transformer.decoder",
    }


@pytest.mark.parametrize(
    ("detector", "parts"),
    [
        ("detr", ["encoder", "decoder"]),  # tracing a backbone takes seconds
        *(pytest.param(name, list(PARTS), marks=pytest.mark.slow) for name in DETECTORS),
    ],
)
def test_no_graph_breaks_and_equal_values(
    monkeypatch: pytest.MonkeyPatch, detector: str, parts: list[str]
) -> None:
    model, criterion = build(FINETUNE, "--detector", detector)
    targets = make_targets([2, 1])
    expected = losses_and_gradients(model, criterion, targets)
    model.zero_grad()

    monkeypatch.setattr(compilation, "PARTS", {part: PARTS[part] for part in parts})
    compiled = Compilation(model, "eager")
    found = losses_and_gradients(model, criterion, targets)
    # One graph each: a break would make two.
    assert compiled.counts == dict.fromkeys(parts, 1)
    assert not counters["graph_break"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_pretext_with_frozen_backbone() -> None:
    model, criterion = build(PRETRAIN, "--feature_recon", "--fre_cnn")
    targets = make_targets([5, 5], patches=5)
    compiled = Compilation(model.base_detector(), "eager")
    losses_and_gradients(model, criterion, targets)
    # The backbone also reads the patches, without gradients and at their size.
    assert compiled.counts == {"backbone": 2, "encoder": 1, "decoder": 1}
    assert not counters["graph_break"]


def test_fall_back_with_one_line_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "PARTS", {"encoder": "transformer.encoder"})

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nwith a long explanation")

    model, _ = build(FINETUNE)
    samples = make_batch()
    expected = model(samples)["pred_boxes"]
    with captured_log() as lines:
        compiled = Compilation(model, no_compiler)
        found = [model(samples)["pred_boxes"], model(make_batch(3))["pred_boxes"]]
    assert torch.equal(found[0], expected)
    assert [line for line in lines if "uncompiled" in line] == [
        "--compile: the encoder runs uncompiled (no C++ compiler)"
    ]
    assert compiled.counts == {}


def test_counts_are_logged_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "PARTS", {"encoder": "transformer.encoder"})
    model, _ = build(FINETUNE)
    with captured_log() as lines:
        compiled = Compilation(model, "eager")
        for count in (2, 2, 3):
            compiled.counts["encoder"] = count
            compiled.log_counts()
    assert lines[1:] == [f"--compile: graphs compiled so far: encoder {count}" for count in (2, 3)]
