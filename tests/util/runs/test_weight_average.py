"""Moving averages of the weights."""

import json
from pathlib import Path

import torch
from torch import nn

from tests.tiny import FROZEN, assert_same, fine_tune, read_checkpoint, read_log, write_coco
from util.runs.weight_average import WeightAverage


def test_average_follows_the_weights() -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(2, 2), "frozen": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)}
    )
    model["alias"] = model["head"]
    model["frozen"].requires_grad_(False)
    average = WeightAverage(model, 0.75)
    assert average.state["alias.weight"] is average.state["head.weight"]
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model["head"].parameters():
                parameter.add_(torch.randn_like(parameter))
        model["norm"](torch.randn(4, 2))
        average.update()
        for name, value in model.state_dict().items():
            moved = 0.75 * expected[name] + 0.25 * value if value.is_floating_point() else value
            expected[name] = moved.clone()
    for name, value in average.state.items():
        torch.testing.assert_close(value, expected[name], msg=name)

    own = {name: value.clone() for name, value in model.state_dict().items()}
    parameter = model["head"].weight
    with average.applied():
        assert_same(dict(model.state_dict()), average.state)
    assert_same(dict(model.state_dict()), own)
    assert model["head"].weight is parameter  # the optimizer's


def test_averages_are_evaluated_and_saved(tmp_path: Path) -> None:
    """`--eval` evaluates the averages, with the values of the log; `--ema 0` chooses the weights without it."""
    data = ("--coco_path", write_coco(tmp_path / "coco", train=4, val=2))
    fine_tune(
        *data, *FROZEN, "--output_dir", tmp_path / "run", "--epochs", 1, "--lr", 1e-2, "--ema", 0.5
    )
    file = tmp_path / "run" / "checkpoint.pth"
    content = read_checkpoint(file)
    different = [
        k for k, v in content["model"].items() if not torch.equal(v, content["raw_model"][k])
    ]
    assert "class_embed.bias" in different
    losses = {}
    for name, flags in (("average", ()), ("raw", ("--ema", 0))):
        fine_tune(*data, "--resume", file, "--eval", "--output_dir", tmp_path / name, *flags)
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["loss"]
    assert losses["average"] == read_log(tmp_path / "run")[0]["test_loss"]
    assert losses["raw"] != losses["average"]
