"""Check that a file has exactly the parameters of its detector."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoints.adoption import adopt_architecture, pretext_prefixes
from util.checkpoints.architecture import strip_detr_prefix
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import count_classes
from util.errors import UserError
from util.settings import FINETUNE, Settings, resolve
from util.settings.registry import DETECTORS

# Names that a file may have in addition to detector and pretext: DETR's mask head, and buffers of batch norm and of
# FLOP counters.
IGNORED_NAMES = re.compile(
    r"mask_head\.(lay\d|gn\d|out_lay|adapter\d)\.(weight|bias)|bbox_attention\.[qk]_(linear|proj)\.(weight|bias)"
    # Names of the mask head in version 5 of transformers.
    r"|mask_head\.(conv\d|fpn_stages\.\d\.refine)\.(conv|norm)\.(weight|bias)"
    r"|mask_head\.(fpn_stages\.\d\.fpn_adapter|output_conv)\.(weight|bias)"
    r"|.*\.?(num_batches_tracked|total_ops|total_params)"
)


def detector_settings(checkpoint: Checkpoint) -> Settings:
    """Return the settings that `finetune_main.py --resume` would use to build the checkpoint's detector.

    Raises:
        UserError: the file contains no detector, or one that this version does not have.
    """
    adopted, _ = adopt_architecture(checkpoint, {})
    if adopted["detector"] not in DETECTORS:
        raise UserError(
            f"{checkpoint.source} contains the detector {adopted['detector']}, which this version does not have "
            f"({', '.join(DETECTORS)}); choose another file"
        )
    # The file has the backbone's weights: nothing to download.
    return resolve({"backbone_weights": "none", "device": "cpu"}, adopted, FINETUNE)


def check_parameters(
    checkpoint: Checkpoint, build_model: Callable[..., tuple[nn.Module, Any, Any]]
) -> None:
    """Compare names and shapes with a model of the same architecture, built on the meta device.

    Args:
        build_model: `models.build_model`. It is an argument because `util` does not import `models`.

    Raises:
        UserError: see `detector_settings` and `check_state_dict`.
    """
    # A focal head has one row per class, so that any head can be compared without knowing its classification.
    settings = detector_settings(checkpoint).replace(classification="focal")
    state = strip_detr_prefix(checkpoint.model)
    with torch.device("meta"):
        target = build_model(settings, count_classes(state, "focal") or 1)[0].state_dict()
    check_state_dict(state, target, detector=settings.detector, source=checkpoint.source)


def check_state_dict(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, detector: str, source: str
) -> None:
    """Compare a state dict with that of its detector.

    The whole class head may be missing: converters drop the one of a pretext.

    Args:
        detector: name of the detector. source: path of the file. Both are for the messages.

    Raises:
        UserError: names are unknown or missing, or shapes differ; with their number and the first three.
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
        if key not in target
        and not key.startswith(pretext_prefixes())
        and not IGNORED_NAMES.fullmatch(key)
    ]

    problems = (
        (unknown, f"has {len(unknown)} names that are unknown in a {detector} of any codebase"),
        (missing, f"lacks {len(missing)} of the {len(target)} tensors of its {detector}"),
        (shapes, f"has {len(shapes)} tensors with other shapes than its {detector}"),
    )
    for keys, problem in problems:
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            raise UserError(
                f"{source} {problem}: {', '.join(keys[:3])}{more}; check that the file is complete and from a "
                "codebase in docs/model_zoo.md"
            )
