"""COCO metrics: each backend against pycocotools, and the cases that the libraries do not handle."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.evaluators import coco as coco_module
from datasets.evaluators import detections as detections_module
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, build_ground_truth, select_backend
from datasets.labelled.coco_parser import parse_coco
from tests.golden_data import detections_by_image
from tests.tiny import captured_log
from util.errors import UserError

FAST_BACKENDS = [name for name in BACKENDS if name != "pycocotools"]


def random_ground_truth(rng: np.random.RandomState) -> dict:
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


def random_detections(rng: np.random.RandomState, ground_truth: dict) -> list[dict]:
    """Near ground-truth boxes and far from them, with equal scores, an unlisted class and more than 100 per image."""
    classes = [category["id"] for category in ground_truth["categories"]] + [99]
    results = []
    for image in ground_truth["images"]:
        objects = [a for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        for _ in range(rng.choice([0, 1, 5, 30, 150])):
            bbox = np.concatenate([rng.rand(2) * 200, rng.rand(2) * 100])
            label = rng.choice(classes)
            if objects and rng.rand() < 0.6:
                near = objects[rng.randint(len(objects))]
                bbox = np.array(near["bbox"]) + rng.randn(4) * rng.choice([0, 1, 5])
                label = near["category_id"]
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


def evaluate(content: dict, results: list[dict], backend: str) -> dict:
    """Return the summary of an evaluation. content: of a COCO detection file."""
    evaluator = CocoEvaluator(build_ground_truth(content), backend)
    evaluator.update(detections_by_image(results))
    return evaluator.summarize()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_training_accepts_can_be_evaluated(backend: str) -> None:
    """Otherwise a run would end at its first evaluation."""
    pytest.importorskip(backend)
    plain = {
        "images": [{"id": 1, "width": 90, "height": 90}],
        "categories": [{"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 40]}],
    }
    results = [{"image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 40], "score": 0.9}]
    expected = evaluate(plain, results, backend)
    assert expected["stats"][0] == pytest.approx(1)
    for change in ({"area": "large"}, {"area": None}, {"iscrowd": None}, {"iscrowd": False}):
        changed = {**plain, "annotations": [{**plain["annotations"][0], **change}]}
        assert evaluate(changed, results, backend) == expected
    unknown_size = {**plain, "images": [{"id": 1, "width": None, "height": None}]}
    assert evaluate(unknown_size, results, backend) == expected


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_equals_pycocotools(backend: str) -> None:
    pytest.importorskip(backend)
    for seed in range(12):
        rng = np.random.RandomState(seed)
        ground_truth = random_ground_truth(rng)
        results = random_detections(rng, ground_truth)
        expected = evaluate(ground_truth, results, "pycocotools")
        actual = evaluate(ground_truth, results, backend)
        np.testing.assert_allclose(
            actual["stats"], expected["stats"], rtol=0, atol=1e-9, err_msg=f"seed {seed}"
        )
        for row, known in zip(actual["per_class"], expected["per_class"], strict=True):
            assert row == {
                name: value if isinstance(value, str) else pytest.approx(value, abs=1e-9)
                for name, value in known.items()
            }, seed


def one_object(**annotation) -> dict:
    """The content of a COCO file with two images and one object, without `area` and `iscrowd`."""
    return {
        "images": [{"id": 5, "width": 100, "height": 100}, {"id": 6, "width": 100, "height": 100}],
        "annotations": [
            {"id": 0, "image_id": 5, "category_id": 2, "bbox": [10, 10, 50, 50], **annotation}
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


def perfect_detection() -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([[10.0, 10, 60, 60]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([2]),
    }


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_missing_area_and_iscrowd(backend: str, capfd: pytest.CaptureFixture) -> None:
    evaluator = CocoEvaluator(build_ground_truth(one_object()), backend)
    evaluator.update({5: perfect_detection()})
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
    assert capfd.readouterr().out == "", "the backends print nothing"


def test_without_detections_metrics_are_0_where_there_is_ground_truth() -> None:
    evaluator = CocoEvaluator(build_ground_truth(one_object()))
    none = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    unlisted_class = {**perfect_detection(), "labels": torch.tensor([77])}
    row = {"id": 2, "name": "cat", "objects": 1, "AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    for predictions in ({}, {5: none}, {6: unlisted_class}):
        evaluator.update(predictions)
        assert evaluator.summarize() == {"stats": [0, 0, 0, -1, 0, -1] * 2, "per_class": [row]}


def test_without_detections_equals_pycocotools() -> None:
    """-1 for an area range without ground truth. Crowds do not count, and both ends of a range are included."""
    empty = one_object()
    empty["annotations"] = []
    cases = [
        empty,
        one_object(iscrowd=1),
        one_object(area=32.0**2),
        one_object(area=96.0**2),
        one_object(area=5e5),
    ]
    cases += [random_ground_truth(np.random.RandomState(seed)) for seed in range(12)]
    for content in cases:
        evaluator = CocoEvaluator(build_ground_truth(content))
        coco_gt, coco_dt = COCO(), COCO()
        for api, annotations in ((coco_gt, evaluator.ground_truth["annotations"]), (coco_dt, [])):
            api.dataset = {
                **evaluator.ground_truth,
                "annotations": [dict(annotation) for annotation in annotations],
            }
            api.createIndex()
        reference = COCOeval(coco_gt, coco_dt, "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        result = evaluator.summarize()
        assert result["stats"] == reference.stats.tolist(), content
        has_objects = (reference.eval["precision"][:, :, :, 0, 2] > -1).any((0, 1))
        expected = np.array(reference.params.catIds)[has_objects].tolist()
        ap = {row["id"]: row["AP"] for row in result["per_class"]}
        assert ap == dict.fromkeys(expected, 0.0)


def test_results_in_coco_format() -> None:
    evaluator = CocoEvaluator(build_ground_truth(one_object()))
    evaluator.update({5: perfect_detection()})
    (result,) = evaluator.results()
    assert result == {
        "image_id": 5,
        "category_id": 2,
        "bbox": [10, 10, 50, 50],
        "score": pytest.approx(0.9),
    }


def test_image_seen_by_two_ranks_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = CocoEvaluator(build_ground_truth(one_object()))
    evaluator.update({5: perfect_detection()})
    other = CocoEvaluator(build_ground_truth(one_object()))
    other.update({5: perfect_detection(), 6: perfect_detection()})
    monkeypatch.setattr(
        detections_module, "all_gather_object", lambda mine: [mine, other._detections]
    )
    evaluator.synchronize_between_processes()
    assert [result["image_id"] for result in evaluator.results()] == [5, 6]


def test_unlisted_images_and_classes_are_not_evaluated() -> None:
    content = one_object()
    content["annotations"] += [
        {"id": 1, "image_id": 777, "category_id": 2, "bbox": [0, 0, 5, 5]},
        {"id": 2, "image_id": 5, "category_id": 777, "bbox": [0, 0, 5, 5]},
    ]
    evaluator = CocoEvaluator(build_ground_truth(content))
    evaluator.update({5: perfect_detection()})
    assert evaluator.summarize()["stats"][0] == pytest.approx(1)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_names_that_are_not_valid_unicode(backend: str) -> None:
    """JSON may have half of a surrogate pair; the bytes of a file name in Latin-1 become such halves."""
    content = one_object()
    content["categories"][0]["name"] = "100 \ud83d"
    content["images"][0]["file_name"] = "\udce9.jpg"
    evaluator = CocoEvaluator(build_ground_truth(content), backend)
    evaluator.update({5: perfect_detection()})
    summary = evaluator.summarize()
    assert summary["stats"][0] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_that_is_listed_twice_counts_once(backend: str) -> None:
    pytest.importorskip(backend)
    once = one_object()
    twice = {**once, "categories": [*once["categories"], {"id": 2, "name": "cat"}]}
    results = [{"image_id": 5, "category_id": 2, "bbox": [10, 10, 50, 50], "score": 0.9}]
    assert evaluate(twice, results, backend) == evaluate(once, results, backend)


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
def test_boxes_that_training_skips_are_not_evaluated(bbox: list) -> None:
    content = one_object()
    content["images"] = [{**image, "file_name": "a.jpg"} for image in content["images"]]
    content["annotations"].append({"id": 1, "image_id": 5, "category_id": 2, "bbox": bbox})
    assert len(parse_coco(content, "file").labels) == 1
    evaluator = CocoEvaluator(build_ground_truth(content))
    evaluator.update({5: perfect_detection()})
    result = evaluator.summarize()
    assert result["stats"][:3] == pytest.approx([1, 1, 1])
    assert result["per_class"][0]["objects"] == 1


def test_valid_annotations_are_all_evaluated() -> None:
    """A crowd may have any box: it is not to be detected."""
    for seed in range(6):
        content = random_ground_truth(np.random.RandomState(seed))
        evaluated = build_ground_truth(content)["annotations"]
        assert [(a["bbox"], a["area"]) for a in evaluated] == [
            (a["bbox"], a["area"]) for a in content["annotations"]
        ]
    crowd = one_object(iscrowd=1, bbox=[10, 10, 0, 5])
    assert len(build_ground_truth(crowd)["annotations"]) == 1


def test_errors_name_the_cause() -> None:
    with pytest.raises(ValueError, match="image 9 is not in the annotations"):
        CocoEvaluator(build_ground_truth(one_object())).update({9: perfect_detection()})
    with pytest.raises(UserError, match="evaluator nonsense is unknown"):
        select_backend("nonsense")


def test_auto_selects_an_installed_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        coco_module.importlib.util, "find_spec", lambda name: name == "pycocotools" or None
    )
    coco_module._log_choice.cache_clear()
    with captured_log() as lines:
        assert [select_backend("auto") for _ in range(3)] == ["pycocotools"] * 3
    assert lines == ["COCO metrics: computed by pycocotools"], "logged once"
    with pytest.raises(UserError, match="pip install hotcoco"):
        select_backend("hotcoco")
