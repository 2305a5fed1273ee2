"""hubconf.py: each entry point builds the published model and refuses checkpoints of other models."""

import argparse
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import hubconf
import models
from predictor import Predictor
from tests.documents import python_examples
from tests.tiny import ROOT
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, make_parser, resolve

# All parameters of the published implementations, the frozen stem and layer1 included.
PARAMETERS = {
    "detr_resnet50": 41_524_768,
    "detr_resnet50_dc5": 41_524_768,
    "detr_resnet101": 60_464_672,
    "detr_resnet101_dc5": 60_464_672,
    "detr_resnet50_panoptic": 42_899_288,
    "detr_resnet50_dc5_panoptic": 42_899_288,
    "detr_resnet101_panoptic": 61_839_192,
    "conditional_detr_resnet50": 43_418_401,
    "conditional_detr_resnet50_dc5": 43_418_401,
    "conditional_detr_resnet101": 62_358_305,
    "conditional_detr_resnet101_dc5": 62_358_305,
    "deformable_detr_resnet50": 40_069_665,
    "deformable_detr_resnet50_single_scale": 34_066_593,
    "deformable_detr_resnet50_single_scale_dc5": 34_066_593,
    "deformable_detr_resnet50_refine": 40_849_660,
    "deformable_detr_resnet50_refine_two_stage": 41_181_529,
}
SMALL = [
    "--hidden_dim", "32", "--nheads", "4", "--dim_feedforward", "32", "--enc_layers", "1",
    "--dec_layers", "2", "--num_queries", "20",
]  # fmt: skip
SMALL += ["--backbone_weights", "none", "--backbone_norm", "frozen", "--device", "cpu"]
STORED = ("dilation", "nheads", "backbone", "num_queries")  # in the `args` of published checkpoints
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def save_model(
    path: Path, *flags: str, script: str = FINETUNE, with_args: bool = True
) -> torch.nn.Module:
    """Save a checkpoint with random weights, as the published codebases do, and return the model in eval mode."""
    args = resolve(make_parser(script).parse_args([*flags]))
    model = models.build_model(args)[0]
    published = argparse.Namespace(**{name: getattr(args, name) for name in STORED})
    torch.save(
        {"model": model.state_dict(), **({"args": published, "epoch": 49} if with_args else {})},
        path,
    )
    return model.eval()


def run(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a narrow DETR-R50."""
    path = tmp_path_factory.mktemp("hub") / "small.pth"
    save_model(path, *SMALL)
    return path


def test_torch_hub_lists_the_entry_points() -> None:
    """torch.hub lists callables whose name does not start with an underscore."""
    listed = [
        name
        for name in dir(hubconf)
        if callable(getattr(hubconf, name)) and not name.startswith("_")
    ]
    assert set(listed) == set(PARAMETERS)
    for name in listed:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name
        assert re.search(r"DETR.*AP \d\d\.\d", entry.__doc__.splitlines()[0])
        assert "num_classes" in entry.__doc__
        assert ("threshold" in entry.__doc__) is name.endswith("_panoptic")
    assert all(map(torch.hub._check_module_exists, hubconf.dependencies))


@pytest.mark.parametrize("name", PARAMETERS)
def test_entry_point_builds_the_published_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(
        models, "load_backbone_weights", lambda body, name, source: fetched.append((name, source))
    )
    with torch.device("meta"):
        model, postprocessor = getattr(hubconf, name)(return_postprocessor=True)
        other = getattr(hubconf, name)(num_classes=7)
    backbone = "resnet101" if "resnet101" in name else "resnet50"
    assert fetched == [(backbone, "imagenet")] * 2
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.backbone[0].strides[-1] == (16 if "dc5" in name else 32)
    assert model.aux_loss is False
    assert postprocessor.classification.kind == ("softmax" if name.startswith("detr") else "focal")
    rows = {
        len(value)
        for key, value in other.state_dict().items()
        if "class_embed" in key and key.endswith("bias")
    }
    assert rows == {7 + name.startswith("detr")}


LOAD = """
import sys, torch
import datasets  # another package of this name, imported before
def fetching(*args, **kwargs): raise AssertionError(f"fetches {args}")
import urllib.request; urllib.request.OpenerDirector.open = fetching
model, postprocessor = torch.hub.load(%r, %r, source="local", pretrained=%r, return_postprocessor=True)
images = torch.load("images.pt", weights_only=True)
with torch.no_grad():
    outputs = model.eval()(images)
    listed = model([image for image in images])
found = postprocessor(outputs, torch.tensor([[480, 640], [64, 96]]))
assert torch.equal(outputs["pred_boxes"], listed["pred_boxes"])
assert datasets.whose == "another" and sys.modules["datasets"] is datasets
torch.save({"outputs": outputs, "found": found}, "out.pt")
"""


@pytest.mark.parametrize(
    ("name", "pretrained", "flags"),
    [
        (
            "detr_resnet50",
            True,
            ["--backbone_weights", "none", "--backbone_norm", "frozen", "--device", "cpu"],
        ),
        (
            "deformable_detr_resnet50_refine_two_stage",
            "file.pth",
            [
                *SMALL,
                "--detector",
                "deformable_detr",
                "--with_box_refine",
                "--two_stage",
            ],
        ),
    ],
)
def test_torch_hub_load_from_another_folder(
    name: str, pretrained: bool | str, flags: list[str], tmp_path: Path
) -> None:
    """End to end, the first case at full size: outputs equal the saved model's, and nothing is downloaded."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("whose = 'another'\n")
    torch.save(IMAGES, tmp_path / "images.pt")
    place = (
        tmp_path / "hub" / "checkpoints" / "detr-r50-e632da11.pth"
        if pretrained is True
        else tmp_path / pretrained
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    model = save_model(place, *flags, with_args=pretrained is not True)
    with torch.no_grad():
        expected = model(IMAGES)
    run(LOAD % (str(ROOT), name, pretrained), tmp_path, TORCH_HOME=str(tmp_path))
    place.unlink()
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert "aux_outputs" not in loaded["outputs"]
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(loaded["outputs"][key], expected[key])
    assert [set(image) for image in loaded["found"]] == [
        {"scores", "labels", "boxes", "queries"}
    ] * 2


def test_sizes_come_from_the_checkpoint(small: Path) -> None:
    model = hubconf.detr_resnet50(pretrained=str(small))
    assert (model.num_queries, model.hidden_dim, len(model.transformer.decoder.layers)) == (
        20,
        32,
        2,
    )
    assert model.backbone[0].norm == "frozen"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "detr_resnet101",
            {},
            "not a detr_resnet101: it has backbone resnet50 (not resnet101); load detr_resnet50",
        ),
        ("detr_resnet50_dc5", {}, "dilation False (not True); load detr_resnet50"),
        (
            "conditional_detr_resnet50",
            {},
            "detector detr (not conditional_detr); load detr_resnet50",
        ),
        ("detr_resnet50", {"num_classes": 20}, "has 91 classes, not 20; give num_classes=91"),
    ],
)
def test_checkpoint_of_another_model_is_refused(
    small: Path, name: str, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        getattr(hubconf, name)(pretrained=str(small), **options)
    assert str(small) in str(refused.value)


def test_published_dc5_checkpoint_is_recognized_by_its_file_name(
    small: Path, tmp_path: Path
) -> None:
    """It contains weights only, with the names and shapes of a model without dilation."""
    path = tmp_path / "detr-r50-dc5-f0fb7ef5.pth"
    torch.save({"model": torch.load(small, weights_only=False)["model"]}, path)
    with pytest.raises(UserError, match="dilation True .not False.; load detr_resnet50_dc5"):
        hubconf.detr_resnet50(pretrained=str(path))
    assert hubconf.detr_resnet50_dc5(pretrained=str(path)).backbone[0].strides == [16]


# ------------------------------------------------------------------------------------------------------------- panoptic


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow panoptic DETR-R50 of 250 classes, in a file that has weights only, as published."""
    path = tmp_path_factory.mktemp("hub") / "panoptic.pth"
    flags = ("--masks", "--num_classes", "250", "--nheads", "8")
    save_model(path, *SMALL, *flags, with_args=False)
    return path


def test_panoptic_model_and_postprocessor(panoptic: Path) -> None:
    model, postprocessor = hubconf.detr_resnet50_panoptic(
        pretrained=str(panoptic), return_postprocessor=True
    )
    state = torch.load(panoptic, weights_only=True)["model"]
    assert set(model.state_dict()) == set(state)
    assert sum("mask_head" in key or "bbox_attention" in key for key in state) == 32
    assert postprocessor.threshold == 0.85
    assert [postprocessor.is_thing_map[i] for i in (1, 90, 91, 200)] == [True, True, False, False]

    postprocessor.threshold = 0.0
    with torch.no_grad():
        outputs = model.eval()(IMAGES)
    assert "aux_outputs" not in outputs
    assert outputs["pred_masks"].shape[:2] == (2, 20)
    sizes = torch.tensor([[64, 96], [64, 96]])
    for result in postprocessor(outputs, sizes, torch.tensor([[128, 192], [64, 96]])):
        assert result["png_string"].startswith(b"\x89PNG")
        assert {"id", "isthing", "category_id", "area"} <= set(result["segments_info"][0])


def test_panoptic_threshold() -> None:
    with torch.device("meta"):
        _, postprocessor = hubconf.detr_resnet101_panoptic(
            threshold=0.3, return_postprocessor=True, backbone_weights="none"
        )
    assert postprocessor.threshold == 0.3


def test_predictor_loads_the_published_panoptic_model_by_name(
    panoptic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is where a download would have put it. Dilation shows in its name only."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, file, stride in (
        ("detr_resnet50_panoptic", "detr-r50-panoptic-00ce5173.pth", 32),
        ("detr_resnet50_dc5_panoptic", "detr-r50-dc5-panoptic-da08f1b1.pth", 16),
    ):
        (folder / file).write_bytes(panoptic.read_bytes())
        predictor = Predictor.from_checkpoint(
            name, device="cpu", image_size=64, panoptic_threshold=0.0
        )
        assert predictor.model.backbone[0].strides[-1] == stride
        found = predictor(torch.zeros(3, 48, 64, dtype=torch.uint8), threshold=0)
        assert found.masks.shape == (20, 48, 64)
        assert found.panoptic.segments
        (folder / file).unlink()


def test_mask_head_and_entry_point_must_agree(panoptic: Path, small: Path) -> None:
    with pytest.raises(UserError, match="masks True .not False.; load detr_resnet50_panoptic"):
        hubconf.detr_resnet50(pretrained=str(panoptic))
    with pytest.raises(UserError, match="masks False .not True.; load detr_resnet50$"):
        hubconf.detr_resnet50_panoptic(pretrained=str(small))


def test_checkpoint_of_a_pretext_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "pretext.pth", *SMALL, "--num_patches", "5", script=PRETRAIN)
    message = "is from pre-training and has no object classes; fine-tune it"
    with pytest.raises(UserError, match=message):
        hubconf.detr_resnet50(pretrained=str(tmp_path / "pretext.pth"))


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("conditional_detr_resnet101_dc5", "https://github.com/Atten4Vis/ConditionalDETR"),
        ("deformable_detr_resnet50_refine", "https://github.com/fundamentalvision/Deformable-DETR"),
    ],
)
def test_weights_on_a_file_sharing_site_are_not_downloaded(name: str, page: str) -> None:
    with pytest.raises(UserError, match=f"{page} .*give its path"):
        getattr(hubconf, name)(pretrained=True)


def test_import_conflict_names_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published DETR hub has packages `models` and `util` too."""
    theirs = types.ModuleType("util")
    theirs.__file__ = "/elsewhere/detr/util/__init__.py"
    monkeypatch.setitem(sys.modules, "util", theirs)
    with pytest.raises(ImportError, match="/elsewhere/detr/util/__init__.py is already imported"):
        hubconf.detr_resnet50(backbone_weights="none")


def test_examples_of_the_documents_run(
    small: Path, panoptic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for code in python_examples("torch.hub.load("):
        is_panoptic = "_panoptic" in code
        path = panoptic if is_panoptic else small
        code = code.replace("pretrained=True", f"pretrained={str(path)!r}")
        names: dict = {}
        exec(compile(code, "example", "exec"), names)
        if is_panoptic:
            assert [set(image) for image in names["segmentations"]] == [
                {"png_string", "segments_info"}
            ] * 2
            continue
        assert [set(image) for image in names["results"]] == [
            {"scores", "labels", "boxes", "queries"}
        ] * 2


def test_documents_name_entry_points() -> None:
    for name in ("python_api.md", "published_commands.md"):
        document = ROOT / "docs" / name
        used = re.findall(
            r"""torch\.hub\.load\(\s*["']([^"']+)["'],\s*["'](\w+)["']""", document.read_text()
        )
        assert used, document
        assert {name for _, name in used} <= set(PARAMETERS), document
    listed = re.findall(r"`(\w+_resnet\w+)`", (ROOT / "docs" / "python_api.md").read_text())
    assert set(listed) == set(PARAMETERS)


def test_num_classes_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes=0"):
        hubconf.deformable_detr_resnet50(num_classes=0, backbone_weights="none")
