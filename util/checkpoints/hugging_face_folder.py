"""Write a detector as a folder that `from_pretrained` of Hugging Face transformers loads.

The folder has `config.json`, `model.safetensors` and `preprocessor_config.json`. Names are those that `save_pretrained`
writes, in version 5 of transformers too. `util.checkpoints.hugging_face` reads such folders.

Shapes in comments: D width.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from util.checkpoints.architecture import has_mask_head
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import Classes, infer_classes
from util.checkpoints.hugging_face import PREFIXES
from util.checkpoints.safetensors_file import save_safetensors
from util.errors import UserError
from util.files import to_json, write_text
from util.settings import Settings

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of every ResNet here
NO_NAME = "N/A"  # of the ids that COCO skips, as in published configs

# Detector -> start of the names of its classes in transformers.
CLASSES = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
}
# What transformers computes: detector -> (classification, positional encodings by their names there).
COMPUTED = {
    "detr": ("softmax", {"sine": "sine", "learned": "learned"}),
    "conditional_detr": ("focal", {"sine": "sine", "learned": "learned"}),
    "deformable_detr": ("focal", {"sine_shifted": "sine", "learned": "learned"}),
}

_LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.?(.*)")
# In layers: our module -> theirs. Deformable DETR numbers the norms of its decoder in another order.
_ENCODER = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_DECODER = {
    "norm1": "self_attn_layer_norm",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
    "multihead_attn": "encoder_attn",
    "cross_attn": "encoder_attn",
}
_DEFORMABLE = {**_DECODER, "norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm"}
_LINEAR = {"linear1": "fc1", "linear2": "fc2"}

# Start of our name -> start of theirs. Some have several names there, of which `save_pretrained` writes the first.
_STARTS = {
    **{ours: f"model.{theirs}" for theirs, ours in reversed(PREFIXES.items())},
    # Version 5 writes these without `backbone.`, and does not find them there.
    "backbone.1.row_embed.": "model.position_embedding.row_embeddings.",
    "backbone.1.col_embed.": "model.position_embedding.column_embeddings.",
}
# Heads are outside of `model.`; Deformable DETR keeps the names of its own.
_HEADS = {"class_embed.": "class_labels_classifier.", "bbox_embed.": "bbox_predictor."}
_DEFORMABLE_STARTS = {
    "class_embed.": "class_embed.",
    "bbox_embed.": "bbox_embed.",
    "input_proj.": "model.input_proj.",
}
_MASKS = ("mask_head.", "bbox_attention.")


def to_hugging_face(state: Mapping[str, Tensor], detector: str) -> dict[str, Tensor]:
    """Translate DETR's names to those of transformers: the inverse of `from_hugging_face`. No value changes.

    A detector with a mask head is expected under `detr.`, as in the published files.

    Raises:
        ValueError: a name that no detector has.
    """
    prefix = "detr." if has_mask_head(state) else ""
    renamed = {}
    for key, value in state.items():
        name = (
            key if key.startswith(_MASKS) else prefix + _rename(key.removeprefix("detr."), detector)
        )
        projection = re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name)
        if not projection:
            renamed[name] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):  # [3 D, D] -> 3 x [D, D]
            renamed[f"{projection[1]}.{letter}_proj.{projection[2]}"] = part
    return renamed


def _rename(key: str, detector: str) -> str:
    is_deformable = detector == "deformable_detr"
    layer = _LAYER.fullmatch(key)
    if layer:
        side, index, module, rest = layer.groups()
        decoder = _DEFORMABLE if is_deformable else _DECODER
        names = {**_LINEAR, **(_ENCODER if side == "encoder" else decoder)}
        return f"model.{side}.layers.{index}.{names.get(module, module)}.{rest}"
    starts = {**_STARTS, **(_DEFORMABLE_STARTS if is_deformable else _HEADS)}
    for ours in sorted(starts, key=len, reverse=True):  # the most specific one
        if key.startswith(ours):
            return starts[ours] + key.removeprefix(ours)
    raise ValueError(f"no name of transformers for {key}")


def check_supported(settings: Settings, source: str) -> None:
    """Check that transformers computes what this detector does.

    Raises:
        UserError: it does not; with the setting.
    """
    if settings.detector not in CLASSES:
        raise _unsupported(source, f"--detector {settings.detector}", ", ".join(CLASSES))
    classification, encodings = COMPUTED[settings.detector]
    supported: dict[str, list[Any]] = {
        "classification": [classification],
        "position_embedding": list(encodings),
        "pre_norm": [False],  # Table Transformer has it, with other classes
    }
    if settings.detector == "deformable_detr" and settings.two_stage:
        supported["with_box_refine"] = [True]
    if settings.masks:
        supported["detector"] = ["detr"]
    for flag, values in supported.items():
        value = getattr(settings, flag)
        if value not in values:
            raise _unsupported(source, f"--{flag} {value}", " or ".join(map(str, values)))
    if not settings.backbone.startswith("resnet"):
        raise _unsupported(source, f"--backbone {settings.backbone}", "a ResNet")
    # Its group norms have a fixed number of groups, those here fewer in narrow models.
    if settings.detector == "deformable_detr" and settings.hidden_dim % 128:
        raise _unsupported(source, f"--hidden_dim {settings.hidden_dim}", "multiples of 128")
    if settings.masks and (settings.hidden_dim + settings.nheads) % 8:
        width = f"--hidden_dim {settings.hidden_dim} and --nheads {settings.nheads}"
        raise _unsupported(source, f"{width} with a mask head", "a multiple of 8 as their sum")


def _unsupported(source: str, what: str, supported: str) -> UserError:
    return UserError(
        f"{source} has {what}, and transformers computes this detector with {supported}: choose another --to"
    )


def architecture_entries(settings: Settings) -> dict[str, Any]:
    """Return the entries of transformers' configuration that describe the layers of a detector."""
    entries = {
        "num_queries": settings.num_queries,
        "d_model": settings.hidden_dim,
        "encoder_layers": settings.enc_layers,
        "decoder_layers": settings.dec_layers,
        "encoder_ffn_dim": settings.dim_feedforward,
        "decoder_ffn_dim": settings.dim_feedforward,
        "encoder_attention_heads": settings.nheads,
        "decoder_attention_heads": settings.nheads,
        # As in training here, and in the published code.
        "dropout": settings.dropout,
        "attention_dropout": settings.dropout,
        "activation_dropout": settings.dropout,
    }
    if settings.detector == "deformable_detr":
        entries |= {
            "num_feature_levels": settings.num_feature_levels,
            "encoder_n_points": settings.enc_n_points,
            "decoder_n_points": settings.dec_n_points,
            "with_box_refine": settings.with_box_refine,
            "two_stage": settings.two_stage,
        }
    return entries


def make_config(settings: Settings, classes: Classes) -> dict[str, Any]:
    """Return `config.json` of a detector that passed `check_supported`."""
    kind = CLASSES[settings.detector]
    task = "Segmentation" if settings.masks else "ObjectDetection"
    is_deformable = settings.detector == "deformable_detr"
    stages = [4]
    if settings.masks:
        stages = [1, 2, 3, 4]
    elif is_deformable:
        stages = [2, 3, 4][-settings.num_feature_levels :]
    backbone = {
        "model_type": "timm_backbone",
        "backbone": settings.backbone,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": stages,
        **({"output_stride": 16} if settings.dilation else {}),
    }
    names = _label_names(classes)
    config = {
        "architectures": [f"{kind}For{task}"],
        "model_type": settings.detector,
        "backbone_config": backbone,
        "dilation": settings.dilation,
        **architecture_entries(settings),
        "position_embedding_type": COMPUTED[settings.detector][1][settings.position_embedding],
        "id2label": {str(row): name for row, name in names.items()},
        "label2id": {name: row for row, name in names.items()},
        "dtype": "float32",
    }
    if is_deformable:
        config["two_stage_num_proposals"] = settings.num_queries
    return config


def _label_names(classes: Classes) -> dict[int, str]:
    """Return a name for each row of the class head, "no object" excluded."""
    unnamed = (lambda row: NO_NAME) if classes.names else (lambda row: f"LABEL_{row}")
    return {row: classes.names.get(row, unnamed(row)) for row in range(classes.num_classes)}


def make_processor_config(settings: Settings, normalization: Mapping[str, Any]) -> dict[str, Any]:
    """Return `preprocessor_config.json`: resizing and normalization as in evaluation here."""
    short_side = settings.image_size or 800
    # As `datasets.transforms.detection_transforms`, which this package does not import.
    long_side = settings.max_size or round(1333 * short_side / 800)
    return {
        # The processors of Conditional and Deformable DETR return focal classes, best first.
        "image_processor_type": f"{CLASSES[settings.detector]}ImageProcessor",
        "format": "coco_panoptic" if settings.masks else "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": short_side, "longest_edge": long_side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(normalization["mean"]),
        "image_std": list(normalization["std"]),
        "do_pad": True,
    }


def write_folder(checkpoint: Checkpoint, settings: Settings, folder: Path) -> int:
    """Write a trained detector for transformers, and return the number of tensors.

    The folder appears complete or not at all.

    Raises:
        UserError: transformers lacks this detector, the package safetensors is missing, or the disk is full.
    """
    check_supported(settings, checkpoint.source)
    state = to_hugging_face(checkpoint.model, settings.detector)
    default = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    processor = make_processor_config(settings, checkpoint.normalization or default)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        save_safetensors(state, temporary / WEIGHTS, {})
        config = make_config(settings, infer_classes(checkpoint))
        write_text(temporary / CONFIG, to_json(config, indent=2))
        write_text(temporary / PROCESSOR, to_json(processor, indent=2))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(state)
