"""The benchmark times only implementations with equal outputs, interleaved, and writes its results."""

import json
import types
from pathlib import Path

import pytest
import torch

from tools import benchmark
from util.errors import UserError

CPU = torch.device("cpu")


def run(output: Path, *flags: str) -> None:
    small = ("--device", "cpu", "--image_size", "64", "--batch_size", "1", "--turns", "2")
    benchmark.main(benchmark.parse(["ms_deform_attn", *small, "--output", str(output), *flags]))


def test_ms_deform_attn_on_cpu(tmp_path: Path) -> None:
    run(tmp_path)
    result = json.loads((tmp_path / "ms_deform_attn.json").read_text())
    rows = [row for row in result["rows"] if row["contender"] == "pytorch"]
    assert [row["comparison"] for row in rows] == [
        "encoder, float32",
        "decoder, float32",
        "encoder, bfloat16",
        "decoder, bfloat16",
    ]
    assert all(
        0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["speedup"] == 1
        for row in rows
    )
    assert "NVIDIA GPU" in result["not_measured"]["triton"]
    assert result["environment"]["torch"] in torch.__version__
    table = (tmp_path / "ms_deform_attn.md").read_text()
    assert table.count("| pytorch ") == 4
    assert "Not measured: triton" in table
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path)
    run(tmp_path, "--overwrite", "--dtypes", "float32")
    assert (
        len(json.loads((tmp_path / "ms_deform_attn.json").read_text())["rows"])
        == 2 * len(rows) // 4
    )


def test_feature_map_shapes_match_training() -> None:
    args = benchmark.parse(["ms_deform_attn"])
    assert benchmark.feature_map_shapes(args.image_size) == [
        (100, 134),
        (50, 67),
        (25, 34),
        (13, 17),
    ]


def test_encoder_points_are_near_their_pixel() -> None:
    shapes = [(8, 11), (4, 6)]
    value, locations, weights, grad_output = benchmark.attention_inputs(
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
        return benchmark.ms_deform_attn(
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
        monkeypatch.setitem(
            benchmark.sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i]))
        )
    monkeypatch.setitem(benchmark.sys.modules, module, stand_in)
    shapes = [(6, 8), (3, 4)]
    comparison = benchmark.compare_attention(
        "case", shapes, benchmark.attention_inputs("decoder", shapes, 1, torch.float32, CPU)
    )
    assert peer in comparison.contenders, comparison.skipped
    assert set(benchmark.check(comparison)) == set(comparison.contenders)


def test_contender_with_different_output_is_not_timed() -> None:
    right, wrong = (lambda: [torch.ones(3)]), (lambda: [torch.tensor([1.0, 1.0, 1.1])])
    with pytest.raises(UserError, match="case: other differs from first by 0.1"):
        benchmark.measure(
            benchmark.Comparison("case", {"first": right, "other": wrong}, 1e-3), 1, CPU
        )
    nan = benchmark.Comparison(
        "case", {"first": right, "other": lambda: [torch.full((3,), float("nan"))]}, 1e-3
    )
    with pytest.raises(UserError, match="nan"):
        benchmark.measure(nan, 1, CPU)


def test_contenders_are_interleaved_and_speedup_uses_medians(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def contender(name: str):
        def call() -> list[torch.Tensor]:
            calls.append(name)
            return [torch.ones(1)]

        return call

    monkeypatch.setattr(benchmark, "SECONDS_PER_TURN", 0.5)  # one call of `fake_seconds` lasts 1
    fake_seconds = {"a": [1.0, 8.0, 2.0, 3.0], "b": [1.0, 1.0, 1.0, 2.0]}

    def seconds(call, count: int, _device, _clock=None) -> float:
        call()
        assert count == 1
        return fake_seconds[calls[-1]].pop(0)

    monkeypatch.setattr(benchmark, "seconds", seconds)
    first, second = benchmark.measure(
        benchmark.Comparison("case", {"a": contender("a"), "b": contender("b")}, 0.0), 3, CPU
    )
    assert calls == ["a", "b"] * 5  # the check, the length of a turn, three turns
    assert (first.median_ms, second.median_ms, second.speedup) == (3000, 1000, 3)
    assert (first.low_ms, first.high_ms) == (2500, 5500)


def test_wrong_device_and_turns_are_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU is visible"):
            run(tmp_path, "--device", "cuda")
    with pytest.raises(SystemExit):
        run(tmp_path, "--turns", "0")
