"""Optimisers, the rate schedule and its changes over a resume."""

import pytest
import torch
from torch import nn

from tests.tiny import captured_log
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.runs.optimizer import build_optimizer, build_scheduler, restore_optimizer


def stepped(optimizer: torch.optim.Optimizer, scheduler, epochs: int) -> list[float]:
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def optimizer_of(sgd: bool = False, lr: float = 1.0) -> torch.optim.Optimizer:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    return build_optimizer(model, lr, lr, 0.0, sgd=sgd)


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--lr_backbone_names", {"backbone_names": ["bakcbone"]}),
        ("--lr_linear_proj_names", {"linear_proj_names": ["reference_point"]}),
    ],
)
def test_names_that_no_parameter_has_are_an_error(flag: str, names: dict) -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "reference": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=f"{flag} .*no parameter"):
        build_optimizer(model, 1.0, 1.0, 0.0, **names)
    groups = build_optimizer(
        model, 1.0, 1.0, 0.0, linear_proj_names=["sampling_offsets", "reference"]
    ).param_groups
    assert [len(group["params"]) for group in groups] == [0, 2, 2]


def test_drops_at_given_epochs() -> None:
    optimizer = optimizer_of()
    assert stepped(optimizer, build_scheduler(optimizer, 99, [3, 1]), 5) == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01]
    )
    optimizer = optimizer_of()
    assert stepped(optimizer, build_scheduler(optimizer, 2), 5) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [((9, [1, 3]), (9, [1, 3])), ((2, None), (9, [1, 4])), ((9, [1, 3]), (2, None))],
)
def test_schedules_resume(before: tuple, after: tuple) -> None:
    """The rates of a resumed run are those of its own schedule from where the file stopped, and a change is said."""
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, *before)
    stepped(optimizer, scheduler, 2)
    file = {
        "model": {},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
    }
    resumed = optimizer_of()
    schedule = build_scheduler(resumed, *after)
    with captured_log() as lines:
        restore_optimizer(resumed, schedule, Checkpoint(**file), nn.Module())
    assert any("--lr_drop" in line for line in lines) is (before != after)
    whole = optimizer_of()
    expected = stepped(whole, build_scheduler(whole, *after), 6)[2:]
    assert stepped(resumed, schedule, 4) == pytest.approx(expected)


def test_sgd_and_adamw_do_not_mix() -> None:
    optimizer = optimizer_of(sgd=True)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    file = {
        "model": {},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": build_scheduler(optimizer, 2).state_dict(),
    }
    adamw = optimizer_of()
    with pytest.raises(UserError, match="SGD.*AdamW.*--sgd"):
        restore_optimizer(adamw, build_scheduler(adamw, 2), Checkpoint(**file), nn.Module())


def three_parts(*names: str) -> nn.ModuleDict:
    sizes = {
        "backbone": (2, 2),
        "transformer": (3, 3),
        "class_embed": (3, 4),
        "feature_embed": (3, 3),
        "bbox_embed": (3, 5),
    }
    model = nn.ModuleDict({name: nn.Linear(*sizes[name]) for name in names})
    model["copy"] = model[
        "class_embed"
    ]  # one parameter of two names, as the heads of decoder layers
    return model


def test_moments_follow_the_names_of_the_file() -> None:
    """DETReg's Deformable DETR has its embedding amid the detector's heads: in the file's order moments would be of
    other tensors.
    """
    theirs = three_parts("backbone", "transformer", "class_embed", "feature_embed", "bbox_embed")
    optimizer = build_optimizer(theirs, 1.0, 1.0, 0.0)
    for parameter in theirs.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    file = {
        "model": theirs.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": build_scheduler(optimizer, 2).state_dict(),
    }
    ours = three_parts("transformer", "class_embed", "bbox_embed", "backbone", "feature_embed")
    resumed = build_optimizer(ours, 1.0, 1.0, 0.0)
    restore_optimizer(resumed, build_scheduler(resumed, 2), Checkpoint(**file), ours)
    for name, parameter in ours.named_parameters():
        assert torch.equal(
            resumed.state[parameter]["exp_avg"],
            optimizer.state[theirs.get_parameter(name)]["exp_avg"],
        ), name

    file["model"] = dict(reversed(file["model"].items()))  # an order that is not the optimiser's
    with pytest.raises(UserError, match="in an order that its weights don't tell"):
        restore_optimizer(resumed, build_scheduler(resumed, 2), Checkpoint(**file), ours)


def test_state_of_another_device_goes_where_the_fused_optimizer_needs_it() -> None:
    """Fused AdamW wants its step counts on the device of the parameters; a file from a CPU has neither them there nor
    the mark.
    """
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(model, 1.0, 1.0, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = build_scheduler(optimizer, 9)
    file = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }
    elsewhere = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)}).to("meta")
    resumed = build_optimizer(elsewhere, 1.0, 1.0, 0.0)
    for group in resumed.param_groups:
        group["fused"] = True
    restore_optimizer(resumed, build_scheduler(resumed, 9), Checkpoint(**file), elsewhere)
    assert {state["step"].device.type for state in resumed.state.values()} == {"meta"}
    assert all(group["fused"] for group in resumed.param_groups)


def test_a_learned_position_code_learns_beside_a_frozen_backbone() -> None:
    model = nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)}
    )
    model["backbone"][0].requires_grad_(False)
    for rate, counts in ((0.0, [4, 0]), (0.5, [2, 2])):
        assert [
            len(group["params"]) for group in build_optimizer(model, 1.0, rate, 0.0).param_groups
        ] == counts
