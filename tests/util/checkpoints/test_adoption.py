"""util/checkpoints/adoption.py: what a run takes from a file that says little: classes, DC5 and the pretext."""

import hashlib
from pathlib import Path

import pytest
import torch

import hubconf
from tests.published_files import SMALL, detreg, masks, published_files, shapes, siamese, updetr
from tests.tiny import captured_log
from util.checkpoints import dilation
from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import Checkpoint, parse_checkpoint
from util.checkpoints.hub_models import HUB_MODELS
from util.errors import UserError
from util.settings import PRETRAIN

FILES = published_files()
R50 = (*SMALL, "--backbone", "resnet50")


def adopt(state: dict, source: str = "file.pth", script: str = "", **given) -> dict:
    checkpoint = parse_checkpoint({"model": state}, source)
    more = (script,) if script else ()
    return settings_from_checkpoint(checkpoint, {"resume": source, **given}, *more)


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("state", "num_classes"),
    [
        (shapes("detr", *SMALL, outputs=92), 91),
        (shapes("conditional_detr", *SMALL, outputs=91), 91),
        (shapes("deformable_detr", *SMALL, outputs=7), 7),
        (masks(), 250),
    ],
    ids=["detr", "conditional", "own", "panoptic"],
)
def test_number_of_classes_is_that_of_the_head(state: dict, num_classes: int) -> None:
    for given in ({}, {"eval": True}, {"num_classes": num_classes}):
        assert adopt(state, **given)["num_classes"] == num_classes
    message = (
        f"--num_classes 30 contradicts file.pth, whose class head has {num_classes} classes; omit "
    )
    with pytest.raises(UserError, match=message):
        adopt(state, num_classes=30)


def test_fine_tuning_has_classes_of_its_own() -> None:
    checkpoint = parse_checkpoint({"model": shapes("detr", *SMALL, outputs=92)}, "file.pth")
    assert "num_classes" not in settings_from_checkpoint(checkpoint, {"pretrain": "file.pth"})


def test_hub_takes_the_number_of_classes_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    with torch.device("meta"):
        model = hubconf.conditional_detr_resnet50(num_classes=7, backbone_weights="none")
    state = {key: torch.zeros(1).expand(value.shape) for key, value in model.state_dict().items()}
    torch.save({"model": state}, path)
    model = hubconf.conditional_detr_resnet50(pretrained=str(path))
    assert model.class_embed.bias.shape == (7,)


# ----------------------------------------------------------------------------------------------------------------- DC5


def dilation_warnings(source: str, flags: tuple[str, ...] = R50, **given) -> list[str]:
    with captured_log() as lines:
        adopt(shapes("detr", *flags, outputs=92), source, **given)
    return [line for line in lines if "DC5" in line]


def test_unknown_dilation_is_asked_about() -> None:
    (line,) = dilation_warnings("renamed.pth")
    assert line.startswith("renamed.pth: ")
    assert "add --dilation" in line
    assert not dilation_warnings("renamed.pth", dilation=True)
    assert not dilation_warnings("renamed-dc5.pth")
    assert not dilation_warnings("detr-r50-e632da11.pth")
    assert not dilation_warnings("renamed.pth", SMALL)  # ResNet-18 can't be dilated


def test_stored_dilation_needs_no_question() -> None:
    with captured_log() as lines:
        state = {"model": shapes("detr", *R50, outputs=92), "args": {"dilation": True}}
        checkpoint = parse_checkpoint(state, "renamed.pth")
        assert settings_from_checkpoint(checkpoint, {"resume": "renamed.pth"})["dilation"] is True
    assert not [line for line in lines if "DC5" in line]


def test_published_file_is_recognized_after_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.pth"
    path.write_bytes(b"weights")
    assert dilation.infer_dilation(str(path)) is None
    start_of_hash = hashlib.sha256(b"weights").hexdigest()[:8]
    monkeypatch.setitem(dilation.PUBLISHED_DC5, start_of_hash, True)
    assert dilation.infer_dilation(str(path)) is True
    path.write_bytes(b"other weights")
    assert dilation.infer_dilation(str(path)) is None


def test_hashes_are_those_of_the_published_names() -> None:
    named = {
        model.url.rsplit("-", 1)[1].removesuffix(".pth"): model.settings["dilation"]
        for model in HUB_MODELS.values()
        if model.url.endswith(".pth")
    }
    assert named == dilation.PUBLISHED_DC5


# ------------------------------------------------------------------------------------------------------------- pretext


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("updetr", {"pretext": "random_query_patch", "feature_recon": True, "num_patches": 10}),
        ("detreg", {"pretext": "region_prior", "object_embedding_loss": True}),
        ("detreg detr", {"pretext": "region_prior", "object_embedding_loss": True}),
        ("siamese detr", {"pretext": "siamese"}),
        ("siamese updetr", {"pretext": "random_query_patch", "feature_recon": True}),
    ],
)
def test_published_file_tells_its_pretext(kind: str, expected: dict) -> None:
    checkpoint = parse_checkpoint(FILES[kind], "file.pth")
    adopted = settings_from_checkpoint(checkpoint, {"resume": "file.pth"}, PRETRAIN)
    assert {name: adopted[name] for name in expected} == expected


def test_parts_of_the_pretext_come_from_the_weights() -> None:
    without_features = {
        key: value for key, value in updetr(*SMALL).items() if not key.startswith("feature_align.")
    }
    assert adopt(without_features, script=PRETRAIN)["feature_recon"] is False
    with pytest.raises(UserError, match="add --pretext region_prior"):
        adopt(detreg("detr", *SMALL), script=PRETRAIN, pretext="siamese")
    own = Checkpoint(
        model=siamese("detr", *SMALL), args={"pretext": "siamese", "script": PRETRAIN}, source="f"
    )
    assert "feature_loss_coef" not in settings_from_checkpoint(own, {"resume": "f"}, PRETRAIN)
