"""Folders for Hugging Face transformers: names, settings, equal outputs there, and back."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datasets.collate import normalize_images
from models import build_model
from predictor import Predictor, preprocess, to_uint8_tensor
from tests.documents import python_examples
from tests.published_files import SMALL, filled, masks, shapes, updetr
from tests.tiny import assert_same, captured_log, draw, make_batch, tiny_args
from tests.util.checkpoints.test_hugging_face import CASES as NAME_CASES
from tests.util.checkpoints.test_hugging_face import to_hugging_face as published_names
from tools import convert_checkpoint
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.hugging_face import from_hugging_face
from util.checkpoints.hugging_face_folder import to_hugging_face
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.settings import FINETUNE

TOLERANCE = 1e-6  # both encode positions in float32
NAMES = {row: f"thing {row}" for row in range(5)}
NAMES.pop(2)  # a row without a class, as in COCO
# Deformable DETR needs a multiple of 128: transformers has 32 groups in its group norms.
WIDE = ("--detector", "deformable_detr", "--hidden_dim", "128")
CASES = {
    "detr": ("--detector", "detr"),
    "dilation": ("--detector", "detr", "--dilation", "--backbone", "resnet50"),
    "learned encoding": ("--detector", "detr", "--position_embedding", "learned"),
    "masks": ("--detector", "detr", "--masks", "--hidden_dim", "64", "--nheads", "8"),
    "conditional_detr": ("--detector", "conditional_detr"),
    "deformable_detr": (*WIDE, "--enc_n_points", "2", "--dec_n_points", "3"),
    "single scale, dilation": (*WIDE, "--num_feature_levels", "1", "--dilation", "--backbone", "resnet50"),
    "two levels": (*WIDE, "--num_feature_levels", "2"),
    "refine": (*WIDE, "--with_box_refine"),
    "two_stage": (*WIDE, "--with_box_refine", "--two_stage"),
}  # fmt: skip


def write_checkpoint(path: Path, *flags: str) -> nn.Module:
    """Save a detector with random weights, also in zero-initialized layers, and return it."""
    args = tiny_args(FINETUNE, "--backbone_norm", "frozen", *flags)
    torch.manual_seed(0)
    model = build_model(args, 5)[0].eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }.items():
            if "running" not in name and ".body." not in name:
                value.add_(torch.randn(value.shape, generator=generator) / 20)
    content = {"model": model.state_dict(), "args": args.as_dict(), "class_names": NAMES}
    save_checkpoint({**content, "version": 1}, path)
    return model


def convert(path: Path, folder: Path, *words: str) -> str:
    with captured_log() as lines:
        arguments = [str(path), "--to", "transformers", "--out", str(folder), *words]
        convert_checkpoint.main(convert_checkpoint.parse(arguments))
    return "\n".join(lines)


@torch.no_grad()
def outputs(model: nn.Module, samples: NestedTensor, masks: bool) -> list[Tensor]:
    found = model.double()(samples)
    names = ["pred_logits", "pred_boxes", *(["pred_masks"] if masks else [])]
    return [found[name] for name in names]


@torch.no_grad()
def outputs_there(peer: nn.Module, samples: NestedTensor) -> list[Tensor]:
    mask = (~samples.mask).long()
    found = peer.double().eval()(pixel_values=samples.tensors, pixel_mask=mask)
    return [found[name] for name in ("logits", "pred_boxes", "pred_masks") if name in found]


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("conditional_detr", "two_stage") else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)  # fmt: skip
def test_transformers_computes_the_same(case: str, tmp_path: Path) -> None:
    """On a padded batch, in float64; and what it saves loads here, with equal weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    model = write_checkpoint(tmp_path / "checkpoint.pth", *CASES[case])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    convert(tmp_path / "checkpoint.pth", tmp_path / "folder")

    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    peer, report = kind.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    peer.save_pretrained(tmp_path / "theirs")
    assert_same(load_checkpoint(tmp_path / "theirs").model, state)

    samples = make_batch([(96, 128), (128, 112)])
    samples.tensors = samples.tensors.double()
    expected = outputs(model, samples, masks=case == "masks")
    for found, wanted in zip(outputs_there(peer, samples), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_image_processor_of_transformers_is_ours(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_checkpoint(tmp_path / "checkpoint.pth", *CASES["detr"])
    convert(tmp_path / "checkpoint.pth", tmp_path / "folder")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    image, _, _ = draw(0, 90, 128)
    found = processor(image, return_tensors="pt")["pixel_values"]

    predictor = Predictor.from_checkpoint(tmp_path / "checkpoint.pth", device="cpu")
    resized, _ = preprocess(to_uint8_tensor(image), predictor.transforms)
    wanted = normalize_images(resized[None], **predictor.model.normalization)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().mean() < 0.02, "apart from rounding in between"


@pytest.mark.slow
def test_example_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoint.pth", *CASES["detr"])
    convert(tmp_path / "checkpoint.pth", Path("for_transformers"))
    (code,) = python_examples("from transformers import")
    names: dict = {}
    exec(compile(code, "example", "exec"), names)
    assert type(names["model"]).__name__ == "DetrForObjectDetection"
    assert names["model"].config.id2label[3] == "thing 3"


@pytest.mark.parametrize("case", [*NAME_CASES, "masks"])
def test_names_are_those_of_transformers_and_come_back(case: str) -> None:
    """The names that its own conversion writes; none is lost, none is doubled, no value changes."""
    if case == "table_transformer":
        pytest.skip("a pre-norm DETR is refused, see test_what_transformers_lacks_is_refused")
    if case == "masks":
        detector, state = "detr", masks(*SMALL)
    else:
        detector, flags = NAME_CASES[case]
        state = shapes(detector, *SMALL, *flags)
    state = filled(state)
    theirs = to_hugging_face(state, detector)
    if case != "masks":
        wanted = published_names(state, detector)
        wanted = {
            key.replace("backbone.position_embedding", "position_embedding"): value
            for key, value in wanted.items()
        }
        assert_same(theirs, wanted)
    assert_same(from_hugging_face(theirs), state)


def test_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="no name of transformers for patch2query"):
        to_hugging_face({"patch2query.weight": torch.zeros(1)}, "detr")


def test_folder_has_settings_and_classes_and_predicts_here(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint.pth", *CASES["detr"], "--image_size", "96")
    text = convert(tmp_path / "checkpoint.pth", tmp_path / "folder")
    assert "transformers.DetrForObjectDetection.from_pretrained(" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "folder"]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    labels = {"0": "thing 0", "1": "thing 1", "2": "N/A", "3": "thing 3", "4": "thing 4"}
    assert config["id2label"] == labels
    assert (config["encoder_attention_heads"], config["num_queries"]) == (4, 20)
    processor = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 96, "longest_edge": 160}

    image, _, _ = draw(0, 60, 72)
    options = {"device": "cpu", "image_size": 96}
    found, wanted = (
        Predictor.from_checkpoint(tmp_path / name, **options)(image, threshold=0)
        for name in ("folder", "checkpoint.pth")
    )
    assert found.names == wanted.names
    assert torch.equal(found.boxes, wanted.boxes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--detector", "deformable_detr"), "--hidden_dim 32, .* multiples of 128"),
        ((*WIDE, "--two_stage"), "--with_box_refine False"),
        (("--detector", "detr", "--pre_norm"), "--pre_norm True"),
        (("--detector", "detr", "--position_embedding", "sine_shifted"), "sine or learned"),
        (("--detector", "conditional_detr", "--masks"), "--detector conditional_detr"),
        (("--detector", "detr", "--masks"), "--hidden_dim 32 and --nheads 4 with a mask head"),
        (("--detector", "detr", "--classification", "focal"), "--classification focal"),
    ],
)
def test_what_transformers_lacks_is_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "checkpoint.pth", *flags)
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "checkpoint.pth", tmp_path / "folder")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_pre_training_is_refused(tmp_path: Path) -> None:
    torch.save({"model": filled(updetr(*SMALL))}, tmp_path / "updetr.pth")
    with pytest.raises(UserError, match="no object classes, .* fine-tune it first"):
        convert(tmp_path / "updetr.pth", tmp_path / "folder")


def test_mask_head_can_be_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint.pth", "--detector", "detr", "--masks")
    convert(tmp_path / "checkpoint.pth", tmp_path / "folder", "--drop_masks")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["DetrForObjectDetection"]
