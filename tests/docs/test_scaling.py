"""The figures of docs/scaling.md follow from its formulas, the models, and the measurements in docs/results."""

import math
import re

import pytest
import torch

from models import build_model
from tests.documents import ROOT
from util.settings import settings

PAGE = (ROOT / "docs" / "scaling.md").read_text()
BENCHMARK = (ROOT / "docs" / "results" / "benchmark.md").read_text()
GPUS, NODES = 256, 32
IMAGENET, IMAGENET_BYTES = 1_281_167, 138e9
COCO, COCO_BYTES = 118_287, 18e9
# pretext or dataset -> (images/s of 8 published GPUs, bytes of an image)
RATES = {
    "random_query_patch": (IMAGENET / (2 * 3600), IMAGENET_BYTES / IMAGENET),
    "region_prior": (126_689 * 50 / (1.5 * 86_400), IMAGENET_BYTES / IMAGENET),
    "detection": (COCO / (28 * 60), COCO_BYTES / COCO),
}
DETECTORS = {
    "DETR": "detr",
    "Conditional DETR": "conditional_detr",
    "Deformable DETR": "deformable_detr",
}


def table(head: str) -> dict[str, list[float]]:
    """Return first cell -> the numbers of a row, of the table whose head starts with these cells."""
    text = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {first: [float(cell) for cell in cells] for first, *cells in rows[2:]}


def test_loader() -> None:
    rows = list(table("run | images/s of a GPU").values())
    for row, (what, (rate, image_bytes)) in zip(rows, RATES.items(), strict=True):
        measured = re.search(
            rf"^\| {what} +\| ours .*?\|.*?\|.*?\| ([\d.]+) ",
            BENCHMARK[BENCHMARK.index("## Data loading") :],
            re.M,
        )
        per_gpu, per_core = rate / 8, float(measured[1])
        expected = [
            per_gpu,
            per_core,
            per_gpu / per_core,
            10 * per_gpu / per_core,
            GPUS * per_gpu,
            GPUS * per_gpu * image_bytes / 1e6,
        ]
        assert row == pytest.approx(expected, rel=0.06)  # rounded to two digits
        assert row[4:] == pytest.approx(expected[4:], abs=0.51)


def test_all_reduce_and_checkpoints() -> None:
    rows = table("detector (ResNet-50)")
    for name, detector in DETECTORS.items():
        config = settings(detector=detector, backbone_weights="none", backbone_norm="frozen")
        with torch.device("meta"):  # sizes only
            model = build_model(config)[0]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        gradients = 4 * trainable / 1e6
        node = 2 * (NODES - 1) / NODES * gradients
        sent = 2 * (GPUS - 1) / GPUS * gradients
        times = [node / 12_500 * 1e3, node / 50_000 * 1e3]  # MB/s of 100 and 400 Gbit/s
        assert rows[name][0] == trainable
        assert rows[name][1:4] == pytest.approx([gradients, sent, node], abs=0.51)
        assert rows[name][4:] == pytest.approx(times, abs=0.051)
        if detector == "detr":
            weights = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
            moments = 8 * trainable / 1e6
            assert (round(weights), round(moments), round(weights + moments)) == (167, 330, 497)
    for figure in ("497 MB", "(167 MB)", "= 330 MB"):
        assert figure in PAGE


def test_checkpoint_traffic_and_steps() -> None:
    epoch = COCO / (GPUS * COCO / (28 * 60) / 8)
    assert f"118,287 / 2253 = {epoch:.1f} s, so {497 / epoch:.1f} MB/s" in PAGE
    assert f"{GPUS * 0.497:.0f} GB, or {NODES * 0.497:.1f} GB" in PAGE
    for name, (batch, steps) in table("256 GPUs").items():
        per_gpu = re.search(r", (\d+) per GPU", name)
        assert per_gpu is None or GPUS * int(per_gpu[1]) == batch
        assert steps == math.floor((COCO if "COCO" in name else IMAGENET) / batch)
