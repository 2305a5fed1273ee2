"""COCO metrics of masks: each backend against pycocotools, called directly."""

import contextlib
import copy
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.evaluators import detections as detections_module
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, GroundTruth, build_ground_truth
from datasets.evaluators.per_class import class_table
from util.masks import RLE, encode_masks


def random_mask(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """An empty mask, a rectangle, scattered pixels or a polygon; bool [H, W]."""
    mask = np.zeros((height, width), bool)
    kind = rng.randint(4)
    if kind == 1:
        y, x = rng.randint(height), rng.randint(width)
        mask[y : y + rng.randint(1, height + 1), x : x + rng.randint(1, width + 1)] = True
    elif kind == 2:
        mask = rng.rand(height, width) < rng.rand()
    elif kind == 3:
        polygon = np.stack([rng.rand(6) * width, rng.rand(6) * height], axis=1)
        (rle,) = coco_mask.frPyObjects([polygon.ravel().tolist()], height, width)
        mask = coco_mask.decode(rle).astype(bool)
    return mask


def shift(rng: np.random.RandomState, mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, rng.randint(-3, 4, 2), (0, 1))


def box_of(rle: RLE) -> list[float]:
    return coco_mask.toBbox(rle).tolist()


def random_case(rng: np.random.RandomState) -> tuple[GroundTruth, list[dict]]:
    """Return (ground truth, detections): with crowds, equal scores and more than 100 detections per image.

    Areas of the ground truth are those of the masks, or half of them.
    """
    classes = sorted(rng.choice(np.arange(1, 30), rng.randint(1, 5), replace=False).tolist())
    images = [
        {"id": int(i), "height": int(rng.randint(20, 130)), "width": int(rng.randint(20, 130))}
        for i in rng.choice(10**6, rng.randint(1, 6), replace=False)
    ]
    annotations, results = [], []
    for image in images:
        size = (image["height"], image["width"])
        objects = [
            (random_mask(rng, *size), int(rng.choice(classes)))
            for _ in range(rng.choice([0, 1, 3, 12]))
        ]
        rles = encode_masks(np.array([mask for mask, _ in objects], bool).reshape(-1, *size))
        for (_, label), rle in zip(objects, rles, strict=True):
            annotations.append(
                {
                    "image_id": image["id"],
                    "category_id": label,
                    "bbox": box_of(rle),
                    "iscrowd": int(rng.rand() < 0.2),
                    "area": float(coco_mask.area(rle)) * rng.choice([1, 0.5]),
                    "segmentation": rle,
                }
            )
        for _ in range(rng.choice([0, 1, 5, 30, 130])):
            mask, label = random_mask(rng, *size), int(rng.choice(classes))
            if objects and rng.rand() < 0.6:
                mask, label = objects[rng.randint(len(objects))]
                mask = shift(rng, mask)
            (rle,) = encode_masks(mask[None])
            result = {"image_id": image["id"], "category_id": label, "bbox": box_of(rle)}
            results.append({**result, "score": round(rng.rand(), 2), "segmentation": rle})
    return complete_ground_truth(images, annotations, classes), results


def complete_ground_truth(
    images: list[dict], annotations: list[dict], classes: list[int]
) -> GroundTruth:
    categories = [{"id": i, "name": str(i)} for i in classes]
    content = {"images": images, "annotations": [], "categories": categories}
    ground_truth = build_ground_truth(content)
    # An empty mask has no box, which `build_ground_truth` would skip; pycocotools itself counts it.
    ground_truth["annotations"] = [{**a, "id": i} for i, a in enumerate(annotations, start=1)]
    return ground_truth


def predictions_of(results: list[dict]) -> dict[int, dict]:
    predictions = {}
    for image_id in {result["image_id"] for result in results}:
        rows = [result for result in results if result["image_id"] == image_id]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image_id] = {
            "boxes": boxes,
            "scores": torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            "labels": torch.tensor([row["category_id"] for row in rows]),
            "masks": [row["segmentation"] for row in rows],
        }
    return predictions


def pycocotools_stats(ground_truth: GroundTruth, results: list[dict]) -> tuple[list, np.ndarray]:
    """Return (stats, precision) of pycocotools alone, for results without boxes, as DETR passes them."""
    coco = COCO()
    coco.dataset = copy.deepcopy(dict(ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        masks = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        evaluation = COCOeval(coco, coco.loadRes(masks), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), evaluation.eval["precision"]


def evaluate(ground_truth: GroundTruth, results: list[dict], backend: str, masks: bool) -> dict:
    evaluator = CocoEvaluator(ground_truth, backend, masks=masks)
    evaluator.update(predictions_of(results))
    return evaluator.summarize()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_equal_pycocotools(backend: str) -> None:
    pytest.importorskip(backend)
    for seed in range(20):
        ground_truth, results = random_case(np.random.RandomState(seed))
        if not results:
            continue
        before = copy.deepcopy(ground_truth)
        summary = evaluate(ground_truth, results, backend, masks=True)
        assert ground_truth == before, "evaluators share the ground truth"
        stats, precision = pycocotools_stats(ground_truth, results)
        np.testing.assert_allclose(
            summary["stats_masks"], stats, rtol=0, atol=1e-12, err_msg=f"seed {seed}"
        )
        rows = {row["id"]: row for row in summary["per_class"]}
        for k, category in enumerate(ground_truth["categories"]):
            curve = precision[:, :, k, 0, 2]  # [10, 101]
            assert (category["id"] in rows) == (curve > -1).any()
            if category["id"] in rows:
                row = rows[category["id"]]
                assert row["mask AP"] == pytest.approx(curve.mean())
                assert row["mask AP50"] == pytest.approx(curve[0].mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_boxes_do_not_change(backend: str) -> None:
    pytest.importorskip(backend)
    for seed in range(6):
        ground_truth, results = random_case(np.random.RandomState(seed))
        plain = evaluate(ground_truth, results, backend, masks=False)
        summary = evaluate(ground_truth, results, backend, masks=True)
        assert summary["stats"] == plain["stats"]
        per_class = [
            {name: value for name, value in row.items() if not name.startswith("mask")}
            for row in summary["per_class"]
        ]
        assert per_class == plain["per_class"]
        assert plain.keys() == {"stats", "per_class"}


def half_covered() -> GroundTruth:
    """One object, the left half of an image of 40 x 60 pixels, and an image without objects."""
    mask = np.zeros((1, 40, 60), bool)
    mask[:, :, :30] = True
    (rle,) = encode_masks(mask)
    annotation = {"image_id": 5, "category_id": 2, "bbox": [0, 0, 30, 40], "area": 1200.0}
    images = [{"id": i, "height": 40, "width": 60} for i in (5, 6)]
    return complete_ground_truth(
        images, [{**annotation, "iscrowd": 0, "segmentation": rle}], classes=[2, 4]
    )


def detections(columns: list[int], labels: list[int]) -> dict:
    """Detections with the box of the object, and masks of that many columns from the left; scores descend."""
    masks = np.zeros((len(columns), 40, 60), bool)
    for mask, width in zip(masks, columns, strict=True):
        mask[:, :width] = True
    return {
        "boxes": torch.tensor([[0.0, 0, 30, 40]] * len(columns)).reshape(-1, 4),
        "scores": torch.arange(len(columns), 0, -1) / 10,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": encode_masks(masks),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_and_masks_are_compared_apart(backend: str) -> None:
    """An IoU of 24 / 30 = 0.8 passes 7 of 10 thresholds, 0.5 to 0.8."""
    pytest.importorskip(backend)
    evaluator = CocoEvaluator(half_covered(), backend, masks=True)
    evaluator.update({5: detections([24], [2])})
    summary = evaluator.summarize()
    assert summary["stats"][:3] == pytest.approx([1, 1, 1])
    assert summary["stats_masks"][:3] == pytest.approx([0.7, 1, 1])
    assert summary["stats_masks"][3:6] == pytest.approx([-1, 0.7, -1])
    (row,) = summary["per_class"]
    assert (row["AP"], row["mask AP"], row["mask AP50"]) == pytest.approx((1, 0.7, 1))
    assert "AP, AP50, mask AP and objects of each class:" in class_table([row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_of_a_detection_is_that_of_its_mask(backend: str) -> None:
    """A wrong detection outside of the area range is ignored: its mask is small, its box medium."""
    pytest.importorskip(backend)
    evaluator = CocoEvaluator(half_covered(), backend, masks=True)
    evaluator.update({5: detections([2, 30], [2, 2])})
    stats = evaluator.summarize()["stats_masks"]
    assert stats[0] == pytest.approx(0.5)
    assert stats[4] == pytest.approx(1), "medium"


def test_masks_go_with_detections_whose_label_has_no_category() -> None:
    evaluator = CocoEvaluator(half_covered(), category_ids={0: 4, 1: 2}, masks=True)
    evaluator.update({5: detections([3, 30, 7], [9, 1, 0])})
    kept = [(r["category_id"], r["segmentation"]) for r in evaluator.results()]
    expected = [
        {**rle, "counts": rle["counts"].decode()} for rle in detections([30, 7], [1, 0])["masks"]
    ]
    assert kept == list(zip([2, 4], expected, strict=True))
    assert evaluator.summarize()["stats_masks"][0] == pytest.approx(1)


def test_masks_of_unlisted_classes_are_not_evaluated() -> None:
    evaluator = CocoEvaluator(half_covered(), masks=True)
    evaluator.update({5: detections([3, 30], [77, 2])})
    assert evaluator.summarize()["stats_masks"][0] == pytest.approx(1)
    assert len(evaluator.results()) == 2


def test_results_in_coco_format() -> None:
    evaluator = CocoEvaluator(half_covered(), masks=True)
    prediction = detections([30], [2])
    counts = prediction["masks"][0]["counts"].decode()
    for given in (prediction["masks"], [{"size": [40, 60], "counts": counts}]):
        evaluator.update({5: {**prediction, "masks": given}})
        (result,) = evaluator.results()
        assert result["segmentation"] == {"size": [40, 60], "counts": counts}
        assert result["bbox"] == [0, 0, 30, 40]


def test_without_detections_metrics_are_0_where_there_is_ground_truth() -> None:
    none = {**detections([], []), "masks": None}
    for predictions in ({}, {5: none}, {6: detections([3], [77])}):
        evaluator = CocoEvaluator(half_covered(), masks=True)
        evaluator.update(predictions)
        summary = evaluator.summarize()
        assert summary["stats_masks"] == summary["stats"] == [0, 0, 0, -1, 0, -1] * 2
        (row,) = summary["per_class"]
        assert row["mask AP"] == row["mask AP50"] == 0


def test_image_seen_by_two_ranks_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = CocoEvaluator(half_covered(), masks=True)
    evaluator.update({6: detections([5, 4], [2, 2])})
    other = CocoEvaluator(half_covered(), masks=True)
    other.update({5: detections([24], [2]), 6: detections([5, 4], [2, 2])})
    theirs = iter([other._detections, other._masks])
    monkeypatch.setattr(detections_module, "all_gather_object", lambda mine: [mine, next(theirs)])
    evaluator.synchronize_between_processes()
    assert evaluator.results() == other.results()
    assert evaluator.summarize() == other.summarize()


def test_errors_name_the_image() -> None:
    evaluator = CocoEvaluator(half_covered(), masks=True)
    prediction = detections([30], [2])
    for masks in ([], None, prediction["masks"] * 2):
        with pytest.raises(ValueError, match=r"image 5 has \d masks for 1 detections"):
            evaluator.update({5: {**prediction, "masks": masks}})
    rotated = encode_masks(np.ones((1, 60, 40), bool))
    with pytest.raises(ValueError, match=r"image 5 has a predicted mask of .* \(60, 40\)"):
        evaluator.update({5: {**prediction, "masks": rotated}})
