"""COCO evaluation: every backend against pycocotools, and what the libraries leave to the caller."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.evaluators import coco as coco_module
from datasets.evaluators import detections as detections_module
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, build_ground_truth, select_backend
from datasets.labelled.annotations import parse_coco
from tests.golden_data import detections_by_image
from tests.tiny import captured_log
from util.errors import UserError

FAST = [name for name in BACKENDS if name != "pycocotools"]


def random_truth(rng: np.random.RandomState) -> dict:
    categories = sorted(rng.choice(np.arange(1, 30), rng.randint(1, 6), replace=False).tolist())
    images = [
        {"id": int(i), "width": 300, "height": 250}
        for i in rng.choice(10**6, rng.randint(1, 8), replace=False)
    ]
    annotations = []
    for image in images:
        for _ in range(rng.choice([0, 1, 3, 12])):
            w, h = rng.rand(2) * rng.choice([20, 80, 200]) + 0.5
            x, y = rng.rand(2) * 150
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": int(rng.choice(categories)),
                    "bbox": [x, y, w, h],
                    "iscrowd": int(rng.rand() < 0.2),
                    "area": w * h * rng.choice([1, 0.5]),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in categories],
    }


def random_detections(rng: np.random.RandomState, truth: dict) -> list[dict]:
    """Near the truth and far from it, with equal scores, unlisted classes and more than 100 in an image."""
    classes = [category["id"] for category in truth["categories"]] + [99]
    results = []
    for image in truth["images"]:
        mine = [
            annotation
            for annotation in truth["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        for _ in range(rng.choice([0, 1, 5, 30, 150])):
            bbox, label = (
                np.concatenate([rng.rand(2) * 200, rng.rand(2) * 100]),
                rng.choice(classes),
            )
            if mine and rng.rand() < 0.6:
                near = mine[rng.randint(len(mine))]
                bbox, label = (
                    np.array(near["bbox"]) + rng.randn(4) * rng.choice([0, 1, 5]),
                    near["category_id"],
                )
            bbox[2:] = bbox[2:].clip(0)
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": int(label),
                    "bbox": bbox.tolist(),
                    "score": round(rng.rand(), 2),
                }
            )
    return results


def summary(truth: dict, results: list[dict], backend: str) -> dict:
    evaluator = CocoEvaluator(build_ground_truth(truth), backend)
    evaluator.update(detections_by_image(results))
    return evaluator.summarize()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_training_takes_is_evaluated(backend: str) -> None:
    """Entries that `parse_coco` accepts, so that no run ends at its first evaluation."""
    pytest.importorskip(backend)
    plain = {
        "images": [{"id": 1, "width": 90, "height": 90}],
        "categories": [{"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 40]}],
    }
    results = [{"image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 40], "score": 0.9}]
    expected = summary(plain, results, backend)
    assert expected["stats"][0] == pytest.approx(1)
    for odd in ({"area": "large"}, {"area": None}, {"iscrowd": None}, {"iscrowd": False}):
        assert (
            summary(
                {**plain, "annotations": [{**plain["annotations"][0], **odd}]}, results, backend
            )
            == expected
        )
    assert (
        summary({**plain, "images": [{"id": 1, "width": None, "height": None}]}, results, backend)
        == expected
    )


@pytest.mark.parametrize("backend", FAST)
def test_backend_equals_pycocotools(backend: str) -> None:
    pytest.importorskip(backend)
    for seed in range(12):
        rng = np.random.RandomState(seed)
        truth = random_truth(rng)
        results = random_detections(rng, truth)
        expected, actual = summary(truth, results, "pycocotools"), summary(truth, results, backend)
        np.testing.assert_allclose(
            actual["stats"], expected["stats"], rtol=0, atol=1e-9, err_msg=f"seed {seed}"
        )
        for row, known in zip(actual["per_class"], expected["per_class"], strict=True):
            assert row == {
                name: value if isinstance(value, str) else pytest.approx(value, abs=1e-9)
                for name, value in known.items()
            }, seed


def simple_truth(**annotation) -> dict:
    return {
        "images": [{"id": 5, "width": 100, "height": 100}, {"id": 6, "width": 100, "height": 100}],
        "annotations": [
            {"id": 0, "image_id": 5, "category_id": 2, "bbox": [10, 10, 50, 50], **annotation}
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


def exact_hit() -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([[10.0, 10, 60, 60]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([2]),
    }


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "pycocotools"] + ["auto"])
def test_exact_detection_without_area_and_iscrowd(
    backend: str, capfd: pytest.CaptureFixture
) -> None:
    evaluator = CocoEvaluator(build_ground_truth(simple_truth()), backend)
    evaluator.update({5: exact_hit()})
    result = evaluator.summarize()
    assert result["stats"][:3] == pytest.approx([1, 1, 1])
    assert result["stats"][3:6] == pytest.approx([-1, 1, -1])
    assert result["per_class"] == [
        {
            "id": 2,
            "name": "cat",
            "objects": 1,
            **dict.fromkeys(("AP", "AP50", "AP75"), pytest.approx(1)),
        }
    ]
    assert capfd.readouterr().out == ""


def test_no_detection_gives_zeros_where_there_is_truth() -> None:
    evaluator = CocoEvaluator(build_ground_truth(simple_truth()))
    none = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    for predictions in ({}, {5: none}, {6: {**exact_hit(), "labels": torch.tensor([77])}}):
        evaluator.update(predictions)
        row = {"id": 2, "name": "cat", "objects": 1, "AP": 0.0, "AP50": 0.0, "AP75": 0.0}
        assert evaluator.summarize() == {"stats": [0, 0, 0, -1, 0, -1] * 2, "per_class": [row]}


def test_no_detection_is_as_in_pycocotools() -> None:
    """-1 where an area range has no truth; crowds are none, and both ends of a range belong to it."""
    empty = simple_truth()
    empty["annotations"] = []
    cases = [
        empty,
        simple_truth(iscrowd=1),
        simple_truth(area=32.0**2),
        simple_truth(area=96.0**2),
        simple_truth(area=5e5),
    ]
    for truth in cases + [random_truth(np.random.RandomState(seed)) for seed in range(12)]:
        evaluator = CocoEvaluator(build_ground_truth(truth))
        truth_api, none = COCO(), COCO()
        for api, annotations in ((truth_api, evaluator.ground_truth["annotations"]), (none, [])):
            api.dataset = {
                **evaluator.ground_truth,
                "annotations": [dict(annotation) for annotation in annotations],
            }
            api.createIndex()
        reference = COCOeval(truth_api, none, "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        result = evaluator.summarize()
        assert result["stats"] == reference.stats.tolist(), truth
        known = (reference.eval["precision"][:, :, :, 0, 2] > -1).any((0, 1))
        found = {row["id"]: row["AP"] for row in result["per_class"]}
        assert found == {
            label: 0.0 for label, has in zip(reference.params.catIds, known, strict=True) if has
        }


def test_results_are_coco_results() -> None:
    evaluator = CocoEvaluator(build_ground_truth(simple_truth()))
    evaluator.update({5: exact_hit()})
    (result,) = evaluator.results()
    assert result == {
        "image_id": 5,
        "category_id": 2,
        "bbox": [10, 10, 50, 50],
        "score": pytest.approx(0.9),
    }


def test_an_image_seen_by_two_processes_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = CocoEvaluator(build_ground_truth(simple_truth()))
    evaluator.update({5: exact_hit()})
    other = CocoEvaluator(build_ground_truth(simple_truth()))
    other.update({5: exact_hit(), 6: exact_hit()})
    monkeypatch.setattr(
        detections_module, "all_gather_object", lambda mine: [mine, other._detections]
    )
    evaluator.synchronize_between_processes()
    assert [result["image_id"] for result in evaluator.results()] == [5, 6]


def test_unlisted_truth_is_not_evaluated() -> None:
    truth = simple_truth()
    truth["annotations"] += [
        {"id": 1, "image_id": 777, "category_id": 2, "bbox": [0, 0, 5, 5]},
        {"id": 2, "image_id": 5, "category_id": 777, "bbox": [0, 0, 5, 5]},
    ]
    evaluator = CocoEvaluator(build_ground_truth(truth))
    evaluator.update({5: exact_hit()})
    assert evaluator.summarize()["stats"][0] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_that_is_listed_twice_counts_once(backend: str) -> None:
    pytest.importorskip(backend)
    truth = simple_truth()
    results = [{"image_id": 5, "category_id": 2, "bbox": [10, 10, 50, 50], "score": 0.9}]
    twice = {**truth, "categories": [*truth["categories"], {"id": 2, "name": "cat"}]}
    assert summary(twice, results, backend) == summary(truth, results, backend)


@pytest.mark.parametrize(
    "bbox",
    [
        [10, 10, 0, 5],
        [10, 10, -5, 5],
        [10, float("nan"), 5, 5],
        [10, 10, float("inf"), 5],
        [10, 10, 1e39, 5],
        [100, 10, 5, 5],
    ],
)
def test_boxes_that_training_leaves_out_are_no_objects_to_find(bbox: list) -> None:
    truth = simple_truth()
    truth["images"] = [{**image, "file_name": "a.jpg"} for image in truth["images"]]
    truth["annotations"].append({"id": 1, "image_id": 5, "category_id": 2, "bbox": bbox})
    assert len(parse_coco(truth, "truth").labels) == 1
    evaluator = CocoEvaluator(build_ground_truth(truth))
    evaluator.update({5: exact_hit()})
    result = evaluator.summarize()
    assert result["stats"][:3] == pytest.approx([1, 1, 1])
    assert result["per_class"][0]["objects"] == 1


def test_of_a_sound_file_nothing_is_left_out() -> None:
    """A crowd has no limit: it is never looked for."""
    for seed in range(6):
        truth = random_truth(np.random.RandomState(seed))
        kept = build_ground_truth(truth)["annotations"]
        assert [(a["bbox"], a["area"]) for a in kept] == [
            (a["bbox"], a["area"]) for a in truth["annotations"]
        ]
    assert len(build_ground_truth(simple_truth(iscrowd=1, bbox=[10, 10, 0, 5]))["annotations"]) == 1


def test_errors_name_the_cause() -> None:
    with pytest.raises(ValueError, match="image 9 is not in the annotations"):
        CocoEvaluator(build_ground_truth(simple_truth())).update({9: exact_hit()})
    with pytest.raises(UserError, match="evaluator nonsense is unknown"):
        select_backend("nonsense")


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        coco_module.importlib.util, "find_spec", lambda name: name == "pycocotools" or None
    )
    coco_module._log_choice.cache_clear()
    with captured_log() as lines:
        assert [select_backend("auto") for _ in range(3)] == ["pycocotools"] * 3
    assert lines == ["COCO metrics: computed by pycocotools"], "once per run"
    with pytest.raises(UserError, match="pip install hotcoco"):
        select_backend("hotcoco")
