"""`--activation_checkpoint`: encoder layers and backbone blocks that compute their activations again in the backward
pass instead of keeping them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.detector import Detector
from util.distributed import BATCH_NORMS


def checkpoint_activations(detector: Detector) -> int:
    """Make encoder layers and the trainable blocks of the backbone forget their activations. Return their number.

    Gradients, random states of dropout and parameter names stay the same.
    """
    modules = dict(detector.named_modules())
    encoder = modules.get("transformer.encoder")
    parts = [*getattr(encoder, "layers", []), *_backbone_blocks(detector.backbone[0].body)]
    for part in parts:
        # A partial of a bound method: a deep copy of the module then calls its own.
        part.forward = functools.partial(_forward_checkpointed, part.forward)
    return len(parts)


def _forward_checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _backbone_blocks(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the residual blocks of a network: the items of its stages, or of a transformer's list of blocks.

    Frozen blocks keep nothing anyway. Live batch norm would count each batch twice.
    """
    for child in getattr(body, "model", body).children():
        if not isinstance(child, nn.Sequential | nn.ModuleList):
            continue
        for block in child:
            if isinstance(block, nn.Sequential):
                yield from filter(_can_repeat, block)
            elif _can_repeat(block):
                yield block


def _can_repeat(block: nn.Module) -> bool:
    trains = any(parameter.requires_grad for parameter in block.parameters())
    return trains and not any(isinstance(module, BATCH_NORMS) for module in block.modules())
