"""Tells the architecture of a detector from its weights and the settings stored beside them."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from util.checkpoints.checkpoint import Checkpoint
from util.settings.registry import DETECTORS

RESNET_BLOCKS = {
    (False, 2, 2, 2, 2): "resnet18",
    (False, 3, 4, 6, 3): "resnet34",
    (True, 3, 4, 6, 3): "resnet50",
    (True, 3, 4, 23, 3): "resnet101",
    (True, 3, 8, 36, 3): "resnet152",
}
STORED = {  # what the weights cannot tell, and its type: other programs keep other things under these names
    "detector": str,
    "dilation": bool,
    "nheads": int,
    "backbone": str,
    "position_embedding": str,
    "enc_n_points": int,
    "dec_n_points": int,
}


def detector_kind(state: Mapping[str, Tensor]) -> str | None:
    """The registered detector whose mark is in the name of a decoder parameter; None for anything else."""
    names = [key for key in state if "transformer.decoder." in key]
    marks = {name: entry.mark for name, entry in DETECTORS.items()}
    return next((kind for kind, mark in marks.items() if any(mark in name for name in names)), None)


def resnet_name(state: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """`resnet18` ... `resnet152` by the blocks of the stages under `prefix`; None for anything else, wider ones too."""
    pattern = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d+)\.conv1\.weight$")
    blocks = Counter(match[1] for match in map(pattern.match, state) if match)
    second = state.get(f"{prefix}layer1.0.conv2.weight")
    if second is None or second.shape[:2] != (64, 64):
        return None
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    return RESNET_BLOCKS.get((bottleneck, *(blocks[stage] for stage in "1234")))


def architecture(checkpoint: Checkpoint, nheads: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """The architecture behind a checkpoint by the names of flags that its detector reads: (what is certain, what is
    only likely). `nheads` is used where it says none.

    Certain is what the weights show and what the stored `args` say. Likely is what a published file without `args`
    usually means, and what may differ without harm.
    """
    state = without_detr_prefix(checkpoint.model)
    args = checkpoint.args
    certain = {
        flag: args[flag] for flag, kind in STORED.items() if isinstance(args.get(flag), kind)
    }
    kind = certain["detector"] if certain.get("detector") in DETECTORS else detector_kind(state)
    certain.update(_from_weights(state, kind))
    certain.setdefault("backbone", resnet_name(state, "backbone.0.body."))
    likely = {
        "backbone_norm": args.get("backbone_norm"),
        **_sampling_points(state, certain.get("nheads") or nheads),
    }
    if certain.get("two_stage"):
        likely["num_queries"] = args.get(
            "num_queries"
        )  # how many proposals are taken shows in no weight
    if "dc5" in Path(checkpoint.source).name.lower():
        likely["dilation"] = True
    _add_position_embedding(certain, likely, state, args, kind)
    foreign = {flag for entry in DETECTORS.values() for flag in entry.flags} - set(
        DETECTORS[kind].flags if kind else ()
    )
    for known in (certain, likely):
        for flag in [flag for flag, value in known.items() if value is None or flag in foreign]:
            del known[flag]
    return certain, {flag: value for flag, value in likely.items() if flag not in certain}


def _from_weights(state: Mapping[str, Tensor], kind: str | None) -> dict[str, Any]:
    def rows(key: str) -> int | None:
        return state[key].shape[0] if key in state else None

    def layers(part: str) -> int | None:
        found = (re.match(rf"transformer\.{part}\.layers\.(\d+)\.", key) for key in state)
        return max((int(match[1]) + 1 for match in found if match), default=None)

    known = {
        "detector": kind,
        "enc_layers": layers("encoder"),
        "dec_layers": layers("decoder"),
        "hidden_dim": rows("transformer.decoder.layers.0.norm1.weight"),
        "dim_feedforward": rows("transformer.decoder.layers.0.linear1.weight"),
        "num_queries": rows("query_embed.weight"),
    }
    if kind == "deformable_detr":
        known["num_feature_levels"] = rows("transformer.level_embed")
        known["two_stage"] = "transformer.enc_output.weight" in state
        known["with_box_refine"] = any(
            key.startswith("transformer.decoder.bbox_embed.") for key in state
        )
    else:
        known["pre_norm"] = "transformer.encoder.norm.weight" in state
    return known


def _sampling_points(state: Mapping[str, Tensor], nheads: int) -> dict[str, int]:
    """Points for each head and map of Deformable DETR: its offsets have a row for each head, map, point and
    coordinate.
    """
    rows = {
        f"{part[:3]}_n_points": state.get(
            f"transformer.{part}.layers.0.{attention}.sampling_offsets.bias"
        )
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn"))
    }
    return {
        flag: len(offsets) // (2 * nheads * len(state["transformer.level_embed"]))
        for flag, offsets in rows.items()
        if offsets is not None and "transformer.level_embed" in state
    }


def _add_position_embedding(
    certain: dict[str, Any],
    likely: dict[str, Any],
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    kind: Any,
) -> None:
    """Deformable DETR and both detectors of DETReg shift the sine code by half a cell, and call it `sine` too."""
    detreg = "object_embedding_loss" in args or any(
        key.startswith("feature_embed.") for key in state
    )
    siamese = (
        "patch2query.weight" in state
    )  # patches on Deformable DETR are of its code base, which does not shift
    shifts = detreg or (kind == "deformable_detr" and not siamese)
    spelling = {"v2": "sine", "v3": "learned"}
    code = spelling.get(certain.get("position_embedding"), certain.get("position_embedding"))
    if "backbone.1.row_embed.weight" in state:
        certain["position_embedding"] = "learned"
    elif code is not None:
        published = "detector" not in args
        certain["position_embedding"] = (
            "sine_shifted" if published and shifts and code == "sine" else code
        )
    else:
        likely["position_embedding"] = "sine_shifted" if shifts else "sine"


def without_detr_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Models with a mask head keep the detector under `detr.`."""
    return {key.removeprefix("detr."): value for key, value in state.items()}
