"""Whether a file holds exactly the parameters of the detector that it seems to be."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoints.adoption import adopt_architecture, pretext_parts
from util.checkpoints.architecture import without_detr_prefix
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import class_rows
from util.errors import UserError
from util.settings import FINETUNE, Settings, resolve
from util.settings.registry import DETECTORS

# What files hold beside a detector and the parts of a pretext: a mask head, and what counters leave behind.
BESIDE = re.compile(
    r"mask_head\.(lay\d|gn\d|out_lay|adapter\d)\.(weight|bias)|bbox_attention\.[qk]_linear\.(weight|bias)"
    r"|.*\.?(num_batches_tracked|total_ops|total_params)"
)


def detector_settings(checkpoint: Checkpoint) -> Settings:
    """The resolved flags of `finetune_main.py` with the architecture of the checkpoint, as `--resume` would adopt them.

    Raises:
        UserError: the file holds no detector, or one that this version does not build.
    """
    adopted, _ = adopt_architecture(checkpoint, {})
    if adopted["detector"] not in DETECTORS:
        raise UserError(
            f"{checkpoint.source} holds {adopted['detector']}, which this version does not build "
            f"({', '.join(DETECTORS)})"
        )
    return resolve({"backbone_weights": "none", "device": "cpu"}, adopted, FINETUNE)


def check_parameters(
    checkpoint: Checkpoint, build_model: Callable[..., tuple[nn.Module, Any, Any]]
) -> None:
    """Compares names and shapes with a model of the same architecture, which is built on the meta device.

    build_model: `models.build_model`, which this package lies below.

    Raises:
        UserError: see `detector_settings` and `check_names`.
    """
    settings = detector_settings(checkpoint).replace(
        classification="focal"
    )  # whatever the head means, it has rows
    state = without_detr_prefix(checkpoint.model)
    with torch.device("meta"):
        target = build_model(settings, class_rows(state, "focal") or 1)[0].state_dict()
    check_names(state, target, kind=settings.detector, source=checkpoint.source)


def check_names(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, kind: str, source: str
) -> None:
    """Compares a state dict with that of a detector of this `kind`; `source` names the file in errors.

    The class head may be missing as a whole: converters drop that of a pretext.

    Raises:
        UserError: with the first names that are unknown, missing, or of another shape, and their number.
    """
    shapes = [
        f"{key} {list(value.shape)} (not {list(target[key].shape)})"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    headless = not any("class_embed" in key for key in state)
    missing = [
        key for key in target if key not in state and not (headless and "class_embed" in key)
    ]
    unknown = [
        key
        for key in state
        if key not in target and not key.startswith(pretext_parts()) and not BESIDE.fullmatch(key)
    ]
    for keys, problem in (
        (unknown, f"has {len(unknown)} names that are unknown in a {kind} of any code base"),
        (missing, f"lacks {len(missing)} of the {len(target)} tensors of its {kind}"),
        (shapes, f"has {len(shapes)} tensors of other shapes than its {kind}"),
    ):
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            raise UserError(
                f"{source} {problem}: {', '.join(keys[:3])}{more}; check that the file is whole and of a code base "
                "that docs/model_zoo.md lists"
            )
