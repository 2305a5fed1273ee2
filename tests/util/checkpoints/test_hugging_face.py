"""Checkpoints of Hugging Face transformers, as safetensors and .bin files, with all names and with shared ones once."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.published_files import SMALL, filled, shapes
from util.checkpoints.adoption import adopt_architecture
from util.checkpoints.backbone_weights import identify_backbone
from util.checkpoints.checkpoint import load_checkpoint
from util.checkpoints.conversion import infer_codebase
from util.checkpoints.hugging_face import read_config
from util.checkpoints.parameter_check import IGNORED_NAMES
from util.checkpoints.weight_files import read_weights
from util.errors import UserError

CASES = {
    "detr": ("detr", ()),
    "table_transformer": ("detr", ("--pre_norm",)),
    "learned_encoding": ("detr", ("--position_embedding", "learned")),
    "conditional_detr": ("conditional_detr", ()),
    "deformable_detr": ("deformable_detr", ()),
    "refine": ("deformable_detr", ("--with_box_refine",)),
    "two_stage": ("deformable_detr", ("--with_box_refine", "--two_stage")),
}
LAYER_NAMES = {
    "multihead_attn": "encoder_attn", "cross_attn": "encoder_attn", "linear1": "fc1",
    "linear2": "fc2", "norm3": "final_layer_norm",
}  # fmt: skip
NORMS = {
    ("encoder", "norm1"): "self_attn_layer_norm",
    ("encoder", "norm2"): "final_layer_norm",
    ("decoder", "norm1"): "self_attn_layer_norm",
    ("decoder", "norm2"): "encoder_attn_layer_norm",
}
OTHER_NAMES = (
    ("backbone.0.body.", "model.backbone.conv_encoder.model."),
    ("backbone.1.row_embed.", "model.backbone.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.backbone.position_embedding.column_embeddings."),
    ("transformer.encoder.norm.", "model.encoder.layernorm."),
    ("transformer.decoder.norm.", "model.decoder.layernorm."),
    ("transformer.", "model."),
    ("query_embed.", "model.query_position_embeddings."),
)
DETR_NAMES = (
    ("class_embed.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor."),
    ("input_proj.", "model.input_projection."),
)


def to_hugging_face(state: dict[str, Tensor], detector: str) -> dict[str, Tensor]:
    """Rename a detector as the conversion scripts of transformers do."""
    is_deformable = detector == "deformable_detr"
    deformable_norms = {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm"}
    prefixes = (("input_proj.", "model.input_proj."),) if is_deformable else DETR_NAMES
    renamed = {}
    for key, value in state.items():
        layer = re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.?(.*)", key)
        if layer:
            side, index, module, rest = layer.groups()
            name = NORMS.get((side, module)) or LAYER_NAMES.get(module, module)
            if is_deformable and side == "decoder":
                name = deformable_norms.get(module, name)
            start = f"model.{side}.layers.{index}.{name}."
            if rest.startswith("in_proj_"):
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{start}{letter}_proj.{rest.removeprefix('in_proj_')}"] = third
            else:
                renamed[start + rest] = value
            continue
        matches = ((a, b) for a, b in (*OTHER_NAMES, *prefixes) if key.startswith(a))
        before, after = next(matches, ("", ""))
        renamed[after + key.removeprefix(before)] = value
    return renamed


def to_own_resnet(name: str) -> str:
    """Return the name that transformers' own ResNet has for one of timm's."""
    prefix = "model.backbone.conv_encoder.model."
    if not name.startswith(prefix):
        return name
    rest = name.removeprefix(prefix)
    rest = re.sub(r"^conv1\.", "embedder.embedder.convolution.", rest)
    rest = re.sub(r"^bn1\.", "embedder.embedder.normalization.", rest)
    rest = re.sub(
        r"^layer(\d)\.(\d+)\.",
        lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
        rest,
    )
    for part, new in (("conv", "convolution"), ("bn", "normalization")):
        rest = re.sub(rf"\.{part}(\d)\.", lambda m, new=new: f".layer.{int(m[1]) - 1}.{new}.", rest)
    rest = rest.replace(".downsample.0.", ".shortcut.convolution.")
    return prefix + rest.replace(".downsample.1.", ".shortcut.normalization.")


# transformers 5 renames modules in memory. Files of `save_pretrained` have the old names, other files the new ones.
VERSION_5 = (
    (r"backbone\.conv_encoder\.", "backbone."),
    (r"backbone\.position_embedding\.", "position_embedding."),
    (r"attn\.out_proj\.", "attn.o_proj."),
    (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
    (r"\.sa_([qkv])(content|pos|)_proj\.", r".self_attn.\1_\2_proj."),
    (r"\.ca_([qkv])(content|pos_sine|pos|)_proj\.", r".encoder_attn.\1_\2_proj."),
    (r"v__proj", "v_proj"),
)


def to_version_5(name: str) -> str:
    for pattern, new in VERSION_5:
        name = re.sub(pattern, new, name)
    return name


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor]]:
    detector, flags = CASES[request.param]
    return detector, filled(shapes(detector, *SMALL, *flags))


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    """Equal names and values load into the same model, and give the same outputs."""
    loaded = load_checkpoint(path)
    assert set(loaded.model) == set(state)
    assert all(torch.equal(loaded.model[key], value) for key, value in state.items())
    assert infer_codebase(loaded) == "hugging_face"
    assert identify_backbone(read_weights(path)) is None, "not a bare backbone"


def test_bin_file_has_equal_weights(case: tuple, tmp_path: Path) -> None:
    detector, state = case
    torch.save(to_hugging_face(state, detector), tmp_path / "pytorch_model.bin")
    assert_loads(tmp_path / "pytorch_model.bin", state)
    adopted, _ = adopt_architecture(load_checkpoint(tmp_path / "pytorch_model.bin"), {})
    assert adopted["detector"] == detector


def test_names_of_version_5_in_memory(case: tuple, tmp_path: Path) -> None:
    detector, state = case
    theirs = to_hugging_face(state, detector)
    torch.save({to_version_5(key): value for key, value in theirs.items()}, tmp_path / "model.bin")
    assert_loads(tmp_path / "model.bin", state)


def test_safetensors_file_has_shared_tensors_once(case: tuple, tmp_path: Path) -> None:
    detector, state = case
    once = {}
    seen = set()
    # Reversed: transformers keeps the last name in sorted order, model.decoder.bbox_embed.
    for key, value in reversed(to_hugging_face(state, detector).items()):
        number = key.startswith("bbox_embed.") and "model.decoder." + key
        if number in once or (value.data_ptr() in seen and ".0." not in key):
            continue
        if "_embed." in key:
            seen.add(value.data_ptr())
        once[to_own_resnet(key)] = value.contiguous().clone()
    save_file(once, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors").model
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_models_in_a_lightning_module_and_with_a_mask_head(tmp_path: Path) -> None:
    state = filled(shapes("detr", *SMALL))
    theirs = to_hugging_face(state, "detr")
    torch.save({"state_dict": {f"model.{k}": v for k, v in theirs.items()}}, tmp_path / "l.ckpt")
    assert_loads(tmp_path / "l.ckpt", state)
    torch.save({f"detr.{key}": value for key, value in theirs.items()}, tmp_path / "masks.bin")
    assert_loads(tmp_path / "masks.bin", state)


@pytest.mark.parametrize(
    "name",
    [
        "mask_head.conv1.conv.weight", "mask_head.fpn_stages.2.refine.norm.bias",
        "mask_head.fpn_stages.0.fpn_adapter.weight", "mask_head.output_conv.bias", "bbox_attention.q_proj.weight",
    ],
)  # fmt: skip
def test_mask_head_of_version_5_is_known(name: str) -> None:
    assert IGNORED_NAMES.fullmatch(name)


def test_config_gives_what_weights_do_not_show(tmp_path: Path) -> None:
    theirs = to_hugging_face(filled(shapes("detr", *SMALL)), "detr")
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    config = {
        "model_type": "detr", "encoder_attention_heads": 4, "dilation": True,
        "id2label": {"0": "N/A", "1": "person", "2": "LABEL_2"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(tmp_path / "pytorch_model.bin")
    assert checkpoint.class_names == {1: "person"}
    adopted, _ = adopt_architecture(checkpoint, {})
    assert (adopted["nheads"], adopted["dilation"]) == (4, True)
    (tmp_path / "config.json").write_text("{")
    assert not load_checkpoint(tmp_path / "pytorch_model.bin").class_names


def test_config_of_dilation_and_two_stages(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(to_hugging_face(filled(shapes("detr", *SMALL)), "detr"), path)
    content = {
        "model_type": "deformable_detr", "backbone_config": {"output_stride": 16}, "two_stage": True,
        "num_queries": 12, "two_stage_num_proposals": 20,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(path)["args"] == {"num_queries": 20, "dilation": True}


@pytest.mark.parametrize(
    "differs",
    [
        {"activation_function": "gelu"},
        {"encoder_attention_heads": 8, "decoder_attention_heads": 4},
        {"model_type": "deformable_detr", "d_model": 64},
    ],
)
def test_config_of_another_network_is_refused(tmp_path: Path, differs: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr", **differs}))
    with pytest.raises(UserError, match=rf"{next(reversed(differs))} is .*only .* supported"):
        read_config(tmp_path / "model.bin")
