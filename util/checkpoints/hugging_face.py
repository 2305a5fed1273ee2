"""Parameter names of Hugging Face transformers, and their translation to DETR's.

Covers DETR (also as Table Transformer and with a mask head), Conditional DETR and Deformable DETR. The models are the
published ones with other names. Three things differ in more than a name:

- query, key and value projections of an attention are three tensors, not one `in_proj`
- a file may store a tensor with several names only once: Deformable DETR's heads
- the backbone is timm's ResNet, with the published names, or transformers' own

Version 5 of transformers renames modules in memory and writes the old names with `save_pretrained`. A state dict that
was saved in another way has the new names: both are read.

Shapes in comments: D width.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError

MARKER = "encoder_attn_layer_norm.weight"  # of every decoder layer
MODEL_TYPES = ("detr", "conditional_detr", "deformable_detr", "table-transformer")

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")
_PROJECTION = re.compile(r"(.+)\.([qkv])_proj\.(weight|bias)")
# Conditional DETR's projections in version 5: in the attention module.
_CONDITIONAL = re.compile(r"([qkv])_(?:(content|pos|pos_sine)_)?proj\.(weight|bias)")
_HEAD = re.compile(r"(class_embed|bbox_embed)\.(\d+)\.(.+)")

# Start of a name without `model.` -> start of DETR's name.
PREFIXES = {
    "backbone.conv_encoder.model.": "backbone.0.body.",
    "backbone.model.": "backbone.0.body.",
    "backbone.position_embedding.row_embeddings.": "backbone.1.row_embed.",
    "backbone.position_embedding.column_embeddings.": "backbone.1.col_embed.",
    "position_embedding.row_embeddings.": "backbone.1.row_embed.",
    "position_embedding.column_embeddings.": "backbone.1.col_embed.",
    "query_position_embeddings.": "query_embed.",
    "input_projection.": "input_proj.",
    "class_labels_classifier.": "class_embed.",
    "bbox_predictor.": "bbox_embed.",
    "encoder.layernorm.": "transformer.encoder.norm.",
    "decoder.layernorm.": "transformer.decoder.norm.",
    "decoder.": "transformer.decoder.",
    "level_embed": "transformer.level_embed",
    "reference_points.": "transformer.reference_points.",
    "enc_output.": "transformer.enc_output.",
    "enc_output_norm.": "transformer.enc_output_norm.",
    "pos_trans.": "transformer.pos_trans.",
    "pos_trans_norm.": "transformer.pos_trans_norm.",
}

# Setting in `config.json` -> flag.
_FLAGS = {
    "encoder_attention_heads": "nheads",
    "dilation": "dilation",
    "num_queries": "num_queries",
    "encoder_n_points": "enc_n_points",
    "decoder_n_points": "dec_n_points",
}

# Mask head in version 5 -> DETR's.
_MASK_HEAD = (
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv(\d)\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv(\d)\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
    *(
        (rf"^mask_head\.fpn_stages\.{stage}\.{theirs}\.", f"mask_head.{ours}.")
        for stage in range(3)
        for theirs, ours in (
            (r"fpn_adapter", f"adapter{stage + 1}"),
            (r"refine\.conv", f"lay{stage + 3}"),
            (r"refine\.norm", f"gn{stage + 3}"),
        )
    ),
)

# transformers' own ResNet -> torchvision's.
_RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Return True for a detector with the names of transformers."""
    has_layer = any(key.endswith(f"decoder.layers.0.{MARKER}") for key in state)
    has_backbone = any(_core(key).startswith("backbone.") for key in state)
    has_input = any(_core(key).startswith(("input_proj.", "input_projection.")) for key in state)
    # RT-DETR and others have such a layer too, but inputs and queries of other kinds.
    has_queries = any(
        _core(key).startswith(("query_position_embeddings.", "enc_output.")) for key in state
    )
    return (
        has_layer
        and has_backbone
        and has_input
        and has_queries
        and not any("denoising" in key or "pix_trans" in key for key in state)
    )


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of transformers to DETR's. No value changes."""
    kind = _decoder_kind(state)
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = _rename(_core(key), kind)
        if name.endswith(".num_batches_tracked"):
            continue  # frozen batch norm, as in all these detectors, has no such counter
        projection = _PROJECTION.fullmatch(name)
        if projection and projection[1].endswith("_attn"):
            merged = f"{projection[1]}.in_proj_{projection[3]}"
            projections.setdefault(merged, {})[projection[2]] = value
            renamed[merged] = value  # keeps the order of the file
        else:
            renamed[name] = value

    for name, parts in projections.items():
        renamed[name] = torch.cat(
            [parts[letter] for letter in "qkv" if letter in parts]
        )  # [3 D, D]
    if kind == "deformable":
        return _repeat_tied_heads(renamed)
    if any(name.startswith("mask_head.") for name in renamed):
        return {_rename_with_masks(name): value for name, value in renamed.items()}
    return renamed


def _rename_with_masks(name: str) -> str:
    """Return the name in a detector with a mask head: the detector is under `detr.` there."""
    if not name.startswith(("mask_head.", "bbox_attention.")):
        return f"detr.{name}"
    for pattern, old in _MASK_HEAD:
        name = re.sub(pattern, old, name)
    return name


def _core(key: str) -> str:
    """Return a name without the prefixes of a detector with a mask head and of a head model."""
    return re.sub(r"^(detr\.|conditional_detr\.|deformable_detr\.)?(model\.)*", "", key)


def _decoder_kind(state: Mapping[str, Tensor]) -> str:
    if any("qpos_sine_proj" in key or "q_pos_sine_proj" in key for key in state):
        return "conditional"
    is_deformable = any("encoder_attn.sampling_offsets" in key for key in state)
    return "deformable" if is_deformable else "detr"


def _rename(name: str, kind: str) -> str:
    layer = _LAYER.fullmatch(name)
    if layer:
        side, index, rest = layer.groups()
        return f"transformer.{side}.layers.{index}.{_rename_in_layer(rest, side, kind)}"
    for prefix, target in PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return target + (_rename_resnet(rest) if target == "backbone.0.body." else rest)
    return name


def _rename_in_layer(rest: str, side: str, kind: str) -> str:
    # Deformable DETR numbers the norms of its decoder in the order cross-attention, self-attention.
    self_norm, cross_norm = ("norm2", "norm1") if kind == "deformable" else ("norm1", "norm2")
    names = {
        "self_attn_layer_norm": "norm1" if side == "encoder" else self_norm,
        "encoder_attn_layer_norm": cross_norm,
        "final_layer_norm": "norm2" if side == "encoder" else "norm3",
        "encoder_attn": "multihead_attn" if kind == "detr" else "cross_attn",
        "fc1": "linear1",
        "fc2": "linear2",
    }
    module, _, parameter = rest.removeprefix("mlp.").partition(".")
    projection = _CONDITIONAL.fullmatch(parameter)
    if kind == "conditional" and side == "decoder" and projection:
        start = "sa" if module == "self_attn" else "ca"
        letter, what, parameter = projection.groups(default="")
        return f"{start}_{letter}{what}_proj.{parameter}"
    return f"{names.get(module, module)}.{re.sub('^o_proj', 'out_proj', parameter)}"


def _rename_resnet(name: str) -> str:
    for pattern, target in _RESNET:
        name = re.sub(pattern, target, name)

    def block(match: re.Match) -> str:
        return f"layer{int(match[1]) + 1}.{match[2]}."

    name = re.sub(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", block, name)

    def part(match: re.Match) -> str:
        module = "conv" if match[2] == "convolution" else "bn"
        return f".{module}{int(match[1]) + 1}."

    return re.sub(r"\.layer\.(\d+)\.(convolution|normalization)\.", part, name)


def _repeat_tied_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the names of Deformable DETR's heads that a file leaves out.

    A safetensors file stores a tensor once. Without box refinement all layers have the head of layer 0. With it, the
    decoder has the box heads too, and with two stages also the class heads.
    """
    full = dict(state)
    decoder = "transformer.decoder."
    layers = {match[1] for key in state if (match := re.match(rf"{decoder}layers\.(\d+)\.", key))}
    num_heads = len(layers) + ("transformer.enc_output.weight" in state)

    heads: dict[str, dict[int, dict[str, Tensor]]] = {"class_embed": {}, "bbox_embed": {}}
    in_decoder = {name: any(key.startswith(f"{decoder}{name}.") for key in state) for name in heads}
    for key, value in state.items():
        head = _HEAD.fullmatch(key.removeprefix(decoder))
        if head:
            heads[head[1]].setdefault(int(head[2]), {}).setdefault(head[3], value)

    in_decoder["class_embed"] |= num_heads > len(layers)  # two stages
    in_decoder["bbox_embed"] |= _differ([heads["bbox_embed"].get(i) for i in range(len(layers))])
    for name, by_layer in heads.items():
        for layer in range(num_heads):
            for parameter, value in by_layer.get(layer, by_layer.get(0, {})).items():
                full.setdefault(f"{name}.{layer}.{parameter}", value)
                if in_decoder[name]:
                    full.setdefault(f"{decoder}{name}.{layer}.{parameter}", value)
    return full


def _differ(heads: list[dict[str, Tensor] | None]) -> bool:
    """Return True if the heads of two layers have different values: with box refinement each layer has its own."""
    known = [head for head in heads if head is not None]
    return any(
        not torch.equal(value, known[0][parameter])
        for head in known[1:]
        for parameter, value in head.items()
        if parameter in known[0]
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return what `config.json` in a folder, or next to a weight file, says, as entries of a checkpoint.

    Weights don't show the number of heads, dilation and the class names. {} without such a file.

    Raises:
        UserError: it says that the detector differs from the published one in what weights don't show.
    """
    path = path / "weights" if path.is_dir() else path
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        return {}
    _check_config(config, path)
    args = {flag: config[name] for name, flag in _FLAGS.items() if config.get(name) is not None}
    if config.get("two_stage"):
        args["num_queries"] = config.get("two_stage_num_proposals", 300)
    backbone = config.get("backbone_config")
    if isinstance(backbone, dict) and backbone.get("output_stride") == 16:
        args["dilation"] = True
    labels = config.get("id2label")
    # `N/A` are the ids that COCO skips, LABEL_0, LABEL_1, ... the names that transformers makes up.
    names = {
        row: name
        for row, name in (labels if isinstance(labels, dict) else {}).items()
        if name not in ("N/A", f"LABEL_{row}")
    }
    return {"args": args, "class_names": names} if names else {"args": args}


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    heads = config.get("encoder_attention_heads")
    published = {"activation_function": "relu", "decoder_attention_heads": heads}
    for name, value in published.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{path.parent / 'config.json'}: {name} is {config[name]}, and only {value} is supported; choose "
                "another detector"
            )
    width = config.get("d_model", 256)
    if config["model_type"] == "deformable_detr" and width % 128:
        # `_build_input_projections` gives narrow models fewer groups than the 32 of transformers.
        raise UserError(
            f"{path.parent / 'config.json'}: d_model is {width}, and only multiples of 128 are supported; choose "
            "another detector"
        )
