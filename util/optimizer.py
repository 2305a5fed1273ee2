"""AdamW with the published parameter groups, and the step schedule."""
import torch
from torch import nn

from util.logger import UserError, log


def parameter_groups(model: nn.Module, lr: float, lr_backbone: float) -> list[dict]:
    """Two groups as published: all but the backbone, and the backbone (empty when it is frozen)."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if "backbone" not in name], "lr": lr},
        {"params": [p for name, p in trainable if "backbone" in name], "lr": lr_backbone},
    ]


def build_optimizer(model: nn.Module, lr: float, lr_backbone: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused on a GPU."""
    groups = parameter_groups(model, lr, lr_backbone)
    fused = any(p.is_cuda for group in groups for p in group["params"])
    log.info("AdamW%s: %s tensors", " (fused)" if fused else "", " + ".join(str(len(group["params"])) for group in groups))
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.StepLR, checkpoint: dict
) -> None:
    """Takes over moments and epoch count; the rates and the drop of this run's flags win over those in the file, and it is said."""
    wanted = [group["initial_lr"] for group in optimizer.param_groups]
    own = [{name: group[name] for name in ("weight_decay", "fused", "foreach")} for group in optimizer.param_groups]
    step_size = scheduler.step_size
    counts = [len(group["params"]) for group in optimizer.param_groups]
    stored_counts = [len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]]
    if counts != stored_counts:
        raise UserError(
            f"the checkpoint's optimiser holds {stored_counts} tensors (all but backbone, backbone), this run trains {counts}: "
            "resume with the same --lr_backbone (0 freezes the backbone) and --fre_cnn, or start a new run with --pretrain"
        )
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    scheduler.load_state_dict(checkpoint["lr_scheduler"])
    stored = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if stored == wanted and scheduler.step_size == step_size:
        return
    log.info("learning rates %s -> %s, --lr_drop %s -> %s: this run's flags win over the checkpoint's",
             stored, wanted, scheduler.step_size, step_size)
    scheduler.step_size, scheduler.base_lrs = step_size, wanted
    drops = scheduler.last_epoch // step_size
    for group, lr in zip(optimizer.param_groups, wanted, strict=True):
        group["initial_lr"], group["lr"] = lr, lr * scheduler.gamma**drops
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
