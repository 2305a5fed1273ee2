"""docs/evaluation.md: what an image gets in evaluation does not depend on the images it shares a batch with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import engine
from datasets import build_dataset, build_loader
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, build_ground_truth
from datasets.evaluators.voc import VocEvaluator
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco
from datasets.transfer import Transfer
from models import build_model
from tests.tiny import tiny_args, write_coco
from util.settings import FINETUNE

# Largest difference of logits and normalised boxes that is rounding: other batch sizes sum in another order.
TOLERANCE = 2e-5
IMAGES = 13


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images of six sizes."""
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=1, val=IMAGES)


def predict(
    coco: Path, detector: str, *flags: object
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[int]]:
    """Return image id -> (logits [Q, C], boxes [Q, 4]) of a random detector, and the size of each batch."""
    args = tiny_args(FINETUNE, "--coco_path", str(coco), "--detector", detector, *map(str, flags))
    torch.manual_seed(3)
    model, _, _ = build_model(args)
    model.eval()
    dataset = build_dataset("val", args)
    transfer = Transfer(torch.device("cpu"), model.normalization)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    sizes = []
    with torch.no_grad():
        for samples, packed in build_loader(dataset, args, train=False):
            outputs = engine.forward(model, *transfer(samples, packed), None)
            ids = packed.tensors["image_id"].tolist()
            rows = zip(outputs["pred_logits"], outputs["pred_boxes"], strict=True)
            found.update(zip(ids, rows, strict=True))
            sizes.append(len(ids))
    assert sum(sizes) == len(found) == IMAGES
    return found, sizes


def largest_difference(first: dict, second: dict) -> float:
    return max(
        float((a - b).abs().max())
        for image_id in first
        for a, b in zip(first[image_id], second[image_id], strict=True)
    )


@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr"])
def test_batches_of_equal_size_predict_what_each_image_gets_alone(
    detector: str, coco: Path
) -> None:
    alone, sizes = predict(coco, detector, "--eval_batch_size", 1)
    assert sizes == [1] * IMAGES
    together, sizes = predict(coco, detector, "--bucket_aspect", "--eval_batch_size", 4)
    assert sorted(sizes) == [2, 2, 2, 2, 2, 3]
    assert largest_difference(alone, together) < TOLERANCE
    # With other sizes in the batch, images are padded.
    padded, sizes = predict(coco, detector, "--eval_batch_size", 4)
    assert sizes == [4, 4, 4, 1]
    assert largest_difference(alone, padded) > 50 * TOLERANCE


def test_batch_size_of_evaluation(coco: Path) -> None:
    """`--eval_batch_size` is that of evaluation alone, and `--batch_size` the default."""

    def lengths(*flags: str) -> tuple[int, int]:
        args = tiny_args(FINETUNE, "--coco_path", str(coco), *flags)
        train, val = (build_dataset(name, args) for name in ("train", "val"))
        return tuple(
            len(next(iter(build_loader(dataset, args, train=is_train)))[0])
            for dataset, is_train in ((train, True), (val, False))
        )

    assert lengths("--batch_size", "1") == (1, 1)
    assert lengths("--batch_size", "1", "--eval_batch_size", "5") == (1, 5)
    with pytest.raises(SystemExit):
        tiny_args(FINETUNE, "--eval_batch_size", "0")


def random_detections(ground_truth: dict, seed: int) -> dict[int, dict[str, Tensor]]:
    """Boxes near the ground truth and elsewhere, with few different scores, so that many are equal."""
    rng = np.random.RandomState(seed)
    found = {}
    for image in ground_truth["images"]:
        own = [a for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in own] * 3, dtype=float)  # [3 A, 4], x, y, w, h
        boxes += rng.uniform(-6, 6, boxes.shape)
        boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clip(2)
        found[image["id"]] = {
            "boxes": torch.tensor(boxes),
            "scores": torch.tensor(rng.randint(1, 4, len(boxes)) / 4),
            "labels": torch.tensor([a["category_id"] for a in own] * 3),
        }
    return found


@pytest.mark.parametrize("backend", [*BACKENDS, "voc"])
def test_metrics_do_not_depend_on_the_order_of_images(backend: str, coco: Path) -> None:
    """Not by a bit, although many detections have the same score."""
    if backend == "hotcoco":
        pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    path = coco / "annotations" / "instances_val2017.json"
    ground_truth = build_ground_truth(read_json(path))
    detections = random_detections(ground_truth, seed=0)

    def stats(ids: list[int], size: int) -> list[float]:
        if backend == "voc":
            evaluator = VocEvaluator(parse_coco(read_json(path), str(path)))
        else:
            evaluator = CocoEvaluator(ground_truth, backend)
        for i in range(0, len(ids), size):
            evaluator.update({image_id: detections[image_id] for image_id in ids[i : i + size]})
        return list(evaluator.summarize()["stats"])

    ids = sorted(detections)
    expected = stats(ids, 1)
    assert 0.05 < expected[0] < 0.95
    shuffled = np.random.RandomState(1).permutation(ids).tolist()
    for order, size in ((ids, 5), (ids[::-1], 1), (shuffled, 4)):
        assert stats(order, size) == expected
