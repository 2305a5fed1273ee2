"""The benchmark times only contenders with equal outputs, in turns, and its page is made from its results."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.published_files import SMALL, filled, shapes
from tests.tiny import ROOT
from tests.util.checkpoints.test_hugging_face import CASES
from tests.util.checkpoints.test_hugging_face import to_hugging_face as written_by_transformers
from tools.benchmarks import (
    evaluation,
    gpu,
    kernels,
    loader,
    matching,
    measure,
    peers,
    report,
    results,
    roof,
    step,
    work,
)
from tools.benchmarks.command import main, parse
from tools.benchmarks.measure import Comparison, Local, Seconds
from util.errors import UserError

CPU = torch.device("cpu")
TINY = [
    "--backbone", "resnet18", "--hidden_dim", "32", "--dim_feedforward", "32", "--enc_layers", "1",
    "--dec_layers", "2", "--num_queries", "12", "--size", "64", "64",
]  # fmt: skip


def run(output: Path, *words: str) -> dict:
    """Run a subject with one turn on a CPU; return the run in the results file."""
    main(parse([*words, "--device", "cpu", "--turns", "1", "--output", str(output)]))
    return json.loads((output / results.FILE).read_text())["runs"][-1]


def contenders(found: dict, comparison: str) -> list[str]:
    return [row["contender"] for row in found["rows"] if row["comparison"] == comparison]


# ---- what all subjects share ----


def fixed(values: list[float]) -> Local:
    return Local(lambda: None, lambda: [torch.tensor(values)], CPU)


def test_contender_with_different_output_is_not_timed() -> None:
    wrong = {"first": fixed([1.0, 1.0, 1.0]), "other": fixed([1.0, 1.0, 1.1])}
    with pytest.raises(UserError, match="case: other differs from first by 0.1"):
        measure.measure(Comparison("case", wrong, 1e-3), 1)
    assert measure.check(Comparison("case", wrong, 1e-3, {"other": 0.2}))["other"] > 0.09
    nan = {"first": fixed([1.0]), "other": fixed([float("nan")])}
    with pytest.raises(UserError, match="nan"):
        measure.measure(Comparison("case", nan, 1e-3), 1)


def test_contenders_are_interleaved_and_rows_have_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Fake:
        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.seconds = name, seconds

        def outputs(self) -> list[torch.Tensor]:
            return [torch.ones(1)]

        def time(self, count: int) -> Seconds:
            calls.append((self.name, count))
            return Seconds(self.seconds.pop(0), 0.5)

        def peak_mib(self) -> None:
            return None

    monkeypatch.setattr(measure, "SECONDS_PER_TURN", 2.0)
    fakes = {"a": Fake("a", [9.0, 1.0, 8.0, 2.0, 3.0]), "b": Fake("b", [9.0, 2.0, 1.0, 1.0, 2.0])}
    first, second = measure.measure(Comparison("case", fakes, 0.0, items=3), 3)
    # Two calls each to warm up and to choose the length of a turn, then three turns.
    assert calls == [("a", 1), ("a", 1), ("b", 1), ("b", 1)] + [("a", 2), ("b", 1)] * 3
    assert (first.median_ms, second.median_ms, first.cpu_ms) == (3000, 1000, 500)
    assert (first.low_ms, first.high_ms) == (2500, 5500)
    table = results.times_table([vars(first), vars(second)])
    assert "| 0.33 " in table  # ours, the first one, is three times as slow


def test_a_run_replaces_one_of_the_same_command(tmp_path: Path) -> None:
    path = tmp_path / results.FILE
    for command, value in (("a", 1), ("b", 2), ("a", 3)):
        results.save_run(path, {"command": command, "value": value})
    assert [(r["command"], r["value"]) for r in results.read_runs(path)] == [("b", 2), ("a", 3)]
    path.write_text("[]")
    with pytest.raises(UserError, match="no results file"):
        results.read_runs(path)


def test_command_is_recorded_without_paths(tmp_path: Path) -> None:
    args = parse(
        ["step", "--models", "detr", "--output", str(tmp_path), "--against", str(tmp_path)]
    )
    assert args.command == f"python tools/benchmark.py step --models detr --against {tmp_path.name}"


def test_wrong_device_turns_and_flags_are_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU is visible"):
            main(parse(["kernels", "--output", str(tmp_path), "--device", "cuda"]))
    for words in (
        ["kernels", "--turns", "0"],
        ["kernels", "--lr", "1"],
        ["step", "--no_such", "1"],
    ):
        with pytest.raises(SystemExit):
            parse(words)
    with pytest.raises(UserError, match="no checkout"):
        main(parse(["matching", "--against", str(tmp_path), "--output", str(tmp_path)]))
    assert parse(["step", "--models", "siamese/detr", "--num_patches", "5"]).flags == {
        "num_patches": 5
    }


# ---- subjects ----


def test_step_of_a_detector_and_a_pretext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "missing", lambda *names: f"not installed: pip install {names[0]}")
    monkeypatch.setattr(roof, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(roof, "copy_rate", lambda *_: 1e9)
    found = run(tmp_path, "step", "--models", "detr", *TINY, "--variant", "--amp bf16", "--parts")
    name = "detr, 2 x 64 x 64"
    assert contenders(found, name) == ["ours", "ours --amp bf16"]
    assert found["not_measured"] == {
        f"transformers, {name}": "not installed: pip install transformers"
    }
    facts = found["facts"][name]
    assert list(facts["parts"]) == list(step.PARTS)
    assert facts["roof"]["flops"] > 1e8
    assert all(row["items"] == 2 and row["median_ms"] > 0 for row in found["rows"])
    assert found["rows"][1]["difference"] > 1e-6  # bfloat16 was on

    model = "random_query_patch/deformable_detr"
    words = ["--patch_size", "32", "--num_patches", "4", "--no_roof"]
    found = run(tmp_path, "step", "--models", model, *TINY, *words)
    assert contenders(found, f"{model}, 2 x 64 x 64") == ["ours"]


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        return None

    monkeypatch.setattr(peers.importlib.util, "find_spec", absent)
    words = ["--batch_sizes", "1", "2", "--no_roof"]
    found = run(tmp_path, "inference", "--models", "conditional_detr", *TINY, *words)
    names = [f"conditional_detr, {batch} x 64 x 64" for batch in (1, 2)]
    assert [row["comparison"] for row in found["rows"]] == names
    assert (
        found["not_measured"][f"ONNX Runtime, {names[0]}"]
        == "not installed: pip install onnx onnxruntime onnxscript"
    )
    with pytest.raises(UserError, match="a pretext has no inference"):
        run(tmp_path, "inference", "--models", "siamese/detr")


def test_another_checkout_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Here it is this checkout again. Its criterion must agree, so it had the same inputs."""
    words = ["matching", "--batch_size", "2", "--layers", "2", "--queries", "20"]
    found = run(tmp_path, *words, "--against", str(ROOT))
    names = contenders(found, "focal, 2 layers x 2 images x 20 queries")
    assert names[:2] == ["ours", "published form"]
    assert len(names) == 3
    assert names[2].startswith("commit ")
    assert str(ROOT) not in json.dumps(found)


@pytest.mark.parametrize("kind", matching.KINDS)
def test_published_losses_notice_a_difference(kind: str) -> None:
    case = {"kind": kind, "device": "cpu", "layers": 3, "batch_size": 4, "queries": 20}
    ours, published = matching.build(case), matching.published(case)
    assert measure.difference(published.outputs(), ours.outputs()) < 1e-5
    other = matching.build({**case, "queries": 21}).outputs()[:1]
    assert measure.difference(other, ours.outputs()[:1]) > 1e-3


def test_loader_loads_the_next_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NUM_IMAGES", 4)
    words = ["--models", "detection", "random_query_patch", "--batch_size", "2"]
    found = run(tmp_path, "loader", *words, "--image_size", "64", "--source_size", "300", "400")
    assert [row["comparison"] for row in found["rows"]] == ["detection", "random_query_patch"]

    loader.write_images(tmp_path / "images", (60, 80))
    with Image.open(tmp_path / "images" / "train2017" / "000000000004.jpg") as image:
        assert image.size == (80, 60)
    flags = {"coco_path": str(tmp_path / "images"), "image_size": 64}
    contender = loader.build({"flags": flags, "batch_size": 3})
    _, first = contender.run()
    _, second = contender.run()
    assert first.tensors["image_id"].tolist() == [1, 2, 3]
    assert second.tensors["image_id"].tolist() == [4, 1, 2]  # in the second epoch


def test_evaluation_finds_its_objects() -> None:
    truth = evaluation.make_ground_truth(5)
    batches = evaluation.make_detections(truth)
    assert sum(len(d["scores"]) for batch in batches for d in batch.values()) == 500
    stats = evaluation.build({"images": 5, "backend": "pycocotools"}).outputs()[0]
    assert 0.05 < stats[0] < 0.9


def test_kernels_on_cpu(tmp_path: Path) -> None:
    found = run(tmp_path, "ms_deform_attn", "--image_size", "64", "--batch_size", "1")
    rows = [row for row in found["rows"] if row["contender"] == "pytorch"]
    assert [row["comparison"] for row in rows] == [
        "encoder, float32",
        "encoder with softmax and locations, float32",
        "decoder, float32",
        "encoder, bfloat16",
        "encoder with softmax and locations, bfloat16",
        "decoder, bfloat16",
    ]
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in found["not_measured"]["triton, encoder, float32"]
    assert found["environment"]["torch"] in torch.__version__
    assert "Not measured: triton" in results.run_text(found)


def test_sweep_varies_the_launch_of_one_kernel_and_names_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for the kernels, which need a GPU. It reads the launch in its backward pass, as they do."""
    triton_kernels = pytest.importorskip("models.ms_deform_attn_triton")
    usual, launches = triton_kernels.BACKWARD, set()
    plain = kernels.ms_deform_attn

    def stand_in(value, shapes, locations, weights, implementation="pytorch"):
        output = plain(value, shapes, locations, weights, "pytorch")
        output.register_hook(lambda _: launches.add(triton_kernels.BACKWARD))
        return output

    def fused(value, shapes, samples, references):
        sizes_wh = torch.tensor([(w, h) for h, w in shapes])
        points = kernels.sampling_points(samples, references, sizes_wh, value.shape[2])
        return stand_in(value, shapes, *points)

    monkeypatch.setattr(kernels, "select_implementation", lambda *_: "triton")
    monkeypatch.setattr(kernels, "ms_deform_attn", stand_in)
    monkeypatch.setattr(kernels, "ms_deform_attn_fused", fused)
    monkeypatch.setattr(measure, "SECONDS_PER_TURN", 0)
    shapes = [(3, 4), (2, 2)]
    inputs = kernels.attention_inputs("encoder", shapes, 1, torch.float32, CPU)
    rows = measure.measure(kernels.compare_fused("case", shapes, inputs, "backward"), 1)
    assert len(rows) == len(launches) + 3  # PyTorch, separate operations, and the usual launch
    assert launches == {
        triton_kernels.Launch(*x) for x in itertools.product(kernels.TILES, kernels.WARPS)
    }
    assert usual == triton_kernels.BACKWARD
    rows[-2].median_ms = 0.125
    run = results.make_run("", "kernels", {}, rows, {}, {}, "")
    text = results.run_text(run)
    assert f"case: the fastest {rows[-2].contender} (0.125 ms)" in text


def test_feature_map_shapes_match_training() -> None:
    args = parse(["ms_deform_attn"])
    assert kernels.feature_map_shapes(args.image_size) == [
        (100, 134),
        (50, 67),
        (25, 34),
        (13, 17),
    ]


def test_encoder_points_are_near_their_pixel() -> None:
    shapes = [(8, 11), (4, 6)]
    value, locations, weights, grad_output = kernels.attention_inputs(
        "encoder", shapes, 2, torch.bfloat16, CPU
    )
    assert value.shape == (2, 112, 8, 32)
    assert grad_output.shape == (2, 112, 256)
    assert locations.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 112, 8))
    distance = (locations[:, 0, :, 0] - torch.tensor([0.5 / 11, 0.5 / 8])) * torch.tensor(
        [11.0, 8.0]
    )  # pixels of the first map
    assert float(distance.norm(dim=-1).max()) < 4 + 3


@pytest.mark.parametrize(
    ("peer", "module", "path"),
    [
        (
            "transformers",
            "transformers.models.deformable_detr.modeling_deformable_detr",
            "MultiScaleDeformableAttention",
        ),
        ("mmcv", "mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttnFunction"),
        ("published extension", "MultiScaleDeformableAttention", ""),
    ],
)
def test_public_implementations_get_their_own_arguments(
    peer: str, module: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins have the signatures of the public implementations and compute with ours."""

    def attention(value, sizes, starts, locations, weights, step):
        assert (value.dtype, sizes.dtype, step) == (torch.float32, torch.int64, 64)
        assert starts.tolist() == [0, 48]
        return kernels.ms_deform_attn(
            value, [tuple(size) for size in sizes.tolist()], locations, weights, "pytorch"
        )

    def backward(value, sizes, starts, locations, weights, grad, step):
        leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        with torch.enable_grad():
            return torch.autograd.grad(
                attention(leaves[0], sizes, starts, *leaves[1:], step), leaves, grad
            )

    class AsModule(torch.nn.Module):
        def forward(self, value, sizes, shapes, starts, locations, weights, step):
            assert shapes == [(6, 8), (3, 4)]
            return attention(value, sizes, starts, locations, weights, step)

    class AsFunction:
        apply = staticmethod(attention)

    stand_in = types.ModuleType(module)
    stand_in.ms_deform_attn_forward, stand_in.ms_deform_attn_backward = attention, backward
    if path:
        setattr(stand_in, path, {"transformers": AsModule, "mmcv": AsFunction}[peer])
    parts = module.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, module, stand_in)
    shapes = [(6, 8), (3, 4)]
    comparison = kernels.compare_attention(
        "case", shapes, kernels.attention_inputs("decoder", shapes, 1, torch.float32, CPU)
    )
    assert peer in comparison.contenders, comparison.skipped
    assert set(measure.check(comparison)) == set(comparison.contenders)


# ---- other packages, the roof, the report ----


@pytest.mark.parametrize("case", ["detr", "conditional_detr", "deformable_detr", "refine"])
def test_names_of_transformers_are_the_inverse_of_reading_them(case: str) -> None:
    detector, flags = CASES[case]
    state = filled(shapes(detector, *SMALL, *flags))
    expected = written_by_transformers(state, detector)
    found = peers.to_hugging_face(state, expected)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_peer_trains_what_ours_trains() -> None:
    names = ["model.backbone.conv_encoder.model.conv1.weight", "class_labels_classifier.weight"]

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = {name: nn.Parameter(torch.ones(2)) for name in names}

        def state_dict(self) -> dict:
            return self.values

        def named_parameters(self) -> list:
            return list(self.values.items())

    peer = Peer()
    peers.freeze_as_ours(peer, {"class_embed.weight"})
    assert [p.requires_grad for p in peer.values.values()] == [False, True]


def test_frozen_norms_of_transformers_get_their_activations_back() -> None:
    """transformers replaces timm's norms with activation by norms without."""
    timm = pytest.importorskip("timm")
    name = "tf_efficientnet_lite0"
    body = timm.create_model(name, features_only=True).eval()
    expected = body(torch.ones(1, 3, 32, 32))
    for module in list(body.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(child.num_features, eps=child.eps).eval()
                plain.load_state_dict(child.state_dict())
                setattr(module, child_name, plain)
    peer = nn.Module()
    peer.model = nn.Module()
    peer.model.backbone = nn.Module()
    peer.model.backbone.model = body
    assert not torch.allclose(body(torch.ones(1, 3, 32, 32))[-1], expected[-1])
    peers.restore_activations(peer, name)
    for found, wanted in zip(body(torch.ones(1, 3, 32, 32)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_norms_get_the_epsilon_of_transformers() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, eps=1e-3))
    changed = peers.with_peer_eps(model, model.state_dict())
    torch.testing.assert_close(changed["0.running_var"] + 1e-5, model[0].running_var + 1e-3)


def test_roof_counts_operations_and_bytes() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    found = roof.of_call(lambda: layer(x).sum().backward(), CPU, torch.float32)
    # Forward, gradient of the input and of the weight: 2 FLOPs for each of 9 weights and 4 x 8 x 16 x 16 outputs.
    assert found["flops"] == 3 * 2 * 9 * 4 * 8 * 16 * 16
    y = torch.ones(1000)
    copied = roof.of_call(lambda: y + 1, CPU, torch.float32)
    assert (copied["bytes"], copied["operations"]) == (8000, 1)


def test_weights_are_calibrated() -> None:
    """Features of a random backbone neither grow nor fade from block to block."""
    flags = work.parse_flags(TINY[:-3], "finetune_main.py")
    case = {"flags": flags, "device": "cpu", "batch_size": 2, "size": [64, 64]}
    state = work.calibrated_weights(case)
    name = "backbone.0.body.layer4.1.bn2.running_var"
    assert not torch.equal(state[name], torch.ones_like(state[name]))
    assert 0.01 < float(state[name].mean()) < 100


@pytest.mark.parametrize("script", ["main.py", "finetune_main.py"])
def test_objects_of_a_single_class_have_label_0(script: str) -> None:
    """As in the datasets: a model with one class has no row for label 1."""
    pretext = ["--pretext", "region_prior"] if script == "main.py" else []
    flags = work.parse_flags([*TINY[:-3], "--num_classes", "1", *pretext], script)
    case = {"flags": flags, "device": "cpu", "batch_size": 2, "size": [64, 64]}
    assert all(int(target["labels"].max()) == 0 for _, target in work.make_samples(case))


def test_report_writes_page_and_zoo_table(tmp_path: Path) -> None:
    row = {
        "comparison": "detr_resnet50, 1 x 800 x 1066", "contender": "ours", "median_ms": 900.0,
        "low_ms": 800.0, "high_ms": 950.0, "cpu_ms": 1700.0, "items": 1, "peak_mib": None,
        "difference": 0.0, "turns": 3, "calls_a_turn": 1,
    }  # fmt: skip
    info = {"device": "a CPU", "torch": "2.0", "load": "0.1"}
    entry = {
        "subject": "inference", "command": "python tools/benchmark.py inference", "commit": "abc",
        "environment": info, "rows": [row], "not_measured": {"ONNX Runtime": "a reason"},
        "facts": {row["comparison"]: {"model": "detr_resnet50"}},
    }  # fmt: skip
    results.save_run(tmp_path / results.FILE, entry)
    zoo = tmp_path / "zoo.md"
    zoo.write_text("# Zoo\n")
    for _ in range(2):  # a second report replaces the section
        main(parse(["report", "--output", str(tmp_path), "--model_zoo", str(zoo)]))
    assert zoo.read_text().count("| DETR-R50 ") == 1
    assert "| 0.036 " in zoo.read_text()
    assert "| 0.9 " in zoo.read_text()
    page = (tmp_path / "benchmark.md").read_text()
    assert page.count("## Inference") == 1
    assert "Not measured: ONNX Runtime (a reason)." in page
    with pytest.raises(UserError, match="measure first"):
        main(parse(["report", "--output", str(tmp_path / "empty")]))


def test_page_of_the_documentation_is_made_from_its_results() -> None:
    folder = ROOT / "docs" / "results"
    runs = results.read_runs(folder / results.FILE)
    assert runs
    page = (folder / "benchmark.md").read_text()
    assert report.replace_section(page, "runs", report.page_text(runs, "benchmark")) == page
    zoo = (ROOT / "docs" / "model_zoo.md").read_text()
    assert report.replace_section(zoo, "inference times", report.zoo_text(runs)) == zoo


def test_gpu_measurement_continues_after_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: gpu.Session) -> None:
        raise RuntimeError("broken")

    monkeypatch.setitem(gpu.PARTS, "resume", broken)
    words = ["--device", "cpu", "--tiny", "--parts", "resume", "waits", "shapes"]
    main(parse(["gpu", *words, "--output", str(tmp_path)]))
    facts = json.loads((tmp_path / gpu.FACTS).read_text())
    assert facts["failed"][0]["error"] == "RuntimeError: broken"
    assert set(facts["shapes"][0]) == {"new_ms", "seen_ms"}
    assert "end" in facts


def test_a_variant_may_be_a_single_flag() -> None:
    for words in (["--variant", "--compile"], ["--variant=--compile"]):
        assert parse(["step", *words]).variant == ["--compile"]
