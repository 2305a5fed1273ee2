"""AdamW or SGD with the published parameter groups, and the step schedule."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, StepLR

from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.logger import log


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    backbone_names: Sequence[str] = ("backbone",),
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = 0.1,
) -> list[dict]:
    """The published groups: all else at `lr`, the backbone (empty when it is frozen), and, where there are
    `linear_proj_names`, the projections of Deformable DETR at `lr` x `linear_proj_mult`. A parameter belongs to a group if a part of
    its name is among the group's names.

    Raises:
        UserError: names that no parameter has.
    """

    if lr_backbone <= 0:  # the CNN is frozen; a learned position code beside it is none of it
        backbone_names = ["backbone.0" if part == "backbone" else part for part in backbone_names]

    def named(name: str, parts: Sequence[str]) -> bool:
        return any(part in name for part in parts)

    for flag, parts in (
        ("--lr_backbone_names", backbone_names),
        ("--lr_linear_proj_names", linear_proj_names),
    ):
        if parts and not any(named(name, parts) for name, _ in model.named_parameters()):
            raise UserError(
                f"{flag} {' '.join(parts)}: no parameter of this model has such a name: correct it or leave it out"
            )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in trainable if named(name, backbone_names)]
    rest = [(name, p) for name, p in trainable if not named(name, backbone_names)]
    groups = [
        {"params": [p for name, p in rest if not named(name, linear_proj_names)], "lr": lr},
        {"params": backbone, "lr": lr_backbone},
    ]
    if linear_proj_names:
        groups.append(
            {
                "params": [p for name, p in rest if named(name, linear_proj_names)],
                "lr": lr * linear_proj_mult,
            }
        )
    return groups


def build_optimizer(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    backbone_names: Sequence[str] = ("backbone",),
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = 0.1,
    sgd: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9; fused on a GPU. Arguments are those of `parameter_groups`."""
    groups = parameter_groups(
        model, lr, lr_backbone, backbone_names, linear_proj_names, linear_proj_mult
    )
    fused = any(p.is_cuda for group in groups for p in group["params"])
    log.info(
        "%s%s: %s tensors",
        "SGD" if sgd else "AdamW",
        " (fused)" if fused else "",
        " + ".join(str(len(group["params"])) for group in groups),
    )
    if sgd:
        return torch.optim.SGD(
            groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused or None
        )
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)


def build_scheduler(
    optimizer: torch.optim.Optimizer, lr_drop: int, lr_drop_epochs: Sequence[int] | None = None
) -> LRScheduler:
    """Rates x 0.1 after every `lr_drop` epochs (or whatever it is stepped with), or after each number of epochs in
    `lr_drop_epochs`.
    """
    return (
        MultiStepLR(optimizer, sorted(lr_drop_epochs))
        if lr_drop_epochs
        else StepLR(optimizer, lr_drop)
    )


def _drop_epochs(state: dict) -> int | list[int]:
    """Of a scheduler's state: the period of its drops, or where they are."""
    return (
        state["step_size"]
        if "step_size" in state
        else sorted(Counter(state["milestones"]).elements())
    )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    checkpoint: Checkpoint,
    model: nn.Module,
) -> None:
    """Takes over moments and epoch count; the rates and the drops of this run's flags win over those in the file, and
    it is said.

    Parameters of `model` count as in the file's model, which may name them in another order (DETReg's Deformable DETR
    does).

    Raises:
        UserError: the file's optimiser is of other parameters.
    """
    wanted = [group["initial_lr"] for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    _check_same_groups(optimizer, checkpoint.optimizer["param_groups"])
    optimizer.load_state_dict(_in_own_order(optimizer, checkpoint, model))
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    stored_rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    stored, drops = _drop_epochs(checkpoint.lr_scheduler), _drop_epochs(scheduler.state_dict())
    if stored_rates == wanted and stored == drops:
        scheduler.load_state_dict(checkpoint.lr_scheduler)
        return
    log.info(
        "learning rates %s -> %s, --lr_drop %s -> %s: this run's settings win over the file's",
        stored_rates,
        wanted,
        stored,
        drops,
    )
    epochs = checkpoint.lr_scheduler["last_epoch"]
    scheduler.last_epoch, scheduler._step_count, scheduler.base_lrs = epochs, epochs + 1, wanted
    passed = epochs // drops if isinstance(drops, int) else sum(epoch <= epochs for epoch in drops)
    for group, lr in zip(optimizer.param_groups, wanted, strict=True):
        group["initial_lr"], group["lr"] = lr, lr * scheduler.gamma**passed
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _in_own_order(
    optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, model: nn.Module
) -> dict:
    """The file's state of the optimiser, whose groups hold numbers in place of parameters, with these in this
    optimiser's order.
    """
    place = {key: i for i, key in enumerate(checkpoint.model)}
    first: dict[int, int] = {}  # of a parameter that several names share, as an optimiser counts it
    for key, value in model.state_dict(keep_vars=True).items():
        first[id(value)] = min(first.get(id(value), len(place)), place.get(key, len(place)))
    stored = checkpoint.optimizer
    groups = []
    for group, own in zip(stored["param_groups"], optimizer.param_groups, strict=True):
        order = sorted(
            range(len(own["params"])),
            key=lambda i, own=own: first.get(id(own["params"][i]), len(place)),
        )
        numbers = [number for _, number in sorted(zip(order, group["params"], strict=True))]
        for parameter, number in zip(own["params"], numbers, strict=True):
            moment = next(
                (
                    value
                    for value in stored["state"].get(number, {}).values()
                    if getattr(value, "ndim", 0)
                ),
                parameter,
            )
            if moment.shape != parameter.shape:
                raise UserError(
                    "the checkpoint's optimiser counts its tensors in an order that its weights don't tell: start a "
                    "new run with --pretrain, or leave the optimiser out of the file"
                )
        # Where the state goes depends on it: fused steps lie on the GPU.
        groups.append(
            {**group, "params": numbers, "fused": own["fused"], "foreach": own["foreach"]}
        )
    return {**stored, "param_groups": groups}


def _check_same_groups(optimizer: torch.optim.Optimizer, stored: list[dict]) -> None:
    kinds = [
        "AdamW" if "betas" in group else "SGD" for group in (stored[0], optimizer.param_groups[0])
    ]
    if kinds[0] != kinds[1]:
        remedy = "add --sgd" if kinds[0] == "SGD" else "leave out --sgd"
        raise UserError(
            f"the checkpoint's optimiser is {kinds[0]}, this run's is {kinds[1]}: {remedy}, or start a new run "
            f"with --pretrain"
        )
    counts = [len(group["params"]) for group in optimizer.param_groups]
    stored_counts = [len(group["params"]) for group in stored]
    if counts != stored_counts:
        raise UserError(
            f"the checkpoint's optimiser holds {stored_counts} tensors (transformer and heads, backbone, slow "
            f"projections), this run trains {counts}: resume with the same --lr_backbone (0 freezes the backbone), "
            "--fre_cnn, --lr_backbone_names and --lr_linear_proj_names, or start a new run with --pretrain"
        )
