"""Infer the architecture of a detector from its weights and the settings stored with them."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.dilation import infer_dilation
from util.errors import UserError
from util.settings.registry import DETECTORS

DEFAULT_NHEADS = 8  # of every published model; parameter shapes don't depend on it in DETR

# (bottleneck blocks?, number of blocks in layer1 ... layer4) -> name
RESNET_BLOCKS = {
    (False, 2, 2, 2, 2): "resnet18",
    (False, 3, 4, 6, 3): "resnet34",
    (True, 3, 4, 6, 3): "resnet50",
    (True, 3, 4, 23, 3): "resnet101",
    (True, 3, 8, 36, 3): "resnet152",
}

# Flags that the weights do not show. Stored values of another type are ignored: other programs use the same names for
# other things, such as a config dict under `detector`.
STORED_FLAGS = {
    "detector": str,
    "dilation": bool,
    "nheads": int,
    "backbone": str,
    "position_embedding": str,
    "enc_n_points": int,
    "dec_n_points": int,
}


MAX_MISSING = (
    10**8
)  # parameters that a file may lack before it is refused without building its model


def infer_detector(state: Mapping[str, Tensor]) -> str | None:
    """Return the registered detector whose `state_dict_marker` is in a decoder parameter's name, or None."""
    names = [key for key in state if "transformer.decoder." in key]
    for detector, entry in DETECTORS.items():
        if any(entry.state_dict_marker in name for name in names):
            return detector
    return None


def infer_resnet(state: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """Return `resnet18` ... `resnet152` from the blocks under `prefix`; None for any other network."""
    pattern = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d+)\.conv1\.weight$")
    blocks = Counter(match[1] for match in map(pattern.match, state) if match)

    # Wide ResNets and ResNeXts have the same names and numbers of blocks, but other widths.
    second_conv = state.get(f"{prefix}layer1.0.conv2.weight")
    if second_conv is None or second_conv.shape[:2] != (64, 64):
        return None
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    return RESNET_BLOCKS.get((bottleneck, *(blocks[stage] for stage in "1234")))


def infer_architecture(
    checkpoint: Checkpoint, nheads: int = DEFAULT_NHEADS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the architecture of a checkpoint by flag name, as (certain, likely).

    `certain` follows from the weights or from the stored `args`. `likely` is what a published file without `args`
    usually means; a given flag may contradict it. Only flags that the detector reads are returned.

    Args:
        nheads: number of attention heads where the checkpoint stores none.
    """
    state = strip_detr_prefix(checkpoint.model)
    args = checkpoint.args
    certain = {
        flag: args[flag] for flag, kind in STORED_FLAGS.items() if isinstance(args.get(flag), kind)
    }
    stored_detector = certain.get("detector")
    detector = stored_detector if stored_detector in DETECTORS else infer_detector(state)
    certain.update(_from_weights(state, detector))
    _check_size(certain, state, checkpoint.source)
    if has_mask_head(state):
        certain["masks"] = True
    certain.setdefault("backbone", infer_resnet(state, "backbone.0.body."))

    likely = {
        "backbone_norm": args.get("backbone_norm"),
        **_sampling_points(state, certain.get("nheads") or nheads),
    }
    if certain.get("two_stage"):
        # Two-stage takes its queries from the top-k encoder proposals: no weight has k rows.
        likely["num_queries"] = args.get("num_queries")
    if "dilation" not in certain:
        # Dilation changes no parameter, and DETR's published files have no `args`.
        likely["dilation"] = infer_dilation(checkpoint.source)
    _add_position_embedding(certain, likely, state, args, detector)

    flags_of_others = {flag for entry in DETECTORS.values() for flag in entry.flags}
    if detector:
        flags_of_others -= set(DETECTORS[detector].flags)
    certain = _drop_unknown(certain, flags_of_others)
    likely = _drop_unknown(likely, flags_of_others)
    return certain, {flag: value for flag, value in likely.items() if flag not in certain}


def _drop_unknown(known: Mapping[str, Any], flags_of_others: set[str]) -> dict[str, Any]:
    return {
        flag: value
        for flag, value in known.items()
        if value is not None and flag not in flags_of_others
    }


def _from_weights(state: Mapping[str, Tensor], detector: str | None) -> dict[str, Any]:
    """Return what names and shapes show, by flag name; None for what they don't."""

    def rows(key: str) -> int | None:
        return state[key].shape[0] if key in state and state[key].ndim else None

    def num_layers(part: str) -> int | None:
        matches = (re.match(rf"transformer\.{part}\.layers\.(\d+)\.", key) for key in state)
        return max((int(match[1]) + 1 for match in matches if match), default=None)

    known = {
        "detector": detector,
        "enc_layers": num_layers("encoder"),
        "dec_layers": num_layers("decoder"),
        "hidden_dim": rows("transformer.decoder.layers.0.norm1.weight"),  # [D]
        "dim_feedforward": rows("transformer.decoder.layers.0.linear1.weight"),  # [F, D]
        "num_queries": rows("query_embed.weight"),  # [Q, D], Deformable DETR [Q, 2 D]
    }
    if detector == "deformable_detr":
        known["num_feature_levels"] = rows("transformer.level_embed")  # [levels, D]
        known["two_stage"] = "transformer.enc_output.weight" in state
        # Only iterative refinement registers the box heads inside the decoder as well.
        known["with_box_refine"] = any(
            key.startswith("transformer.decoder.bbox_embed.") for key in state
        )
    else:
        # The norm after the encoder exists only where the layers normalize their inputs.
        known["pre_norm"] = "transformer.encoder.norm.weight" in state
    # The mask head reads the feature map next to one attention map per head: [D + heads, D + heads, 3, 3].
    mask_width = rows("mask_head.lay1.weight")
    if mask_width is not None and known["hidden_dim"] is not None:
        known["nheads"] = mask_width - known["hidden_dim"]
    return known


def _check_size(known: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Check that a file does not have far fewer parameters than the layers that its names and shapes imply.

    A name such as `encoder.layers.99999999.` would otherwise build a model that fits into no memory.

    Raises:
        UserError: it has.
    """
    width, hidden = known["hidden_dim"] or 1, known["dim_feedforward"] or 1
    layers = (known["enc_layers"] or 0) + (known["dec_layers"] or 0)
    implied = (
        layers * 2 * width * (width + hidden)
    )  # less than any attention and feed-forward network have
    stored = sum(value.numel() for value in state.values())
    if implied > stored + MAX_MISSING:
        raise UserError(
            f"{source} implies {layers} layers of width {width} and {hidden}, which is more than its {stored} "
            "parameters: it is damaged or incomplete; choose another file"
        )


def _sampling_points(state: Mapping[str, Tensor], nheads: int) -> dict[str, int]:
    """Return `enc_n_points` and `dec_n_points` of Deformable DETR for a number of heads.

    The sampling offsets have one row per head, level, point and coordinate: nheads * levels * points * 2.
    """
    if "transformer.level_embed" not in state:
        return {}
    levels = (*state["transformer.level_embed"].shape, 0)[0]
    if not levels or nheads < 1:
        return {}

    points = {}
    for flag, layer in (
        ("enc_n_points", "transformer.encoder.layers.0.self_attn"),
        ("dec_n_points", "transformer.decoder.layers.0.cross_attn"),
    ):
        offsets = state.get(f"{layer}.sampling_offsets.bias")
        if offsets is not None and offsets.ndim:
            points[flag] = len(offsets) // (2 * nheads * levels)
    return points


def _add_position_embedding(
    certain: dict[str, Any],
    likely: dict[str, Any],
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    detector: str | None,
) -> None:
    """Add `position_embedding` to `certain` or `likely`.

    Deformable DETR, and both detectors of DETReg, shift the sine encoding by half a cell. Their files call it `sine`
    like DETR's; this project calls it `sine_shifted`.
    """
    from_detreg = "object_embedding_loss" in args or any(
        key.startswith("feature_embed.") for key in state
    )
    # Siamese DETR's codebase does not shift the encoding, on Deformable DETR either.
    from_siamese = "patch2query.weight" in state
    is_shifted = from_detreg or (detector == "deformable_detr" and not from_siamese)

    stored = certain.get("position_embedding")
    stored = {"v2": "sine", "v3": "learned"}.get(stored, stored)  # aliases in DETR's builder
    if "backbone.1.row_embed.weight" in state:
        certain["position_embedding"] = "learned"
    elif stored is None:
        likely["position_embedding"] = "sine_shifted" if is_shifted else "sine"
    else:
        is_published = "detector" not in args  # only this project stores that flag
        if is_published and is_shifted and stored == "sine":
            stored = "sine_shifted"
        certain["position_embedding"] = stored


def has_mask_head(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("mask_head.") for key in state)


def strip_detr_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict without the prefix `detr.`, under which models with a mask head keep the detector."""
    return {key.removeprefix("detr."): value for key, value in state.items()}
