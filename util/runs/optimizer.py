"""AdamW or SGD with the published parameter groups, the step schedule, and restoring both from a checkpoint."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, StepLR

from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.logger import log

FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    backbone_names: Sequence[str] = ("backbone",),
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = 0.1,
) -> list[dict]:
    """Return the published parameter groups, trainable parameters only.

    1. everything else, with learning rate `lr`
    2. the backbone, with `lr_backbone`; empty if it is frozen
    3. only with `linear_proj_names`: the linear projections of Deformable DETR, with `lr` * `linear_proj_mult`

    Args:
        backbone_names, linear_proj_names: a parameter belongs to a group if its name contains one of these.

    Raises:
        UserError: no parameter has one of these names.
    """
    if lr_backbone <= 0:
        # Only the CNN is frozen. A learned positional encoding (backbone.1) still trains, in the first group.
        backbone_names = ["backbone.0" if part == "backbone" else part for part in backbone_names]

    def matches(name: str, parts: Sequence[str]) -> bool:
        return any(part in name for part in parts)

    for flag, parts in (
        ("--lr_backbone_names", backbone_names),
        ("--lr_linear_proj_names", linear_proj_names),
    ):
        if parts and not any(matches(name, parts) for name, _ in model.named_parameters()):
            raise UserError(
                f"{flag} {' '.join(parts)}: no parameter of this model has such a name; correct or omit it"
            )

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in trainable if matches(name, backbone_names)]
    rest = [(name, p) for name, p in trainable if not matches(name, backbone_names)]
    groups = [
        {"params": [p for name, p in rest if not matches(name, linear_proj_names)], "lr": lr},
        {"params": backbone, "lr": lr_backbone},
    ]
    if linear_proj_names:
        projections = [p for name, p in rest if matches(name, linear_proj_names)]
        groups.append({"params": projections, "lr": lr * linear_proj_mult})
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
    """Build AdamW, or SGD with momentum 0.9, for the groups of `parameter_groups`. Fused on GPUs and CPUs."""
    groups = parameter_groups(
        model, lr, lr_backbone, backbone_names, linear_proj_names, linear_proj_mult
    )
    # One operation per group and device instead of 12 per parameter.
    fused = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
    names = ("transformer and heads", "backbone", "linear projections")
    parts = [
        f"{name} {len(group['params'])} tensors at lr {group['lr']:g}"
        for name, group in zip(names, groups, strict=False)
        if group["params"]
    ]
    kind = "SGD" if sgd else "AdamW"
    log.info("optimizer: %s%s; %s", kind, " (fused)" if fused else "", ", ".join(parts))
    if sgd:
        return torch.optim.SGD(
            groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused or None
        )
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)


def clip_gradient(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale the gradient to a norm of at most `max_norm` and return its norm before, a scalar on the device.

    max_norm: 0 or less leaves the gradient as it is.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # `foreach`: by default a CPU calls several operations per parameter.
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def step_if_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Step, unless the gradient norm is NaN or infinite: weights, moments and step counts then stay as they are.

    The host does not wait for the norm: a fused optimizer decides on the device. Other ones make it wait.
    """
    skip = (~torch.isfinite(norm)).float()  # []
    if not all(group["fused"] for group in optimizer.param_groups):
        if not skip:
            optimizer.step()
        return
    # By these two attributes a loss scaler tells a fused optimizer what it found.
    optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def build_scheduler(
    optimizer: torch.optim.Optimizer, lr_drop: int, lr_drop_epochs: Sequence[int] | None = None
) -> LRScheduler:
    """Build the schedule: learning rates x 0.1 after every `lr_drop` epochs, or at each of `lr_drop_epochs`.

    With `--max_iters` the schedule is stepped per iteration, and `lr_drop` counts iterations.
    """
    if lr_drop_epochs:
        return MultiStepLR(optimizer, sorted(lr_drop_epochs))
    return StepLR(optimizer, lr_drop)


def _drop_epochs(state: Mapping[str, Any] | None) -> int | list[int] | None:
    """Return the period of a schedule's drops, or the sorted list of its drop epochs, from its state dict.

    None for a schedule of another kind, such as cosine, or without its position.
    """
    if not state or not isinstance(state.get("last_epoch"), int):
        return None
    if isinstance(state.get("step_size"), int):
        return state["step_size"]
    milestones = state.get("milestones")  # MultiStepLR stores a Counter
    if isinstance(milestones, Mapping | list | tuple):
        return sorted(Counter(milestones).elements())
    return None


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    checkpoint: Checkpoint,
    model: nn.Module,
) -> None:
    """Restore the moments and the epoch of a checkpoint. Where settings differ, those of this run win.

    Learning rates, weight decay and drops of this run replace the stored ones; changed learning rates and drops are
    logged. The parameters may have another order in the checkpoint, as in DETReg's Deformable DETR: they are matched by
    the order of the names in its model.

    Raises:
        UserError: the checkpoint's optimizer is of another type or has other parameters.
    """
    lrs = [group["initial_lr"] for group in optimizer.param_groups]
    weight_decays = [group["weight_decay"] for group in optimizer.param_groups]

    _check_same_groups(optimizer, checkpoint.optimizer["param_groups"])
    optimizer.load_state_dict(_reorder_state(optimizer, checkpoint, model))
    _match_memory_format(optimizer)
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay

    stored_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    stored_drops = _drop_epochs(checkpoint.lr_scheduler)
    drops = _drop_epochs(scheduler.state_dict())
    if stored_drops is None:
        log.info(
            "the checkpoint's learning rate schedule is missing or of another kind than --lr_drop: the one of this run "
            "replaces it, after %d epochs",
            checkpoint.epoch + 1,
        )
        _fast_forward(optimizer, scheduler, lrs, checkpoint.epoch + 1)
        return
    if stored_lrs == lrs and stored_drops == drops:
        scheduler.load_state_dict(checkpoint.lr_scheduler)
        return

    log.info(
        "learning rates %s -> %s, --lr_drop %s -> %s: the settings of this run replace those of the checkpoint",
        stored_lrs,
        lrs,
        stored_drops,
        drops,
    )
    _fast_forward(optimizer, scheduler, lrs, checkpoint.lr_scheduler["last_epoch"])


def _fast_forward(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, lrs: list[float], epochs: int
) -> None:
    """Put a new schedule where it would be after a number of epochs, as if it had been used from the start."""
    drops = _drop_epochs(scheduler.state_dict())
    if isinstance(drops, int):
        num_drops = epochs // drops
    else:
        assert drops is not None  # `build_scheduler` builds no other kind
        num_drops = sum(epoch <= epochs for epoch in drops)

    scheduler.last_epoch = epochs
    scheduler._step_count = epochs + 1  # the constructor counts as a step
    scheduler.base_lrs = lrs
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["initial_lr"] = lr
        group["lr"] = lr * scheduler.gamma**num_drops
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _reorder_state(
    optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, model: nn.Module
) -> dict:
    """Return the stored optimizer state with the parameters of each group in the order of this optimizer.

    An optimizer's state dict knows no names: its groups contain numbers that count parameters in the order of the model
    that wrote it. The order of names in the checkpoint's `model` tells which number belongs to which parameter.
    """
    stored = checkpoint.optimizer
    positions = _stored_positions(checkpoint, model)
    last = len(checkpoint.model)  # for parameters that the checkpoint does not have

    groups = []
    for group, own_group in zip(stored["param_groups"], optimizer.param_groups, strict=True):
        parameters = own_group["params"]
        ranks = [positions.get(id(parameter), last) for parameter in parameters]
        # order[k]: which of our parameters is the k-th of the stored group.
        order = sorted(range(len(parameters)), key=ranks.__getitem__)
        numbers = [number for _, number in sorted(zip(order, group["params"], strict=True))]

        for parameter, number in zip(parameters, numbers, strict=True):
            _check_moment_shape(parameter, stored["state"].get(number, {}))
        # Fused steps need their state on the GPU, and load_state_dict decides by these two where it puts it.
        implementation = {"fused": own_group["fused"], "foreach": own_group["foreach"]}
        groups.append({**group, "params": numbers, **implementation})
    return {**stored, "param_groups": groups}


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format of their parameters.

    Published checkpoints store them contiguous, and convolutions are channels-last here. A fused step walks through
    parameter and moments in memory order: on a CPU it would pair the wrong elements, on a GPU it raises.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # `step` is a scalar and has no format.
            if (
                isinstance(value, torch.Tensor)
                and value.ndim
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _stored_positions(checkpoint: Checkpoint, model: nn.Module) -> dict[int, int]:
    """Return id(parameter) -> its position in the checkpoint's model."""
    index = {key: i for i, key in enumerate(checkpoint.model)}
    last = len(index)
    positions: dict[int, int] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        # A parameter with several names is counted at the first of them, as an optimizer does.
        positions[id(value)] = min(positions.get(id(value), last), index.get(key, last))
    return positions


def _check_moment_shape(parameter: torch.Tensor, state: dict) -> None:
    for value in state.values():
        if getattr(value, "ndim", 0):  # not `step`, a number or a scalar tensor
            if value.shape != parameter.shape:
                raise UserError(
                    "the checkpoint's optimizer counts its tensors in an order that its weights don't tell; start a "
                    "new run with --pretrain, or remove the optimizer from the file"
                )
            return


def _optimizer_kind(group: Mapping[str, Any]) -> str | None:
    if "betas" in group:
        return "AdamW"
    return "SGD" if "nesterov" in group else None


def _check_same_groups(optimizer: torch.optim.Optimizer, stored: list[dict]) -> None:
    stored_kind, own_kind = map(_optimizer_kind, (stored[0], optimizer.param_groups[0]))
    if stored_kind is None:
        raise UserError(
            "the checkpoint's optimizer is neither AdamW nor SGD "
            f"(its settings: {', '.join(map(str, stored[0]))}); start a new run with --pretrain"
        )
    if stored_kind != own_kind:
        remedy = "add --sgd" if stored_kind == "SGD" else "omit --sgd"
        raise UserError(
            f"the checkpoint's optimizer is {stored_kind}, this run's is {own_kind}; {remedy}, or start a new run "
            "with --pretrain"
        )
    counts = [len(group["params"]) for group in optimizer.param_groups]
    stored_counts = [len(group["params"]) for group in stored]
    if counts != stored_counts:
        raise UserError(
            f"the checkpoint's optimizer has {stored_counts} tensors (transformer and heads, backbone, linear "
            f"projections), this run trains {counts}; resume with the same --lr_backbone (0 freezes the backbone), "
            "--fre_cnn, --lr_backbone_names and --lr_linear_proj_names, or start a new run with --pretrain"
        )
