"""Optimizers, learning rate schedules, and changing them on resume."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import captured_log
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.runs.optimizer import build_optimizer, build_scheduler, clip_gradient, restore_optimizer


def run_epochs(optimizer: torch.optim.Optimizer, scheduler, epochs: int) -> list[float]:
    lrs = []
    for _ in range(epochs):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


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
def test_unmatched_parameter_names_are_an_error(flag: str, names: dict) -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "reference": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=f"{flag} .*no parameter"):
        build_optimizer(model, 1.0, 1.0, 0.0, **names)
    groups = build_optimizer(
        model, 1.0, 1.0, 0.0, linear_proj_names=["sampling_offsets", "reference"]
    ).param_groups
    assert [len(group["params"]) for group in groups] == [0, 2, 2]


def test_learning_rate_drops() -> None:
    optimizer = optimizer_of()
    assert run_epochs(optimizer, build_scheduler(optimizer, 99, [3, 1]), 5) == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01]
    )
    optimizer = optimizer_of()
    assert run_epochs(optimizer, build_scheduler(optimizer, 2), 5) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [((9, [1, 3]), (9, [1, 3])), ((2, None), (9, [1, 4])), ((9, [1, 3]), (2, None))],
)
def test_resumed_schedule(before: tuple, after: tuple) -> None:
    """A resumed run follows its own schedule from the stored epoch on. A changed schedule is logged."""
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, *before)
    run_epochs(optimizer, scheduler, 2)
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
    expected = run_epochs(whole, build_scheduler(whole, *after), 6)[2:]
    assert run_epochs(resumed, schedule, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    "stored",
    [
        None,
        {},
        {"T_max": 10, "eta_min": 0.0, "base_lrs": [1.0, 1.0], "last_epoch": 2, "_step_count": 3},
        {"base_lrs": [1.0, 1.0], "last_epoch": 2, "lr_lambdas": [None, None]},
        {"step_size": 2},
    ],
)
def test_schedule_of_another_kind_is_replaced(stored: dict | None) -> None:
    """The schedule of this run starts where it would be after the stored epochs, with the stored moments."""
    before, resumed = optimizer_of(), optimizer_of()
    for parameter in before.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    before.step()
    file = {"model": {}, "optimizer": before.state_dict(), "lr_scheduler": stored, "epoch": 2}
    schedule = build_scheduler(resumed, 2)
    with captured_log() as lines:
        restore_optimizer(resumed, schedule, Checkpoint(**file), nn.Module())
    assert any("missing or of another kind" in line and "after 3 epochs" in line for line in lines)
    assert resumed.state, "the moments are used"
    assert run_epochs(resumed, schedule, 3) == pytest.approx([0.1, 0.01, 0.01])


def test_optimizer_of_another_kind_is_refused() -> None:
    optimizer = optimizer_of()
    rmsprop = torch.optim.RMSprop([nn.Parameter(torch.zeros(1))]).state_dict()
    file = {"model": {}, "optimizer": rmsprop, "lr_scheduler": None, "epoch": 2}
    with pytest.raises(UserError, match="neither AdamW nor SGD.*alpha.*--pretrain"):
        restore_optimizer(optimizer, build_scheduler(optimizer, 2), Checkpoint(**file), nn.Module())


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


def small_model(*names: str) -> nn.ModuleDict:
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
    ]  # a parameter with two names, like the heads of decoder layers
    return model


def test_moments_are_matched_by_the_order_of_names() -> None:
    """DETReg's Deformable DETR has `feature_embed` between the heads: by position alone, moments would be mixed up."""
    theirs = small_model("backbone", "transformer", "class_embed", "feature_embed", "bbox_embed")
    optimizer = build_optimizer(theirs, 1.0, 1.0, 0.0)
    for parameter in theirs.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    file = {
        "model": theirs.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": build_scheduler(optimizer, 2).state_dict(),
    }
    ours = small_model("transformer", "class_embed", "bbox_embed", "backbone", "feature_embed")
    resumed = build_optimizer(ours, 1.0, 1.0, 0.0)
    restore_optimizer(resumed, build_scheduler(resumed, 2), Checkpoint(**file), ours)
    for name, parameter in ours.named_parameters():
        assert torch.equal(
            resumed.state[parameter]["exp_avg"],
            optimizer.state[theirs.get_parameter(name)]["exp_avg"],
        ), name

    file["model"] = dict(reversed(file["model"].items()))  # not the optimizer's order
    with pytest.raises(UserError, match="in an order that its weights don't tell"):
        restore_optimizer(resumed, build_scheduler(resumed, 2), Checkpoint(**file), ours)


def test_cpu_state_moves_to_the_device_of_a_fused_optimizer() -> None:
    """Fused AdamW needs `step` on the device of the parameters. A checkpoint from a CPU has it on the host, and is not
    marked as fused.
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


def test_learned_positional_encoding_trains_with_a_frozen_backbone() -> None:
    model = nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)}
    )
    model["backbone"][0].requires_grad_(False)
    for lr_backbone, counts in ((0.0, [4, 0]), (0.5, [2, 2])):
        groups = build_optimizer(model, 1.0, lr_backbone, 0.0).param_groups
        assert [len(group["params"]) for group in groups] == counts


def conv_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 5, 3), "head": nn.Linear(4, 2)})
    return model.to(memory_format=torch.channels_last)


def step_with_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    optimizer.step()


@pytest.mark.parametrize("sgd", [False, True])
def test_contiguous_moments_beside_channels_last_parameters(sgd: bool) -> None:
    """Published optimizer states are contiguous. A fused step that paired their elements with those of a channels-last
    parameter in memory order was wrong by 1e-3.
    """
    plain = conv_model()
    groups = build_optimizer(plain, 1e-3, 1e-3, 0.1, sgd=sgd).param_groups
    kwargs = {"lr": 1e-3, "weight_decay": 0.1, "fused": False, "foreach": False}
    if sgd:
        kwargs["momentum"] = 0.9
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    reference = kind([{"params": group["params"]} for group in groups], **kwargs)
    for seed in range(3):
        step_with_gradients(reference, plain, seed)

    stored = copy.deepcopy(reference.state_dict())
    for state in stored["state"].values():
        for name, value in state.items():
            state[name] = value.contiguous()
    file = {"model": plain.state_dict(), "optimizer": stored, "lr_scheduler": None, "epoch": 0}

    resumed_model = conv_model()
    resumed_model.load_state_dict(plain.state_dict())
    resumed = build_optimizer(resumed_model, 1e-3, 1e-3, 0.1, sgd=sgd)
    assert all(group["fused"] for group in resumed.param_groups)
    restore_optimizer(resumed, build_scheduler(resumed, 9), Checkpoint(**file), resumed_model)
    for parameter, state in resumed.state.items():
        moments = [value for value in state.values() if value is not None and value.ndim]
        assert moments
        assert all(value.stride() == parameter.stride() for value in moments)
    for seed in range(3, 6):
        step_with_gradients(reference, plain, seed)
        step_with_gradients(resumed, resumed_model, seed)
    for ours, expected in zip(resumed_model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_optimizer_step_has_few_operations() -> None:
    """Two per group that trains, and clipping a fixed number, not some per parameter."""
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(20))
    model = nn.ModuleDict({"backbone": nn.Linear(3, 3), "head": layers})
    optimizer = build_optimizer(model, 1e-3, 1e-4, 0.1)
    step_with_gradients(optimizer, model, 0)  # creates the moments
    with RecordOperations() as clipping:
        clip_gradient(optimizer, 0.1)
    assert len(clipping.names) < 12
    with RecordOperations() as step:
        optimizer.step()
    assert step.names == 2 * ["_foreach_add_", "_fused_adamw_"]


class RecordOperations(TorchDispatchMode):
    """Records the names of the ATen operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
