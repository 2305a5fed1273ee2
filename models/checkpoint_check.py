"""Whether a file holds exactly the parameters of the detector that it seems to be."""

import re
from argparse import Namespace

import torch

from models import build_model
from util.checkpoints.architecture import without_detr_prefix
from util.checkpoints.checkpoint import Checkpoint, adopt_architecture, pretext_parts
from util.checkpoints.classes import class_rows
from util.errors import UserError
from util.settings.arguments import make_parser, resolve
from util.settings.flags import FINETUNE
from util.settings.registry import DETECTORS

# What files hold beside a detector and the parts of a pretext: a mask head, and what counters leave behind.
BESIDE = re.compile(
    r"mask_head\.(lay\d|gn\d|out_lay|adapter\d)\.(weight|bias)|bbox_attention\.[qk]_linear\.(weight|bias)"
    r"|.*\.?(num_batches_tracked|total_ops|total_params)"
)


def detector_settings(checkpoint: Checkpoint) -> Namespace:
    """The resolved flags of `finetune_main.py` with the architecture of the checkpoint, as `--resume` would adopt them.

    Raises:
        UserError: the file holds no detector, or one that this version does not build.
    """
    args = make_parser(FINETUNE).parse_args([])
    adopt_architecture(checkpoint, args, set())
    if args.detector not in DETECTORS:
        raise UserError(
            f"{checkpoint.source} holds {args.detector}, which this version does not build ({', '.join(DETECTORS)})"
        )
    args.backbone_weights, args.device = "none", "cpu"
    return resolve(args)


def check_parameters(checkpoint: Checkpoint) -> None:
    """Compares names and shapes with a model of the same architecture, which is built without memory for its weights.
    The class head may be missing as a whole: converters leave that of a pretext out.

    Raises:
        UserError: with the first names that are unknown, missing, or of another shape, and their number.
    """
    args = detector_settings(checkpoint)
    state = without_detr_prefix(checkpoint["model"])
    outputs = class_rows(state, "focal")
    args.classification, args.num_classes = "focal", outputs or 1  # whatever the head means, it has as many rows
    with torch.device("meta"):
        target = build_model(args)[0].state_dict()
    kind, source = args.detector, checkpoint.source
    shapes = [
        f"{key} {list(value.shape)} (not {list(target[key].shape)})"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    headless = not any("class_embed" in key for key in state)
    missing = [key for key in target if key not in state and not (headless and "class_embed" in key)]
    unknown = [
        key for key in state if key not in target and not key.startswith(pretext_parts()) and not BESIDE.fullmatch(key)
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
