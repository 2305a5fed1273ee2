"""VOC average precision: cases computed by hand, a plain implementation to compare with, and DETReg's rounding.

`tests/golden_data.py` compares with values of DETReg's own code.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.evaluators import detections as detections_module
from datasets.evaluators.per_class import class_table
from datasets.evaluators.voc import IOU_THRESHOLDS, VocEvaluator, ap_11point, ap_area, paired_iou
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.object_filter import annotations_from_columns

BOX, FAR = (10.0, 10.0, 30.0, 30.0), (60.0, 60.0, 90.0, 90.0)


def ground_truth(
    *objects: tuple, images: int = 3, classes: tuple[str, ...] = ("cat", "dog")
) -> Annotations:
    """Build annotations. objects: (image id, label, box) or (image id, label, box, difficult)."""
    padded = [(*item, False)[:4] for item in objects]
    columns = {
        "id": np.arange(len(padded)),
        "image": np.array([i for i, *_ in padded], np.int64),
        "crowd": np.zeros(len(padded), bool),
        "label": np.array([label for _, label, *_ in padded], np.int64),
        "area": np.ones(len(padded), np.float32),
        "box": np.array([box for _, _, box, _ in padded], np.float32).reshape(-1, 4),
        "difficult": np.array([item[3] for item in padded], bool),
    }
    ids = np.arange(1, images + 1)
    return annotations_from_columns(
        columns,
        source="synthetic",
        file_names=PackedStrings(f"{i}.jpg" for i in ids),
        image_ids=ids,
        sizes_hw=np.zeros((images, 2), int),
        class_names=dict(enumerate(classes)),
    )


def evaluate(annotations: Annotations, *detections: tuple, **options) -> VocEvaluator:
    """Return an evaluator with detections (image id, label, box, score)."""
    evaluator = VocEvaluator(annotations, **options)
    for image_id in {detection[0] for detection in detections}:
        rows = [detection for detection in detections if detection[0] == image_id]
        evaluator.update(
            {
                image_id: {
                    "boxes": torch.tensor([row[2] for row in rows], dtype=torch.float64),
                    "labels": torch.tensor([row[1] for row in rows]),
                    "scores": torch.tensor([row[3] for row in rows], dtype=torch.float64),
                }
            }
        )
    return evaluator


def ap50(evaluator: VocEvaluator, metric: str = "area") -> float:
    return evaluator.summarize()[f"voc_{metric}"][1]


def shift_x(box: tuple, pixels: float) -> tuple:
    return box[0] + pixels, box[1], box[2] + pixels, box[3]


# --------------------------------------------------------------------------------------------------------- hand cases


def test_perfect_detections_no_detections_and_no_ground_truth() -> None:
    annotations = ground_truth((1, 0, BOX), (1, 1, FAR), (2, 0, FAR))
    summary = evaluate(
        annotations, (1, 0, BOX, 0.5), (1, 1, FAR, 0.1), (2, 0, FAR, 0.9)
    ).summarize()
    assert (
        summary["stats"]
        == summary["voc_11point"]
        == summary["voc_area"]
        == pytest.approx([1, 1, 1])
    )
    assert [(row["id"], row["name"], row["objects"]) for row in summary["per_class"]] == [
        (0, "cat", 2),
        (1, "dog", 1),
    ]
    assert evaluate(annotations).summarize()["stats"] == [0, 0, 0]
    assert evaluate(ground_truth(), (1, 0, BOX, 0.5)).summarize() == {
        "stats": [-1] * 3,
        "voc_11point": [-1] * 3,
        "voc_area": [-1] * 3,
        "per_class": [],
    }


def test_both_metrics_by_hand() -> None:
    """Two cats, detected by the first and third of three boxes: precision 1 up to recall 0.5, then 2/3 up to 1."""
    annotations = ground_truth((1, 0, BOX), (2, 0, BOX))
    evaluator = evaluate(annotations, (1, 0, BOX, 0.9), (3, 0, BOX, 0.8), (2, 0, BOX, 0.7))
    assert ap50(evaluator, "area") == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert ap50(evaluator, "11point") == pytest.approx((6 + 5 * 2 / 3) / 11)
    summary = evaluate(annotations, (1, 0, BOX, 0.9), metric="area").summarize()
    assert summary["stats"][1] == pytest.approx(0.5)


@pytest.mark.parametrize(("correct", "total"), [(3, 10), (6, 10), (7, 10)])
def test_recall_of_exactly_three_tenths_counts(correct: int, total: int) -> None:
    """DETReg compares with 0.30000000000000004, and so misses that point."""
    recall, precision = np.arange(1, correct + 1) / total, np.ones(correct)
    assert ap_11point(recall, precision) == pytest.approx((correct + 1) / 11)
    assert ap_11point(recall, precision, published=True) == pytest.approx(correct / 11)


def test_second_detection_is_a_false_positive() -> None:
    annotations = ground_truth((1, 0, BOX), (2, 0, BOX))
    detections = [(1, 0, BOX, 0.9), (2, 0, BOX, 0.7)]
    second = (1, 0, shift_x(BOX, 1), 0.8)
    assert ap50(evaluate(annotations, *detections)) == pytest.approx(1)
    assert ap50(evaluate(annotations, *detections, second)) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_difficult_objects_are_ignored() -> None:
    annotations = ground_truth((1, 0, BOX), (1, 0, FAR, True), (2, 1, BOX, True))
    undetected = evaluate(annotations, (1, 0, BOX, 0.5))
    assert ap50(undetected) == pytest.approx(1), "not missed"
    twice = evaluate(annotations, (1, 0, FAR, 0.9), (1, 0, shift_x(FAR, 1), 0.8), (1, 0, BOX, 0.5))
    assert ap50(twice) == pytest.approx(1), "neither true nor false positives"
    assert [row["id"] for row in twice.summarize()["per_class"]] == [0], (
        "a class with only difficult objects has no AP"
    )
    ordinary = replace(annotations, difficult=None)
    assert ap50(evaluate(ordinary, (1, 0, BOX, 0.5))) == pytest.approx(0.25)


def test_detection_belongs_to_the_object_with_the_largest_iou() -> None:
    """As in the devkit: if that object is detected already, it is a false positive, even if another one is free."""
    near = shift_x(BOX, 4)
    annotations = ground_truth((1, 0, BOX), (1, 0, near))
    evaluator = evaluate(annotations, (1, 0, BOX, 0.9), (1, 0, shift_x(BOX, 1), 0.8))
    assert ap50(evaluator) == pytest.approx(0.5)
    assert paired_iou(np.array([shift_x(BOX, 1)]), np.array([near])) > 0.5


def test_iou_at_the_threshold() -> None:
    """20 x 10 of 20 x 20 pixels: an IoU of 0.5 is enough here; DETReg requires more."""
    annotations, half = ground_truth((1, 0, BOX)), (10.0, 10.0, 30.0, 20.0)
    assert ap50(evaluate(annotations, (1, 0, half, 0.5))) == pytest.approx(1)
    assert ap50(evaluate(annotations, (1, 0, half, 0.5), reproduce_published=True)) == 0


def test_rounding_only_with_reproduce_published() -> None:
    """Scores that differ in the fourth decimal keep their order. In DETReg's text files they are equal."""
    annotations = ground_truth((1, 0, BOX))
    detections = [(1, 0, FAR, 0.9001), (1, 0, BOX, 0.9004)]
    assert ap50(evaluate(annotations, *detections)) == pytest.approx(1)
    assert ap50(evaluate(annotations, *detections, reproduce_published=True)) == pytest.approx(0.5)
    evaluator = evaluate(
        annotations, (1, 0, (10.04, 10.06, 30.04, 30.06), 0.12345), reproduce_published=True
    )
    assert evaluator._comparable_rows()[0, 1:6].tolist() == pytest.approx(
        [10.0, 10.1, 30.0, 30.1, 0.123]
    )
    assert evaluator.rows()[0, 1:6].tolist() == [10.04, 10.06, 30.04, 30.06, 0.12345]


# --------------------------------------------------------------------------------------------------------- properties


def random_case(seed: int) -> tuple[Annotations, list[tuple]]:
    """Return random (annotations, detections), most of them near an object."""
    rng = np.random.RandomState(seed)

    def box() -> np.ndarray:
        low = rng.randint(0, 40, 2)
        return np.concatenate([low, low + rng.randint(5, 40, 2)]).astype(float)

    objects = [
        (rng.randint(1, 6), rng.randint(2), tuple(box()), rng.rand() < 0.2)
        for _ in range(rng.randint(0, 25))
    ]
    detections = []
    for _ in range(60):
        image, label, detected = rng.randint(1, 6), rng.randint(2), box()
        if objects and rng.rand() < 0.8:
            image, label, near, _ = objects[rng.randint(len(objects))]
            detected = np.array(near) + rng.randn(4) * rng.choice([0, 1, 4])
            detected[2:] = np.maximum(detected[2:], detected[:2])
        detections.append((image, label, tuple(detected), round(rng.rand(), 3)))
    return ground_truth(*objects, images=5), detections


def plain_precision_recall(
    objects: list[tuple], detections: list[tuple], threshold: float
) -> tuple[list[float], list[float]]:
    """Return (recall, precision) of one class, going through the detections one by one like the devkit.

    objects: (image id, box, difficult).
    """
    detected: set[int] = set()
    true_positives, false_positives = 0, 0
    recall, precision = [], []
    total = sum(not difficult for *_, difficult in objects)
    for image, _, box, _ in sorted(detections, key=lambda detection: -detection[3]):
        overlaps = [
            float(paired_iou(np.array([box]), np.array([other]))[0]) if where == image else -1.0
            for where, other, _ in objects
        ]
        best = int(np.argmax(overlaps)) if overlaps else None
        if best is not None and overlaps[best] >= threshold:
            if not objects[best][2]:
                true_positives += best not in detected
                false_positives += best in detected
                detected.add(best)
        else:
            false_positives += 1
        recall.append(true_positives / total)
        precision.append(true_positives / max(true_positives + false_positives, 1))
    return recall, precision


@pytest.mark.parametrize("seed", range(12))
def test_equals_plain_implementation(seed: int) -> None:
    annotations, detections = random_case(seed)
    detections.sort(key=lambda detection: detection[0])  # ties count in the order of the images
    tables = evaluate(annotations, *detections).ap_tables()
    image_ids = annotations.image_ids[annotations.image_indices]
    boxes = annotations.boxes_xyxy_abs.astype(float)
    for label in (0, 1):
        objects = [
            (image_ids[i], boxes[i], annotations.difficult[i])
            for i in np.flatnonzero(annotations.labels == label)
        ]
        assert (label in tables) == any(not difficult for *_, difficult in objects)
        if label not in tables:
            continue
        of_class = [detection for detection in detections if detection[1] == label]
        for k, threshold in enumerate(IOU_THRESHOLDS):
            recall, precision = plain_precision_recall(objects, of_class, threshold)
            points = [
                max((p for p, r in zip(precision, recall, strict=True) if r >= i / 10), default=0.0)
                for i in range(11)
            ]
            assert tables[label]["11point"][k] == pytest.approx(np.mean(points), abs=1e-12)
            steps = np.diff([0.0, *recall])
            expected = sum(step * max(precision[i:]) for i, step in enumerate(steps))
            assert tables[label]["area"][k] == pytest.approx(expected, abs=1e-12)


def test_ap_decreases_with_the_threshold_and_is_between_0_and_1() -> None:
    for seed in range(5):
        annotations, detections = random_case(100 + seed)
        for table in evaluate(annotations, *detections).ap_tables().values():
            for values in table.values():
                assert (np.diff(values) <= 1e-12).all()
                assert values.min() >= 0
                assert values.max() <= 1
    assert ap_area(np.zeros(0), np.zeros(0)) == ap_11point(np.zeros(0), np.zeros(0)) == 0


def test_two_ranks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks see image 3."""
    annotations, detections = random_case(3)
    single = evaluate(annotations, *detections).summarize()
    ranks = [
        evaluate(annotations, *[detection for detection in detections if detection[0] in images])
        for images in ((1, 3, 5), (2, 3, 4))
    ]
    gathered = [rank._detections for rank in ranks]
    monkeypatch.setattr(detections_module, "all_gather_object", lambda mine: gathered)
    for rank in ranks:
        rank.synchronize_between_processes()
    assert [rank.summarize() for rank in ranks] == [single, single]


def test_results_in_coco_format() -> None:
    (result,) = evaluate(ground_truth((1, 0, BOX)), (1, 0, BOX, 0.25)).results()
    assert result == {"image_id": 1, "category_id": 0, "bbox": [10, 10, 20, 20], "score": 0.25}
    with pytest.raises(ValueError, match="image 9"):
        evaluate(ground_truth(), (9, 0, BOX, 0.5))


# ---------------------------------------------------------------------------------------------------------- the table


def test_class_table() -> None:
    def row(category_id: int, ap: float) -> dict:
        return {
            "id": category_id,
            "name": f"kind {category_id}",
            "objects": 10 * category_id,
            "AP": ap,
            "AP50": ap,
            "AP75": ap,
        }

    few = class_table([row(1, 0.25), row(7, 0.5), row(40, 1.0)]).splitlines()
    assert few[0] == "AP, AP50 and objects of each class:"
    assert few[1].split()[:6] == ["1", "kind", "1", "0.250", "0.250", "10"]
    assert few[1].split()[6:12] == ["7", "kind", "7", "0.500", "0.500", "70"]
    coco = class_table([row(i, 0.5) for i in range(1, 81)]).splitlines()
    assert len(coco) == 1 + 27, "all 80 classes of COCO, three per line"
    assert max(map(len, coco)) <= 140
    assert coco[27].split()[:3] == ["79", "kind", "79"]
    many = class_table([row(i, (i * 7 % 140) / 140) for i in range(1, 141)])
    assert "kind 59 " in many, "one of the best: 133 / 140"
    assert "kind 140 " in many, "one of the worst: 0"
    assert len(many.splitlines()) == 5
    assert class_table([]) == "no class has objects"
