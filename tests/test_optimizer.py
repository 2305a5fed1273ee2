"""Optimisers, the rate schedule and its changes over a resume."""
import pytest
import torch
from tiny import logged
from torch import nn

from util.logger import UserError
from util.optimizer import build_optimizer, build_scheduler, restore_optimizer


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


def test_drops_at_given_epochs() -> None:
    optimizer = optimizer_of()
    assert stepped(optimizer, build_scheduler(optimizer, 99, [3, 1]), 5) == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    optimizer = optimizer_of()
    assert stepped(optimizer, build_scheduler(optimizer, 2), 5) == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(("before", "after"), [((9, [1, 3]), (9, [1, 3])), ((2, None), (9, [1, 4])), ((9, [1, 3]), (2, None))])
def test_schedules_resume(before: tuple, after: tuple) -> None:
    """The rates of a resumed run are those of its own schedule from where the file stopped, and a change is said."""
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, *before)
    stepped(optimizer, scheduler, 2)
    file = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    resumed = optimizer_of()
    schedule = build_scheduler(resumed, *after)
    with logged() as lines:
        restore_optimizer(resumed, schedule, file)
    assert any("--lr_drop" in line for line in lines) is (before != after)
    whole = optimizer_of()
    expected = stepped(whole, build_scheduler(whole, *after), 6)[2:]
    assert stepped(resumed, schedule, 4) == pytest.approx(expected)


def test_sgd_and_adamw_do_not_mix() -> None:
    optimizer = optimizer_of(sgd=True)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    file = {"optimizer": optimizer.state_dict(), "lr_scheduler": build_scheduler(optimizer, 2).state_dict()}
    adamw = optimizer_of()
    with pytest.raises(UserError, match="SGD.*AdamW.*--sgd"):
        restore_optimizer(adamw, build_scheduler(adamw, 2), file)
