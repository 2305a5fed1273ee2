"""tools/export.py: ONNX files, torch.export archives and safetensors, compared with the model; and what it refuses."""

import importlib.util
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from models import build_model
from models.frozen_norm import FoldedConv2d, bake_frozen_norms
from models.postprocess import PostProcess
from predictor import Predictor, preprocess, to_uint8_tensor
from tests.documents import python_examples
from tests.published_files import SMALL, filled, updetr
from tests.tiny import assert_same, captured_log, draw, fine_tune, tiny_args, write_coco
from tools import export
from tools.exports.check import TOLERANCE, check, largest_difference
from tools.exports.formats import run_onnx, to_onnx
from tools.exports.graph import EXAMPLE_SHAPE, Graph, record
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError
from util.settings import FINETUNE, settings

NAMES = {0: "cat", 1: "dog", 3: "bird"}


def onnx_runtime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Pooled(nn.Module):
    """Stands for a ResNet, whose hundred operations take most of the time of an export: pooled, mixed channels."""

    def __init__(self, strides: list[int], channels: list[int]) -> None:
        super().__init__()
        self.strides, self.channels = strides, channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = {}
        for i, (stride, channels) in enumerate(zip(self.strides, self.channels, strict=True)):
            # Rounded up, as the convolutions of a ResNet do.
            pooled = functional.avg_pool2d(images, stride, ceil_mode=True)
            maps[str(i)] = pooled.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
        return maps


def small_graph(*flags: str, postprocessing: bool = False, pooled: bool = True) -> Graph:
    torch.manual_seed(0)
    model, _, postprocessors = build_model(tiny_args(FINETUNE, *flags), 5)
    backbone = model.backbone[0]
    if pooled:
        backbone.body = Pooled(backbone.strides, backbone.num_channels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # also layers that are initialized with zeros
        for name, value in model.named_parameters():
            if ".body." not in name:
                value.add_(torch.randn(value.shape, generator=generator) / 10)
    bbox = postprocessors["bbox"] if postprocessing else None
    return Graph(model.eval(), model.normalization if postprocessing else None, bbox).eval()


def write_checkpoint(path: Path, *flags: str) -> Path:
    args = tiny_args(FINETUNE, "--backbone_norm", "frozen", *flags)
    torch.manual_seed(0)
    state = build_model(args, 5)[0].state_dict()
    content = {"model": state, "args": args.as_dict(), "class_names": NAMES, "version": 1}
    save_checkpoint({**content, "optimizer": {"state": {}, "param_groups": [{}]}, "epoch": 3}, path)
    return path


def run(*words: object) -> str:
    with captured_log() as lines:
        export.main(export.parse([str(word) for word in words]))
    return "\n".join(lines)


def as_onnx(graph: Graph) -> bytes:
    return to_onnx(record(graph), {"class_names": json.dumps(NAMES)})


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "postprocessing"),
    [
        (("--detector", "detr", "--masks"), True),
        (("--detector", "detr", "--masks"), False),
        (("--detector", "detr", "--position_embedding", "learned", "--pre_norm"), False),
        (("--detector", "conditional_detr"), True),
        (("--detector", "deformable_detr", "--with_box_refine", "--two_stage"), False),
        (("--detector", "deformable_detr", "--with_box_refine"), True),
    ],
)
def test_onnx_equals_the_model_at_other_sizes(flags: tuple[str, ...], postprocessing: bool) -> None:
    """With dynamic batch, height and width, whose names are in the file, as are the class names."""
    onnx_runtime()
    masks = "--masks" in flags
    graph = small_graph(*flags, postprocessing=postprocessing, pooled=not masks)
    content = as_onnx(graph)
    shapes = [(1, 3, 97, 260), (3, 3, 224, 130)]
    assert check(graph, run_onnx(content), shapes, "ONNX") < TOLERANCE


def test_onnx_file_of_the_script_and_its_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Names of axes, metadata, and the detections that the example of docs/export.md prints for an image."""
    runtime = onnx_runtime()
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "checkpoint.pth", "--dec_layers", "1", "--num_classes", "5")
    words = ("--preprocessing", "--postprocessing")
    text = run("--checkpoint", path, "--out", "detector.onnx", *words)
    assert "inputs images, sizes_hw, outputs scores, labels, boxes; differs from" in text
    session = runtime.InferenceSession("detector.onnx", providers=["CPUExecutionProvider"])
    inputs = {value.name: (value.shape, value.type) for value in session.get_inputs()}
    assert inputs["images"] == (["batch", 3, "height", "width"], "tensor(uint8)")
    assert inputs["sizes_hw"] == (["batch", 2], "tensor(int64)")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"])["3"] == "bird"
    assert json.loads(metadata["args"])["nheads"] == 4

    Image.fromarray(draw(0, 90, 128)[0]).save("image.png")
    Path("image.png").rename("image.jpg")  # without the loss of JPEG
    (code,) = python_examples("onnxruntime.InferenceSession(")
    exec(compile(code.replace("> 0.5", "> 0.0"), "example", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    wanted = Predictor.from_checkpoint(path, device="cpu")("image.jpg", threshold=0)
    assert len(printed) == len(wanted) == 20
    assert float(printed[0].split("[")[0].split()[-1]) == pytest.approx(
        float(wanted.scores[0]), abs=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr"])
def test_full_size_detector_with_resnet50(detector: str, tmp_path: Path) -> None:
    onnx_runtime()
    path = tmp_path / "checkpoint.pth"
    config = settings(
        detector=detector, backbone_weights="none", backbone_norm="frozen", device="cpu"
    )
    torch.manual_seed(0)
    state = build_model(config, 91)[0].state_dict()
    save_checkpoint({"model": state, "args": config.as_dict(), "version": 1}, path)
    words = ("--checkpoint", path, "--preprocessing", "--postprocessing")
    assert "differs from the model by at most" in run(*words, "--out", tmp_path / "detector.onnx")


def test_recorded_deformable_detr_equals_the_model_at_other_sizes() -> None:
    """Without ONNX, and with one level, which is quicker; a slow test has all levels."""
    graph = small_graph(
        *("--detector", "deformable_detr", "--num_feature_levels", "1", "--dec_layers", "1")
    )
    module = record(graph).program.module()
    assert check(graph, lambda inputs: module(**inputs), [(3, 3, 97, 130)], "it") < 1e-6


def test_graph_gives_the_predictions_of_a_predictor(tmp_path: Path) -> None:
    """Its pre- and post-processing are those of `Predictor` with threshold 0."""
    image, _, _ = draw(0, 90, 128)
    for detector in ("detr", "conditional_detr"):  # softmax and focal
        path = write_checkpoint(tmp_path / f"{detector}.pth", "--detector", detector)
        predictor = Predictor.from_checkpoint(path, device="cpu")
        graph = export.build_graph(predictor, preprocessing=True, postprocessing=True)
        resized, target = preprocess(to_uint8_tensor(image), predictor.transforms)
        found = graph(resized[None], target["orig_size"][None])
        wanted = predictor(image, threshold=0)
        torch.testing.assert_close(found["scores"][0], wanted.scores)
        torch.testing.assert_close(found["boxes"][0], wanted.boxes, rtol=0, atol=1e-3)
        assert found["labels"][0].tolist() == wanted.labels.tolist()
        assert (found["boxes"][0] <= torch.tensor([128, 90, 128, 90])).all()


def test_frozen_norms_are_baked_into_convolutions() -> None:
    graph = small_graph("--detector", "detr", "--backbone_norm", "frozen", pooled=False)
    assert not any(isinstance(module, FoldedConv2d) for module in graph.modules())
    model = build_model(tiny_args(FINETUNE, "--backbone_norm", "frozen"), 5)[0].eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted = model(images)["pred_logits"]
        bake_frozen_norms(model)
        torch.testing.assert_close(model(images)["pred_logits"], wanted)


# -------------------------------------------------------------------------------------------------------------- check


def test_check_finds_constants_of_the_recorded_size() -> None:
    """What differs, or fails, is an error of one line; an unknown shape of the output too."""
    graph = small_graph("--detector", "detr")

    def slightly_off(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = graph(**inputs)
        return {**found, "boxes": found["boxes"] + 3 * TOLERANCE}

    with torch.no_grad(), pytest.raises(UserError, match=r"differs from the model by 3\.0e-04"):
        check(graph, slightly_off, [(1, 3, 96, 64)], "it")

    def fails(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(UserError, match=r"fails on images of 1 x 3 x 96 x 64 \(first line\)"):
        check(graph, fails, [(1, 3, 96, 64)], "it")
    with pytest.raises(AssertionError, match="recorded size"):
        check(graph, fails, [EXAMPLE_SHAPE], "it")


@torch.no_grad()
def test_equal_scores_may_swap_places_but_nothing_else() -> None:
    graph = small_graph("--detector", "detr", postprocessing=True)
    assert isinstance(graph.postprocess, PostProcess)
    inputs = graph.inputs((2, 3, 96, 64))
    expected = graph(**inputs)
    swapped = {
        name: value[:, [1, 0, *range(2, value.shape[1])]] for name, value in expected.items()
    }
    assert largest_difference(graph, expected, swapped) == 0
    wrong = {**swapped, "labels": swapped["labels"].clone()}
    wrong["labels"][1, 0] += 1
    assert largest_difference(graph, expected, wrong) > 1e-3


def test_another_last_result_does_not_shift_the_others() -> None:
    """The last of the best pairs of query and class may be another one by rounding."""
    graph = SimpleNamespace(postprocess=PostProcess)
    scores = torch.linspace(0.9, 0.5, 6)[None]  # [1, 6]
    expected = {"scores": scores, "labels": torch.tensor([[0, 10, 20, 30, 40, 50]])}
    expected["boxes"] = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0))
    labels = expected["labels"].clone()
    labels[0, -1] = 5
    found = {**expected, "labels": labels}
    assert largest_difference(graph, expected, found) == 0
    labels[0, 2] = 21
    assert largest_difference(graph, expected, found) > 1e-2


# ------------------------------------------------------------------------------------------------------------- script


@pytest.mark.slow
def test_archive_is_checked_and_has_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth", "--dec_layers", "1", "--enc_layers", "1")
    out = tmp_path / "detector.pt2"
    text = run("--checkpoint", path, "--out", out)
    assert "inputs images, outputs logits, boxes; differs from the model by at most" in text
    files = {"metadata.json": ""}
    program = torch.export.load(io.BytesIO(out.read_bytes()), extra_files=files)
    metadata = json.loads(files["metadata.json"])
    assert json.loads(metadata["class_names"]) == {str(k): v for k, v in NAMES.items()}
    assert json.loads(metadata["resize"]) == {"short_side": 64, "long_side": 107}
    assert json.loads(metadata["args"])["nheads"] == 4
    found = program.module()(images=torch.randn(1, 3, 100, 65))
    assert found["logits"].shape == (1, 20, 6)

    with pytest.raises(UserError, match="exists and is not overwritten"):
        run("--checkpoint", path, "--out", out)

    def zeros(content: bytes):
        return lambda inputs: {"logits": torch.zeros(1), "boxes": torch.zeros(1)}

    monkeypatch.setitem(export.GRAPH_FORMATS, ".pt2", (lambda *_: b"", zeros))
    monkeypatch.setattr(export, "record", lambda graph: None)
    with pytest.raises(UserError, match="nothing was written"):
        run("--checkpoint", path, "--out", tmp_path / "wrong.pt2")
    assert not (tmp_path / "wrong.pt2").exists()


@pytest.mark.parametrize("detector", ["detr", "deformable_detr"])
def test_safetensors_stand_for_the_checkpoint(detector: str, tmp_path: Path) -> None:
    """Also heads that layers share; settings and classes included, no training state."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = write_checkpoint(tmp_path / "checkpoint.pth", "--detector", detector)
    run("--checkpoint", path, "--out", tmp_path / "detector.safetensors")
    found, source = (load_checkpoint(p) for p in (tmp_path / "detector.safetensors", path))
    assert_same(found.model, dict(source.model))
    assert (found.class_names, found.epoch) == (NAMES, 3)
    assert found.args == json.loads(json.dumps(source.args))
    assert found.missing_state() == "no optimizer"

    image, _, _ = draw(0, 60, 72)
    predictions = [
        Predictor.from_checkpoint(p, device="cpu")(image, threshold=0)
        for p in (tmp_path / "detector.safetensors", path)
    ]
    assert torch.equal(predictions[0].boxes, predictions[1].boxes)
    assert predictions[0].names == predictions[1].names


def test_fine_tuning_starts_from_safetensors(tmp_path: Path) -> None:
    """By --pretrain from pre-training, and by --eval --resume from a detector."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    coco = write_coco(tmp_path / "coco", train=2, val=1)
    torch.save({"model": filled(updetr(*SMALL))}, tmp_path / "updetr.pth")
    run("--checkpoint", tmp_path / "updetr.pth", "--out", tmp_path / "updetr.safetensors")
    data = ("--coco_path", coco)
    pretrain = ("--pretrain", tmp_path / "updetr.safetensors")
    fine_tune(*data, *pretrain, "--epochs", 1, "--output_dir", tmp_path / "run")
    trained = tmp_path / "run" / "checkpoint.pth"
    run("--checkpoint", trained, "--out", tmp_path / "detector.safetensors")
    words = ("--eval", "--resume", tmp_path / "detector.safetensors")
    fine_tune(*data, *words, "--output_dir", tmp_path / "eval")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert len(metrics["coco_eval_bbox"]) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.engine"], "ending must be one of .onnx, .pt2, .safetensors"),
        (["--out", "x.safetensors", "--preprocessing"], "weights only"),
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        export.parse(["--checkpoint", "x.pth", *words])
    assert message in capsys.readouterr().err


def test_missing_packages_and_pre_training_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": filled(updetr(*SMALL))}, tmp_path / "updetr.pth")
    with pytest.raises(UserError, match="from pre-training and has no object classes"):
        run("--checkpoint", tmp_path / "updetr.pth", "--out", tmp_path / "x.pt2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime onnxscript"):
        run("--checkpoint", tmp_path / "updetr.pth", "--out", tmp_path / "x.onnx")
