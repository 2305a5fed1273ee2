"""Multi-scale deformable attention: the PyTorch path against published values, the Triton kernels against it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import ms_deform_attn as module
from models.ms_deform_attn import IMPLEMENTATIONS, ms_deform_attn, select_implementation
from tests import deform_cases
from tests.deform_cases import CASES, make_inputs
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(not module.HAS_TRITON, reason="Triton is not installed")


def test_golden_values(request: pytest.FixtureRequest) -> None:
    z = np.load(Path(request.config.getoption("--golden-dir")) / "data_deform.npz")
    names = ("value", "sampling_locations", "attention_weights", "grad_output")
    inputs = [torch.from_numpy(z[f"msda/{name}"]) for name in names]
    shapes = [tuple(shape) for shape in z["msda/spatial_shapes"].tolist()]
    found = deform_cases.run(inputs, shapes, "pytorch")
    for name, tensor in zip(
        ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights"),
        found,
        strict=True,
    ):
        np.testing.assert_allclose(tensor.numpy(), z[f"msda/{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_path_in_each_dtype(name: str) -> None:
    """Results have the right dtype, are finite, and are computed in float32 for half-precision values."""
    inputs = make_inputs(CASES[name])
    deform_cases.check(
        name, deform_cases.run(inputs, CASES[name].shapes, "pytorch"), inputs, CASES[name].shapes
    )


def test_sampling_follows_the_formula() -> None:
    """Pixel coordinate = location * size - 0.5. A pixel outside of the map, values and gradients are zero."""
    value = torch.arange(6.0).view(1, 6, 1, 1)  # a map of 2 x 3: 0 1 2 / 3 4 5
    points = torch.tensor(
        [[0.5 / 3, 0.25], [1 / 3, 0.5], [-0.5 / 3, 0.25], [0.0, 0.25], [1e6, 0.5]]
    )
    locations = points.view(1, 5, 1, 1, 1, 2).requires_grad_()
    output = ms_deform_attn(value, [(2, 3)], locations, torch.full((1, 5, 1, 1, 1), 2.0))
    torch.testing.assert_close(output.flatten(), torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(output.sum(), locations)
    assert gradient[0, 4].count_nonzero() == 0
    assert gradient[0, 1].flatten().tolist() == pytest.approx([2 * 3 * 1.0, 2 * 2 * 3.0])


def test_gradients_of_the_pytorch_path() -> None:
    case = deform_cases.Case(1, 3, 2, 3, 2, ((3, 4), (2, 2)))
    value, locations, weights, _ = (
        tensor.double().requires_grad_() for tensor in make_inputs(case)
    )
    assert torch.autograd.gradcheck(
        lambda v, p, w: ms_deform_attn(v, case.shapes, p, w, "pytorch"), (value, locations, weights)
    )


def test_autocast_changes_nothing() -> None:
    case = CASES["usual"]
    inputs = make_inputs(case)
    plain = deform_cases.run(inputs, case.shapes, "pytorch")
    with torch.autocast("cpu", torch.bfloat16):
        cast = deform_cases.run(inputs, case.shapes, "pytorch")
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_pytorch_path_compiles_and_exports() -> None:
    case = CASES["odd numbers"]
    value, locations, weights, _ = make_inputs(case)

    class Model(torch.nn.Module):
        def forward(
            self, value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return ms_deform_attn(value, case.shapes, locations, weights)

    expected = Model()(value, locations, weights)
    torch.testing.assert_close(
        torch.compile(Model(), backend="aot_eager", fullgraph=True)(value, locations, weights),
        expected,
    )
    queries = torch.export.Dim("queries", min=2, max=1000)
    exported = torch.export.export(
        Model(), (value, locations, weights), dynamic_shapes=({}, {1: queries}, {1: queries})
    )
    torch.testing.assert_close(
        exported.module()(value, locations[:, :3], weights[:, :3]), expected[:, :3]
    )


# ---- selecting an implementation ----


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `select_implementation` find a Hopper GPU with everything that Triton needs."""
    for name, answer in (
        ("HAS_TRITON", True),
        ("HAS_COMPILER", True),
        ("TRITON_INTERPRETED", False),
        ("_capability", lambda _: (9, 0)),
    ):
        monkeypatch.setattr(module, name, answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.usefixtures("_gpu")
def test_auto_selects_triton_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select_implementation("auto", GPU, dtype) == "triton"
        assert select_implementation("triton", GPU, dtype) == "triton"
        assert select_implementation("auto", CPU, dtype) == "pytorch"
        assert select_implementation("pytorch", GPU, dtype) == "pytorch"
    assert select_implementation("auto", GPU, torch.float64) == "pytorch"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert select_implementation("auto", GPU, torch.float32) == "pytorch"


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("name", "answer", "text"),
    [
        ("HAS_TRITON", False, "not installed"),
        ("HAS_COMPILER", False, "gcc or clang"),
        ("_capability", lambda _: (7, 5), "capability 8.0"),
    ],
)
def test_reasons_not_to_run_triton(
    name: str, answer: object, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, answer)
    assert select_implementation("auto", GPU, torch.float32) == "pytorch"
    with pytest.raises(UserError, match=text):
        select_implementation("triton", GPU, torch.float32)


@pytest.mark.usefixtures("_gpu")
def test_errors_are_one_line() -> None:
    value, locations, weights, _ = make_inputs(CASES["one of all"])
    for implementation, words in (
        ("triton", "needs an NVIDIA GPU"),
        ("cuda", ", ".join(IMPLEMENTATIONS)),
    ):
        with pytest.raises(UserError, match=words) as error:
            ms_deform_attn(value, [(5, 6)], locations, weights, implementation)
        assert str(error.value).startswith(f"--ms_deform_attn {implementation}: ")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not float64"):
        select_implementation("triton", GPU, torch.float64)


def test_mismatched_shapes_raise() -> None:
    value, locations, weights, _ = make_inputs(CASES["odd numbers"])
    shapes = CASES["odd numbers"].shapes
    for wrong in (
        (value, shapes[:2], locations, weights),
        (value[:, :-1], shapes, locations, weights),
        (value, shapes, locations, weights[:, 1:]),
        (value[:1], shapes, locations, weights),
        (value[:, :, :1], shapes, locations, weights),
        (value, shapes, locations[..., :1], weights),
    ):
        with pytest.raises(ValueError, match="maps|weights|heads"):
            ms_deform_attn(*wrong)


# ---- the Triton kernels without a GPU ----


@needs_triton
@pytest.mark.parametrize("part", ["numbers", pytest.param("registration", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(part: str) -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, so they run in their own process."""
    script = [sys.executable, str(ROOT / "tests" / "deform_cases.py"), part]
    done = subprocess.run(
        script,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compile_kernel(kernel, value_type: str, capability: int, fused: bool = False) -> dict[str, str]:
    """Compile a kernel for 4 maps, 4 points and 8 heads of 32 channels; needs no GPU. Returns PTX and binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.ms_deform_attn_triton import BACKWARD, FORWARD

    elements, warps = BACKWARD if "grad_output" in kernel.arg_names else FORWARD
    constants = {"H": 8, "D": 32, "L": 4, "P": 4, "BLOCK_Q": elements // 32, "BLOCK_D": 32}
    constants["FUSED"] = fused
    types = {"S": "i32", "Q": "i32", "shapes": ("fp32",) * 8} | dict.fromkeys(
        ("value", "output", "grad_output"), f"*{value_type}"
    )
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {
        positions[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind[0] == "*"
    }
    source = ASTSource(
        kernel, signature, {positions[name]: number for name, number in constants.items()}, aligned
    )
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@needs_triton
@pytest.mark.parametrize(
    ("capability", "value_type"),
    [
        pytest.param(80, "bf16", marks=pytest.mark.slow),
        pytest.param(90, "fp32", marks=pytest.mark.slow),
        (90, "bf16"),
    ],
)
def test_kernels_compile_for_gpus(
    capability: int, value_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler checks types and layouts that the interpreter ignores.

    On Hopper the kernels must keep what makes them fast: loads and atomic additions of 16 bytes per thread (loads of
    8 bytes for the gradient of a half-precision value), and no exchange through shared memory.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from models import ms_deform_attn_triton as kernels

    forward = compile_kernel(kernels._forward_kernel, value_type, capability)
    backward = compile_kernel(kernels._backward_kernel, value_type, capability)
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):  # with softmax and locations
        fused = compile_kernel(kernel, value_type, capability, fused=True)
        assert fused["cubin"]
        assert "bar.sync" not in fused["ptx"]
    assert forward["cubin"]
    assert backward["cubin"]
    assert "ld.global.v4" in forward["ptx"]
    assert "bar.sync" not in forward["ptx"]
    if capability >= 90:
        assert "add.v4.f32" in backward["ptx"]
        assert "bar.sync" not in backward["ptx"]
        assert ("ld.global.v4" if value_type == "fp32" else "ld.global.v2") in backward["ptx"]
