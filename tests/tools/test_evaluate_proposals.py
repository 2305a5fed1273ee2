"""Class-agnostic evaluation: published metrics, boxes of models and of proposal methods."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.evaluators.coco import BACKENDS, _stats, build_ground_truth
from datasets.evaluators.proposals import ProposalEvaluator
from predictor import Predictor
from tests import golden_models
from tests.tiny import FROZEN, captured_log, fine_tune, pre_train, write_coco, write_images
from tools import evaluate_proposals
from util.errors import UserError


def update(evaluator: ProposalEvaluator, detections: list[dict]) -> None:
    for image_id in {detection["image_id"] for detection in detections}:
        own = [detection for detection in detections if detection["image_id"] == image_id]
        boxes = torch.tensor([detection["bbox"] for detection in own], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([detection["score"] for detection in own], dtype=torch.float64)
        evaluator.update(
            {
                image_id: {
                    "scores": scores,
                    "labels": torch.tensor([d["category_id"] for d in own]),
                    "boxes": boxes,
                }
            }
        )


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden-dir"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_equal_published_ones(backend: str, golden_dir: Path) -> None:
    pytest.importorskip(backend)
    case = json.loads((golden_dir / "coco_eval_case.json").read_text())
    evaluator = ProposalEvaluator(build_ground_truth(case["gt"]), backend)
    update(evaluator, case["dt"])
    rows = evaluator.rows_xywh()
    rows[:, 6] = 1
    published = golden_models.load("data_detreg", golden_dir)[0]["proposals"]
    for name in ("default_1_10_100", "maxdets_2_5_100"):
        ours = _stats(*evaluator._curves(rows, published[name]["max_dets"]))
        np.testing.assert_allclose(ours, published[name]["stats"], rtol=0, atol=1e-9)
    stats, numbers = published["default_1_10_100"]["stats"], evaluator.summarize()
    assert [numbers[name] for name in ("AP", "AP50", "AP75")] == pytest.approx(stats[:3], abs=1e-9)
    assert [
        numbers[name] for name in ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    ] == pytest.approx(stats[6:], abs=1e-9)


TRUTH = {
    "images": [{"id": 7, "width": 100, "height": 100, "file_name": "a.png"}],
    "annotations": [
        {
            "id": i,
            "image_id": 7,
            "category_id": 5 + i % 2,
            "bbox": [10.0 * i, 10, 8, 8],
            "area": 64,
            "iscrowd": 0,
        }
        for i in range(1, 5)
    ],
    "categories": [{"id": 5, "name": "five"}, {"id": 6, "name": "six"}],
}


def test_average_recall_limits_number_of_boxes() -> None:
    evaluator = ProposalEvaluator(build_ground_truth(TRUTH))
    boxes = torch.tensor(
        [[90.0, 90, 95, 95]] * 8 + [[10.0 * i, 10, 10 * i + 8, 18] for i in range(1, 5)]
    )
    evaluator.update(
        {7: {"scores": torch.linspace(1, 0.1, 12), "labels": torch.full((12,), 99), "boxes": boxes}}
    )
    numbers = evaluator.summarize()
    assert (numbers["AR1"], numbers["AR10"], numbers["AR100"], numbers["AR1000"]) == (0, 0.5, 1, 1)


def test_metrics_without_boxes_and_without_ground_truth() -> None:
    assert set(ProposalEvaluator(build_ground_truth(TRUTH)).summarize().values()) == {0.0}
    assert set(
        ProposalEvaluator(build_ground_truth({**TRUTH, "annotations": []})).summarize().values()
    ) == {-1.0}


def test_swapped_metrics_use_boxes_of_another_image() -> None:
    """Three images of different size with one object each. Image 3 has no boxes, so image 1 gets none."""
    sizes, places = (
        {1: (100, 50), 2: (50, 100), 3: (20, 20)},
        {1: (0.1, 0.1, 0.5, 0.5), 2: (0.1, 0.1, 0.5, 0.5), 3: (0.5, 0.5, 0.9, 0.9)},
    )
    absolute = {i: torch.tensor(places[i]) * torch.tensor([*sizes[i], *sizes[i]]) for i in sizes}
    truth = {
        "images": [
            {"id": i, "width": width, "height": height} for i, (width, height) in sizes.items()
        ],
        "categories": [{"id": 5, "name": "a"}],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 5,
                "iscrowd": 0,
                "area": float((box[2] - box[0]) * (box[3] - box[1])),
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            }
            for i, box in absolute.items()
        ],
    }
    evaluator = ProposalEvaluator(build_ground_truth(truth))
    evaluator.update(
        {
            i: {"scores": torch.ones(1), "labels": torch.ones(1), "boxes": absolute[i][None]}
            for i in (1, 2)
        }
    )
    numbers = evaluator.summarize()
    assert numbers["AR10"] == numbers["AR100"] == pytest.approx(2 / 3)
    assert numbers["AR10_swapped"] == numbers["AR100_swapped"] == pytest.approx(1 / 3), (
        "2 has the boxes of 1; 3 gets those of 2"
    )
    assert 0 < numbers["AP50_swapped"] < numbers["AP50"]


def run(*flags: object) -> dict[str, float]:
    return evaluate_proposals.main(
        evaluate_proposals.parse([*map(str, flags), "--num_workers", "0"])
    )


def test_ground_truth_as_proposals_has_perfect_recall(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    truth = coco / "annotations" / "instances_val2017.json"
    numbers = run(
        "--coco_path", coco, "--proposals", f"file:{truth}", "--output_dir", tmp_path / "out"
    )
    assert numbers["AR100"] == pytest.approx(1)
    kept = json.loads((tmp_path / "out" / "proposal_metrics.json").read_text())
    assert kept["AR100"] == numbers["AR100"]
    assert len(json.loads((tmp_path / "out" / "proposals.json").read_text())) == len(
        json.loads(truth.read_text())["annotations"]
    )
    with pytest.raises(UserError, match="already has proposal_metrics.json"):
        run("--coco_path", coco, "--proposals", "random", "--output_dir", tmp_path / "out")


def test_recall_grows_with_number_of_random_boxes(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    few = run("--coco_path", coco, "--proposals", "random", "--max_prop", "10")
    many = run("--coco_path", coco, "--proposals", "random", "--max_prop", "1000")
    assert many["AR1000"] > few["AR1000"]
    assert few["AR1000"] == few["AR10"]
    assert many == run("--coco_path", coco, "--proposals", "random", "--max_prop", "1000"), (
        "the same seed gives the same boxes"
    )


def test_random_proposals_default_to_1000_boxes(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    with captured_log() as lines:
        run("--coco_path", coco, "--proposals", "random")
    assert "1000.0 boxes per image" in lines


def test_max_prop_limits_boxes_of_every_method(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    truth = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    flags = (
        "--coco_path",
        coco,
        "--proposals",
        f"file:{coco / 'annotations' / 'instances_val2017.json'}",
        "--max_prop",
        "1",
    )
    with captured_log() as lines:
        run(*flags, "--output_dir", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "proposals.json").read_text())
    assert len(rows) == len({row["image_id"] for row in rows}) < len(truth["annotations"])
    assert "1.0 boxes per image" in lines


def test_needs_either_checkpoint_or_proposals(tmp_path: Path) -> None:
    for flags in ((), ("--checkpoint", "a.pth", "--proposals", "random")):
        with pytest.raises(UserError, match="--checkpoint PATH for a model, or --proposals NAME"):
            run("--coco_path", tmp_path, *flags)


@pytest.mark.parametrize(
    ("pretext", "flags"),
    [
        ("random_query_patch", ()),
        (
            "region_prior",
            ("--proposals", "random", "--num_patches", "10", "--object_embedding_loss"),
        ),
        (
            "region_prior",
            (
                "--proposals",
                "random",
                "--num_patches",
                "10",
                "--num_classes",
                "1",
                "--detector",
                "conditional_detr",
            ),
        ),
    ],
)
def test_evaluates_pre_trained_model(pretext: str, flags: tuple, tmp_path: Path) -> None:
    """Each query gives one box, scored by the class "object": label 1, or 0 if there is only one class."""
    images, coco = write_images(tmp_path / "images"), write_coco(tmp_path / "coco")
    pre_train(
        "--pretext",
        pretext,
        *flags,
        "--imagenet_path",
        images,
        "--epochs",
        "1",
        "--output_dir",
        tmp_path / "a",
        *FROZEN,
    )
    checkpoint = tmp_path / "a" / "checkpoint.pth"
    numbers = run(
        "--coco_path",
        coco,
        "--checkpoint",
        checkpoint,
        "--image_size",
        "64",
        "--output_dir",
        tmp_path / "b",
    )
    rows = json.loads((tmp_path / "b" / "proposals.json").read_text())
    assert len(rows) == 3 * 20
    assert set(numbers) >= {"AP", "AR1", "AR10", "AR100", "AR1000", "AR10_swapped"}
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", class_agnostic=True)
    assert predictor.postprocess.label == (0 if "--num_classes" in flags else 1)


def test_evaluates_trained_detector(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    fine_tune("--coco_path", coco, "--epochs", "1", "--output_dir", tmp_path / "a", *FROZEN)
    with captured_log() as lines:
        run(
            "--coco_path",
            coco,
            "--checkpoint",
            tmp_path / "a" / "checkpoint.pth",
            "--image_size",
            "64",
        )
    assert any(line.startswith("class-agnostic: AP") for line in lines)
    image = next((coco / "val2017").iterdir())
    image.write_bytes(b"broken")
    with captured_log() as lines:
        run(
            "--coco_path",
            coco,
            "--checkpoint",
            tmp_path / "a" / "checkpoint.pth",
            "--image_size",
            "64",
        )
    assert not any("was trained at" in line for line in lines)
    assert any(line.startswith(f"skipped {image}: can't be decoded") for line in lines)
    assert "1 images of the validation set can't be used: their objects count as missed" in lines
    with captured_log() as lines:
        run("--coco_path", coco, "--checkpoint", tmp_path / "a" / "checkpoint.pth")
    assert any("was trained at --image_size 64 and is evaluated at 800" in line for line in lines)
