"""Tests that need a GPU, skipped without one: values, kernels, synchronizations, streams, compilation and memory.

Run them alone with `bash tools/test.sh tests/test_gpu.py`.
"""

import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.transfer import Transfer
from engine import TrainState, autocast, train_step
from models import matcher
from models.activation_checkpoint import checkpoint_activations
from models.attention import usable_kernels
from models.backbone import Backbone
from models.ms_deform_attn import ms_deform_attn, select_implementation
from tests import deform_cases, golden_models
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets
from util.runs.compilation import Compilation
from util.runs.memory import available_memory
from util.runs.meters import LossReader

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"
)
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CASES = ("detr_r50", "cond_r50", "deform_r50_ms", "updetr_r50", "detreg_deform")


def build_on_gpu(name: str) -> tuple[golden_models.Case, NestedTensor, list[dict]]:
    case = golden_models.build(name, GOLDEN)
    samples, targets = golden_models.inputs(case, torch.float32)
    case.model.cuda()
    case.criterion.cuda().train()
    return (
        case,
        samples.to("cuda"),
        [{key: value.cuda() for key, value in target.items()} for target in targets],
    )


@pytest.fixture
def _no_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_no_tf32")
def test_golden_values_on_the_gpu(name: str) -> None:
    case, samples, targets = build_on_gpu(name)
    case.model.eval()
    outputs = golden_models.forward(case, samples, targets)
    losses = case.criterion(outputs, targets)
    host = {key: value.cpu() for key, value in outputs.items() if isinstance(value, torch.Tensor)}
    golden_models.close(host["pred_logits"], case.z["out/pred_logits"], atol=1e-3)
    golden_models.close(host["pred_boxes"], case.z["out/pred_boxes"], atol=1e-4)
    golden_models.check_matches(case, losses)
    golden_models.check_losses(
        case, {key: value.cpu() for key, value in losses.items()}, case.js["losses"], rtol=1e-4
    )


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_keeps_boxes_and_losses_in_float32(name: str) -> None:
    case, samples, targets = build_on_gpu(name)
    with autocast(torch.device("cuda"), torch.bfloat16):
        outputs = golden_models.forward(case, samples, targets)
    assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == torch.float32
    losses = case.criterion(outputs, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    case.criterion.total_loss(losses).backward()


def test_usable_attention_kernels() -> None:
    kernels = usable_kernels(8, 32, torch.device("cuda"), torch.bfloat16)
    without_padding, with_padding = kernels.split("without padding")
    assert "flash" in without_padding
    assert "flash" not in with_padding


def test_criterion_synchronizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs are copied to the host once; everything else is queued."""
    case, samples, targets = build_on_gpu("detr_r50")
    outputs = golden_models.forward(case, samples, targets)
    case.criterion(outputs, targets)
    copy, calls = matcher.copy_to_host, []

    def counted(values: torch.Tensor, while_waiting: None) -> np.ndarray:
        calls.append(1)
        torch.cuda.set_sync_debug_mode("default")
        host = copy(values, while_waiting)
        torch.cuda.set_sync_debug_mode("error")
        return host

    monkeypatch.setattr(matcher, "copy_to_host", counted)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = case.criterion(outputs, targets)
        reader = LossReader(losses)
        case.criterion.total_loss(losses).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [1]
    assert set(reader.read()) == set(losses)


def test_maps_of_the_next_batch_are_computed_while_the_host_waits() -> None:
    """The costs arrive unchanged, and the step that reads these maps has the losses of one that computes them."""
    case, samples, targets = build_on_gpu("detr_r50")
    backbone = case.model.backbone[0].requires_grad_(False)
    case.model.eval()
    losses = []
    for _ in range(2):  # the second forward pass reads what the first criterion has queued
        losses.append(case.criterion(golden_models.forward(case, samples, targets), targets))
        case.criterion.matcher.while_waiting = lambda: backbone.compute_ahead(samples.tensors)
        case.criterion(golden_models.forward(case, samples, targets), targets)
        assert backbone._ahead is not None
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)


def test_training_step_with_fused_adamw() -> None:
    case, samples, targets = build_on_gpu("cond_r50")
    optimizer = golden_models.build_optimizer(case.model, 1e-4, 1e-5, 1e-4)
    assert optimizer.defaults["fused"] is True
    run = TrainState(
        model=case.model,
        criterion=case.criterion,
        optimizer=optimizer,
        scheduler=None,
        loader=None,
        device=torch.device("cuda"),
        normalization={},
        epochs=1,
        amp=torch.bfloat16,
    )
    first, _ = train_step(run, samples, targets, stop=False)
    for _ in range(5):
        last, _ = train_step(run, samples, targets, stop=False)
    assert last["loss"] < first["loss"]


def test_synchronizations_do_not_depend_on_the_batch_size() -> None:
    """A training step reads from the device for the whole batch at once."""
    counts = []
    for copies in (1, 4):
        case, samples, targets = build_on_gpu("detr_r50")
        many = NestedTensor(
            samples.tensors.repeat(copies, 1, 1, 1),
            samples.mask.repeat(copies, 1, 1),
            samples.padded,
        )
        optimizer = golden_models.build_optimizer(case.model, 1e-4, 1e-5, 1e-4)
        run = TrainState(
            model=case.model,
            criterion=case.criterion,
            optimizer=optimizer,
            scheduler=None,
            loader=None,
            device=torch.device("cuda"),
            normalization={},
            epochs=1,
            amp=None,
        )
        train_step(
            run, many, targets * copies, stop=False
        )  # selects kernels, creates optimizer state
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(run, many, targets * copies, stop=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert 1 <= counts[0] == counts[1]


def test_bfloat16_losses_are_close_to_those_in_float32() -> None:
    """The network's rounding is the only difference: matching and losses are in float32."""
    case, samples, targets = build_on_gpu("detr_r50")
    case.model.eval()
    losses = []
    for enabled in (False, True):
        with autocast(torch.device("cuda"), enabled=enabled):
            outputs = golden_models.forward(case, samples, targets)
        losses.append(case.criterion.total_loss(case.criterion(outputs, targets)).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("name", ["detr_r50", "cond_r50", "deform_r50_ms"])
@pytest.mark.usefixtures("_no_tf32")
def test_compiled_detector_equals_the_eager_one(name: str) -> None:
    case, samples, targets = build_on_gpu(name)
    case.model.eval()
    with torch.no_grad():
        expected = golden_models.forward(case, samples, targets)
        compiled = Compilation(case.model.base_detector())
        found = golden_models.forward(case, samples, targets)
    assert compiled.counts == {"backbone": 1, "encoder": 1, "decoder": 1}
    assert compiled.failed == {}
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=0, atol=1e-3)
    torch._dynamo.reset()


def test_compiled_training_step_in_bfloat16() -> None:
    case, samples, targets = build_on_gpu("detr_r50")
    compiled = Compilation(case.model.base_detector())
    with autocast(torch.device("cuda"), enabled=True):
        outputs = golden_models.forward(case, samples, targets)
    case.criterion.total_loss(case.criterion(outputs, targets)).backward()
    assert compiled.failed == {}
    gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    torch._dynamo.reset()


def test_checkpointed_activations_need_less_memory() -> None:
    """The backward pass of a large batch, with equal gradients up to the order of atomic sums."""
    case, samples, targets = build_on_gpu("detr_r50")
    many = NestedTensor(
        samples.tensors.repeat(8, 1, 1, 1), samples.mask.repeat(8, 1, 1), samples.padded
    )

    def peak() -> int:
        case.model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = golden_models.forward(case, many, targets * 8)
        case.criterion.total_loss(case.criterion(outputs, targets * 8)).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()  # selects kernels
    plain = peak()
    checkpoint_activations(case.model.base_detector())
    assert peak() < 0.8 * plain


def test_batches_of_the_own_stream_equal_those_of_the_host() -> None:
    """Many batches while the device is busy: memory that is reused too early would show."""
    transfer = Transfer(torch.device("cuda"), {"mean": [0.5] * 3, "std": [0.25] * 3})
    busy = torch.randn(4096, 4096, device="cuda")
    sums, expected = [], []
    for value in range(20):
        images = torch.full((4, 3, 512, 512), value, dtype=torch.uint8)
        mask = torch.zeros(4, 512, 512, dtype=torch.bool)
        boxes = PackedTargets.pack([{"boxes": torch.full((3, 4), float(value))}] * 4)
        pinned = NestedTensor(images, mask, False).pin_memory()
        samples, targets = transfer(pinned, boxes.pin_memory())
        busy = busy @ busy * 1e-4  # the current stream is behind the copies
        sums.append(samples.tensors.mean() + targets.tensors["boxes"].mean())
        expected.append((value / 255 - 0.5) / 0.25 + value)
        del samples, targets
    torch.testing.assert_close(
        torch.stack(sums).cpu(), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


def test_available_memory_counts_what_the_allocator_holds() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    before = available_memory(device)
    del block
    after = available_memory(device)
    assert before is not None
    assert after is not None
    assert after - before >= 2**28 - 2**24  # other processes may move a little


@pytest.mark.parametrize("name", ["resnet50"])
def test_frozen_backbone_in_channels_last(name: str) -> None:
    backbone = Backbone(name, trainable=False).cuda().eval()
    images = torch.randn(2, 3, 128, 160, device="cuda")
    plain = backbone(images)[-1]
    fast = backbone.to(memory_format=torch.channels_last)(
        images.to(memory_format=torch.channels_last)
    )[-1]
    torch.testing.assert_close(fast, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


def test_both_scripts_on_the_gpu(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    data = str(tmp_path / "scenes")
    run(
        "-m",
        "tools.demo.scenes",
        "--output",
        data,
        *shlex.split("--num_train 32 --num_val 8 --num_unlabelled 32 --size 96"),
    )
    small = shlex.split(
        "--backbone resnet18 --enc_layers 1 --dec_layers 2 --image_size 96 --batch_size 8 "
        "--amp bf16"
    )
    common = [*small, "--epochs", "1", "--device", "cuda", "--backbone_weights", "none"]
    run(
        "main.py",
        "--imagenet_path",
        f"{data}/unlabelled",
        "--output_dir",
        str(tmp_path / "pre"),
        "--feature_recon",
        *common,
    )
    checkpoint = str(tmp_path / "pre" / "checkpoint.pth")
    run(
        "finetune_main.py",
        "--coco_path",
        data,
        "--num_classes",
        "5",
        "--pretrain",
        checkpoint,
        "--output_dir",
        str(tmp_path / "fine"),
        *shlex.split("--image_size 96 --batch_size 8 --amp bf16 --epochs 1 --device cuda"),
    )
    assert (tmp_path / "fine" / "results.json").exists()
    # Resume a CPU run on the GPU: the fused AdamW keeps its step counts on the device.
    words = [
        "finetune_main.py",
        "--coco_path",
        data,
        "--num_classes",
        "5",
        "--output_dir",
        str(tmp_path / "moved"),
        *small,
    ]
    run(*words, "--backbone_weights", "none", "--epochs", "1", "--device", "cpu")
    run(*words, "--resume", "auto", "--epochs", "2", "--device", "cuda")
    assert len((tmp_path / "moved" / "log.txt").read_text().splitlines()) == 2


# ---- multi-scale deformable attention: the Triton kernels ----


@pytest.fixture
def _needs_triton() -> None:
    if select_implementation("auto", torch.device("cuda"), torch.float32) != "triton":
        pytest.skip("Triton does not run on this GPU")


DEFORM_CASES = deform_cases.CASES | {
    "many programs": deform_cases.Case(2, 1500, 8, 32, 4, ((25, 34), (13, 17), (7, 9), (4, 5))),
    "many programs in bfloat16": deform_cases.Case(
        2,
        1500,
        8,
        32,
        4,
        ((25, 34), (13, 17), (7, 9), (4, 5)),
        (torch.bfloat16, torch.float32, torch.float32),
    ),
}


@pytest.mark.parametrize("name", DEFORM_CASES)
@pytest.mark.usefixtures("_needs_triton")
def test_deformable_attention_equals_the_pytorch_path(name: str) -> None:
    """Forward and the three gradients, then again with tensors that are not contiguous."""
    case = DEFORM_CASES[name]
    inputs = deform_cases.make_inputs(case, "cuda")
    deform_cases.check(name, deform_cases.run(inputs, case.shapes, "auto"), inputs, case.shapes)
    strided = [tensor.mT.contiguous().mT for tensor in inputs]
    deform_cases.check(name, deform_cases.run(strided, case.shapes, "triton"), inputs, case.shapes)


@pytest.mark.parametrize("dtypes", deform_cases.FUSED_DTYPES)
@pytest.mark.parametrize("name", deform_cases.FUSED_CASES)
@pytest.mark.usefixtures("_needs_triton")
def test_fused_deformable_attention_equals_separate_operations(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    deform_cases.check_fused(name, dtypes, "cuda")


@pytest.mark.usefixtures("_needs_triton")
def test_gradients_of_the_pytorch_path_on_the_gpu() -> None:
    case = deform_cases.Case(1, 3, 2, 3, 2, ((3, 4), (2, 2)))
    leaves = tuple(
        tensor.double().requires_grad_() for tensor in deform_cases.make_inputs(case, "cuda")[:3]
    )
    assert torch.autograd.gradcheck(
        lambda v, p, w: ms_deform_attn(v, case.shapes, p, w), leaves, nondet_tol=1e-9
    )


@pytest.mark.usefixtures("_needs_triton")
def test_deformable_attention_in_a_compiled_function() -> None:
    case = DEFORM_CASES["usual"]
    inputs = deform_cases.make_inputs(case, "cuda")
    compiled = torch.compile(ms_deform_attn, fullgraph=True)
    deform_cases.check(
        "compiled", deform_cases.run(inputs, case.shapes, "auto", compiled), inputs, case.shapes
    )


@pytest.mark.usefixtures("_needs_triton")
def test_new_image_sizes_neither_compile_nor_synchronize() -> None:
    from models import ms_deform_attn_triton as kernels

    def step(height: int, width: int, queries: int) -> None:
        case = deform_cases.Case(2, queries, 8, 16, 4, ((height, width), (2, 1)))
        inputs = deform_cases.make_inputs(case, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            deform_cases.run(inputs, case.shapes, "auto")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled() -> int:
        device = torch.cuda.current_device()
        return sum(
            len(kernel.device_caches[device][0])
            for kernel in (kernels._forward_kernel, kernels._backward_kernel)
        )

    step(5, 7, 3)
    before = compiled()
    for sizes in ((16, 1, 16), (1, 32, 1), (13, 48, 300)):
        step(*sizes)
    assert before > 0
    assert compiled() == before


@pytest.mark.usefixtures("_needs_triton")
def test_offsets_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    case = deform_cases.Case(5, 9, 8, 64, 4, ((1024, 1024),))
    value = torch.randn(5, 2**20, 8, 64, device="cuda", dtype=torch.bfloat16)
    locations = (
        (deform_cases.sampling_pixels(case, torch.Generator().manual_seed(0)) + 0.5) / 1024
    ).cuda()
    weights = torch.rand(5, 9, 8, 1, 4, device="cuda")
    inputs = value, locations, weights, torch.randn(5, 9, 512, device="cuda", dtype=torch.bfloat16)
    found = [tensor[-1:].clone() for tensor in deform_cases.run(inputs, case.shapes, "triton")]
    expected = deform_cases.run([tensor[-1:] for tensor in inputs], case.shapes, "pytorch")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
