"""Two gloo processes against one: equal gradients, nobody left waiting, every image evaluated once, both launch commands."""
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from models import build_model
from tests.tiny import (
    MODEL_FLAGS,
    ROOT,
    assert_same,
    make_batch,
    make_targets,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.arguments import FINETUNE, PRETRAIN
from util.metrics import LossReader
from util.nested_tensor import NestedTensor

RUN = [*MODEL_FLAGS, "--backbone_weights", "none", "--backbone_norm", "frozen", "--device", "cpu", "--num_workers", "0",
       "--image_size", "64", "--dropout", "0", "--lr_backbone", "0"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    "launch": ["torch.distributed.launch", "--use_env"],
}


def gradients(model, criterion, samples: NestedTensor, targets: list[dict], is_pretext: bool) -> dict[str, torch.Tensor]:
    outputs = model(samples, targets) if is_pretext else model(samples)
    losses = criterion(outputs, targets)
    LossReader(losses).read()
    criterion.total(losses).backward()
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in bare.named_parameters() if p.requires_grad}


def make(args: Namespace):
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    return model.eval(), criterion.train()  # evaluation mode leaves out the query mask of the pretext, nothing else here


def inputs(counts: list[int], is_pretext: bool) -> tuple[NestedTensor, list[dict]]:
    return make_batch(len(counts)), make_targets(counts, patches=5 if is_pretext else 0)


def one_of_two(rank: int, args: Namespace, counts: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    is_pretext = bool(args.pretext)
    model, criterion = make(args)
    samples, targets = inputs(counts, is_pretext)
    mine = NestedTensor(samples.tensors[rank::2], samples.mask[rank::2], samples.padded)
    result = gradients(DistributedDataParallel(model), criterion, mine, targets[rank::2], is_pretext)
    torch.save(result, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


CASES = {
    "softmax, equal counts": (FINETUNE, ["--detector", "detr"], [2, 2, 3, 3]),
    "focal, any counts": (FINETUNE, ["--detector", "conditional_detr"], [4, 1, 0, 3]),
    "focal, one process without targets": (FINETUNE, ["--detector", "conditional_detr"], [0, 2, 0, 3]),
    "one decoder layer": (FINETUNE, ["--detector", "conditional_detr", "--dec_layers", "1"], [1, 2, 2, 1]),
    "pretext": (PRETRAIN, ["--detector", "detr", "--feature_recon", "--fre_cnn"], [5, 5, 5, 5]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_twice_the_batch(case: str, tmp_path: Path) -> None:
    script, flags, counts = CASES[case]
    args = tiny_args(script, *flags, "--dropout", "0", "--backbone_norm", "frozen")
    spawn(one_of_two, (args, counts, str(tmp_path)), nprocs=2)
    model, criterion = make(args)
    expected = gradients(model, criterion, *inputs(counts, bool(args.pretext)), bool(args.pretext))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_softmax_process_without_targets_does_not_stop_the_other(tmp_path: Path) -> None:
    args = tiny_args(FINETUNE, "--dropout", "0", "--backbone_norm", "frozen")
    spawn(one_of_two, (args, [0, 2, 0, 3], str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    assert_same(first, second)
    assert all(torch.isfinite(value).all() for value in first.values())


def launch(launcher: str, *words: object, port: int) -> None:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "--nproc_per_node", "2", "--master_port", str(port), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def single(*words: object) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    """Five images on two processes: the numbers and detections of one. One image a batch, since padding moves predictions a little."""
    data = write_coco(tmp_path / "coco", train=8, val=5)
    flags = ["finetune_main.py", "--coco_path", data, *RUN, "--detector", "conditional_detr", "--num_classes", 4, "--batch_size", 1]
    launch("torchrun", *flags, "--epochs", 1, "--output_dir", tmp_path / "two", port=29731)
    logged = read_log(tmp_path / "two")[0]["test_coco_eval_bbox"]
    checkpoint = tmp_path / "two" / "checkpoint.pth"
    single(*flags, "--eval", "--resume", checkpoint, "--output_dir", tmp_path / "one")
    assert (tmp_path / "one" / "results.json").read_text() != "[]"


    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["coco_eval_bbox"] == pytest.approx(logged, abs=1e-6)
    key = lambda found: (found["image_id"], -found["score"], found["category_id"])  # noqa: E731
    one, two = (sorted(json.loads((tmp_path / run / "results.json").read_text()), key=key) for run in ("one", "two"))
    assert [found["image_id"] for found in one] == [found["image_id"] for found in two]
    assert len({found["image_id"] for found in two}) == 5


@pytest.mark.parametrize(("launcher", "port"), [("torchrun", 29741), ("launch", 29751)])
def test_published_launch_commands(launcher: str, port: int, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 8)
    launch(launcher, "main.py", *RUN, "--imagenet_path", images, "--num_patches", 5, "--patch_size", 32, "--batch_size", 2, "--epochs", 1,
           "--feature_recon", "--output_dir", tmp_path / "out", port=port)
    checkpoint = read_checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert checkpoint["world_size"] == len(checkpoint["random_states"]) == 2
    assert read_log(tmp_path / "out")[0]["train_loss"] > 0
