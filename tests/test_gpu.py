"""What only a GPU can show. Without one every test here is skipped; run it alone with `bash tools/test.sh tests/test_gpu.py`."""
import subprocess
import sys
from pathlib import Path

import golden_models
import pytest
import torch

from engine import Run, autocast, train_step
from models.backbone import Backbone
from util.metrics import LossReader
from util.nested_tensor import NestedTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch")
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CASES = ("detr_r50", "cond_r50", "updetr_r50")


def _on_gpu(name: str) -> tuple[golden_models.Case, NestedTensor, list[dict]]:
    case = golden_models.build(name, GOLDEN)
    samples, targets = golden_models.inputs(case, torch.float32)
    case.model.cuda()
    case.criterion.cuda().train()
    return case, samples.to("cuda"), [{key: value.cuda() for key, value in target.items()} for target in targets]


@pytest.fixture
def _no_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_no_tf32")
def test_golden_numbers_on_the_gpu(name: str) -> None:
    case, samples, targets = _on_gpu(name)
    case.model.eval()
    outputs = golden_models.forward(case, samples, targets)
    losses = case.criterion(outputs, targets)
    host = {key: value.cpu() for key, value in outputs.items() if isinstance(value, torch.Tensor)}
    golden_models.close(host["pred_logits"], case.z["out/pred_logits"], atol=1e-3)
    golden_models.close(host["pred_boxes"], case.z["out/pred_boxes"], atol=1e-4)
    golden_models.check_matches(case)
    golden_models.check_losses(case, {key: value.cpu() for key, value in losses.items()}, case.js["losses"], rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_keeps_boxes_and_losses_in_float32(name: str) -> None:
    case, samples, targets = _on_gpu(name)
    with autocast(torch.device("cuda"), enabled=True):
        outputs = golden_models.forward(case, samples, targets)
    assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == torch.float32
    losses = case.criterion(outputs, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    case.criterion.total(losses).backward()


def test_criterion_waits_for_the_device_once() -> None:
    """One copy of the costs to the host; everything else is queued."""
    case, samples, targets = _on_gpu("detr_r50")
    outputs = golden_models.forward(case, samples, targets)
    case.criterion(outputs, targets)
    cost = case.criterion.matcher.cost
    calls = []

    def counted(*args):
        calls.append(1)
        result = cost(*args)
        torch.cuda.set_sync_debug_mode("default")
        host = result.cpu()
        torch.cuda.set_sync_debug_mode("error")
        return host

    case.criterion.matcher.cost = counted
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = case.criterion(outputs, targets)
        reader = LossReader(losses)
        case.criterion.total(losses).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [1]
    assert set(reader.read()) == set(losses)


def test_training_step_with_fused_adamw() -> None:
    case, samples, targets = _on_gpu("cond_r50")
    optimizer = golden_models.build_optimizer(case.model, 1e-4, 1e-5, 1e-4)
    assert optimizer.defaults["fused"] is True
    run = Run(case.model, case.criterion, optimizer, None, None, torch.device("cuda"), 1, 0.1, True, None, 1, {})
    first, _ = train_step(run, samples, targets, stop=False)
    for _ in range(5):
        last, _ = train_step(run, samples, targets, stop=False)
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("name", ["resnet50"])
def test_frozen_backbone_in_channels_last(name: str) -> None:
    backbone = Backbone(name, trainable=False).cuda().eval()
    images = torch.randn(2, 3, 128, 160, device="cuda")
    plain = backbone(images)[-1]
    fast = backbone.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))[-1]
    torch.testing.assert_close(fast, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


def test_both_scripts_on_the_gpu(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    data = str(tmp_path / "scenes")
    run("-m", "datasets.sample_scenes", "--output", data, "--num_train", "32", "--num_val", "8", "--num_unlabelled", "32", "--size", "96")
    small = ["--backbone", "resnet18", "--enc_layers", "1", "--dec_layers", "2", "--image_size", "96", "--batch_size", "8", "--amp", "bf16"]
    common = [*small, "--epochs", "1", "--device", "cuda", "--backbone_weights", "none"]
    run("main.py", "--imagenet_path", f"{data}/unlabelled", "--output_dir", str(tmp_path / "pre"), "--feature_recon", *common)
    checkpoint = str(tmp_path / "pre" / "checkpoint.pth")
    run("finetune_main.py", "--coco_path", data, "--num_classes", "5", "--pretrain", checkpoint, "--output_dir", str(tmp_path / "fine"),
        "--image_size", "96", "--batch_size", "8", "--amp", "bf16", "--epochs", "1", "--device", "cuda")
    assert (tmp_path / "fine" / "results.json").exists()
