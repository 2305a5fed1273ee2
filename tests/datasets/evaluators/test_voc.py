"""VOC's average precision: cases that can be worked out by hand, a plain implementation beside ours, and DETReg's
rounding.

DETReg's own numbers are in `tests/golden_data.py`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.evaluators import detections as detections_module
from datasets.evaluators.per_class import class_table
from datasets.evaluators.voc import IOU_THRESHOLDS, VocEvaluator, ap_11point, ap_area, paired_iou
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations, annotations_from_columns

BOX, FAR = (10.0, 10.0, 30.0, 30.0), (60.0, 60.0, 90.0, 90.0)


def truth(
    *objects: tuple, images: int = 3, classes: tuple[str, ...] = ("cat", "dog")
) -> Annotations:
    """objects: (image id, label, box) or (image id, label, box, difficult)."""
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


def evaluated(annotations: Annotations, *found: tuple, **options) -> VocEvaluator:
    """found: (image id, label, box, score)."""
    evaluator = VocEvaluator(annotations, **options)
    for image in {item[0] for item in found}:
        mine = [item for item in found if item[0] == image]
        evaluator.update(
            {
                image: {
                    "boxes": torch.tensor([item[2] for item in mine], dtype=torch.float64),
                    "labels": torch.tensor([item[1] for item in mine]),
                    "scores": torch.tensor([item[3] for item in mine], dtype=torch.float64),
                }
            }
        )
    return evaluator


def ap50(evaluator: VocEvaluator, metric: str = "area") -> float:
    return evaluator.summarize()[f"voc_{metric}"][1]


def moved(box: tuple, pixels: float) -> tuple:
    return box[0] + pixels, box[1], box[2] + pixels, box[3]


# --------------------------------------------------------------------------------------------------------- hand cases


def test_the_truth_is_perfect_and_nothing_is_zero() -> None:
    annotations = truth((1, 0, BOX), (1, 1, FAR), (2, 0, FAR))
    summary = evaluated(
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
    assert evaluated(annotations).summarize()["stats"] == [0, 0, 0]
    assert evaluated(truth(), (1, 0, BOX, 0.5)).summarize() == {
        "stats": [-1] * 3,
        "voc_11point": [-1] * 3,
        "voc_area": [-1] * 3,
        "per_class": [],
    }


def test_both_metrics_by_hand() -> None:
    """Two cats, found first and third of three: precision 1 up to recall 0.5, 2/3 up to 1."""
    annotations = truth((1, 0, BOX), (2, 0, BOX))
    evaluator = evaluated(annotations, (1, 0, BOX, 0.9), (3, 0, BOX, 0.8), (2, 0, BOX, 0.7))
    assert ap50(evaluator, "area") == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert ap50(evaluator, "11point") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert evaluated(annotations, (1, 0, BOX, 0.9), metric="area").summarize()["stats"][
        1
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(("right", "total"), [(3, 10), (6, 10), (7, 10)])
def test_a_recall_of_exactly_three_tenths_counts(right: int, total: int) -> None:
    """0.1 added up is 0.30000000000000004; DETReg's comparison misses that point."""
    recall, precision = np.arange(1, right + 1) / total, np.ones(right)
    assert ap_11point(recall, precision) == pytest.approx((right + 1) / 11)
    assert ap_11point(recall, precision, published=True) == pytest.approx(right / 11)


def test_a_second_detection_is_wrong() -> None:
    annotations = truth((1, 0, BOX), (2, 0, BOX))
    once, twice = [(1, 0, BOX, 0.9), (2, 0, BOX, 0.7)], (1, 0, moved(BOX, 1), 0.8)
    assert ap50(evaluated(annotations, *once)) == pytest.approx(1)
    assert ap50(evaluated(annotations, *once, twice)) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_difficult_objects_are_neither_missed_nor_found() -> None:
    annotations = truth((1, 0, BOX), (1, 0, FAR, True), (2, 1, BOX, True))
    assert ap50(evaluated(annotations, (1, 0, BOX, 0.5))) == pytest.approx(1), (
        "not found, not missed"
    )
    hits = [(1, 0, FAR, 0.9), (1, 0, moved(FAR, 1), 0.8), (1, 0, BOX, 0.5)]
    assert ap50(evaluated(annotations, *hits)) == pytest.approx(1), (
        "found twice, neither right nor wrong"
    )
    assert [row["id"] for row in evaluated(annotations, *hits).summarize()["per_class"]] == [0], (
        "a class of difficult objects has no AP"
    )
    ordinary = replace(annotations, difficult=None)
    assert ap50(evaluated(ordinary, (1, 0, BOX, 0.5))) == pytest.approx(0.25)


def test_a_detection_belongs_to_the_object_that_it_covers_best() -> None:
    """As in the devkit: it is wrong where that one was found already, though another would be free."""
    near = moved(BOX, 4)
    annotations = truth((1, 0, BOX), (1, 0, near))
    evaluator = evaluated(annotations, (1, 0, BOX, 0.9), (1, 0, moved(BOX, 1), 0.8))
    assert ap50(evaluator) == pytest.approx(0.5)
    assert paired_iou(np.array([moved(BOX, 1)]), np.array([near])) > 0.5


def test_an_overlap_at_the_threshold() -> None:
    """Of 20 x 20 pixels 20 x 10: IoU is 0.5, which is enough; DETReg wants more."""
    annotations, half = truth((1, 0, BOX)), (10.0, 10.0, 30.0, 20.0)
    assert ap50(evaluated(annotations, (1, 0, half, 0.5))) == pytest.approx(1)
    assert ap50(evaluated(annotations, (1, 0, half, 0.5), reproduce_published=True)) == 0


def test_no_rounding_unless_published() -> None:
    """Scores that differ in the fourth decimal keep their order; DETReg's text makes them equal."""
    annotations = truth((1, 0, BOX))
    found = [(1, 0, FAR, 0.9001), (1, 0, BOX, 0.9004)]
    assert ap50(evaluated(annotations, *found)) == pytest.approx(1)
    assert ap50(evaluated(annotations, *found, reproduce_published=True)) == pytest.approx(0.5)
    evaluator = evaluated(
        annotations, (1, 0, (10.04, 10.06, 30.04, 30.06), 0.12345), reproduce_published=True
    )
    assert evaluator._comparable_rows()[0, 1:6].tolist() == pytest.approx(
        [10.0, 10.1, 30.0, 30.1, 0.123]
    )
    assert evaluator.rows()[0, 1:6].tolist() == [10.04, 10.06, 30.04, 30.06, 0.12345]


# --------------------------------------------------------------------------------------------------------- properties


def random_case(seed: int) -> tuple[Annotations, list[tuple]]:
    rng = np.random.RandomState(seed)

    def box() -> np.ndarray:
        low = rng.randint(0, 40, 2)
        return np.concatenate([low, low + rng.randint(5, 40, 2)]).astype(float)

    objects = [
        (rng.randint(1, 6), rng.randint(2), tuple(box()), rng.rand() < 0.2)
        for _ in range(rng.randint(0, 25))
    ]
    found = []
    for _ in range(60):
        image, label, place = rng.randint(1, 6), rng.randint(2), box()
        if objects and rng.rand() < 0.8:
            image, label, near, _ = objects[rng.randint(len(objects))]
            place = np.array(near) + rng.randn(4) * rng.choice([0, 1, 4])
            place[2:] = np.maximum(place[2:], place[:2])
        found.append((image, label, tuple(place), round(rng.rand(), 3)))
    return truth(*objects, images=5), found


def plainly(
    objects: list[tuple], found: list[tuple], threshold: float
) -> tuple[list[float], list[float]]:
    """Recall and precision as the devkit goes through detections, one by one. objects: (image, box, difficult) of one
    class.
    """
    taken, right, wrong, recall, precision = set(), 0, 0, [], []
    total = sum(not difficult for *_, difficult in objects)
    for image, _, box, _ in sorted(found, key=lambda item: -item[3]):
        overlaps = [
            float(paired_iou(np.array([box]), np.array([other]))[0]) if where == image else -1.0
            for where, other, _ in objects
        ]
        best = int(np.argmax(overlaps)) if overlaps else None
        if best is not None and overlaps[best] >= threshold:
            if not objects[best][2]:
                right, wrong = right + (best not in taken), wrong + (best in taken)
                taken.add(best)
        else:
            wrong += 1
        recall.append(right / total)
        precision.append(right / max(right + wrong, 1))
    return recall, precision


@pytest.mark.parametrize("seed", range(12))
def test_equals_a_plain_implementation(seed: int) -> None:
    annotations, found = random_case(seed)
    found.sort(key=lambda item: item[0])  # equal scores count in the order of the images
    tables = evaluated(annotations, *found).ap_tables()
    image_indices = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    for label in (0, 1):
        mine = np.flatnonzero(annotations.labels == label)
        objects = [
            (
                image_indices[i],
                annotations.boxes_xyxy_abs[i].astype(float),
                annotations.difficult[i],
            )
            for i in mine
        ]
        assert (label in tables) == any(not difficult for *_, difficult in objects)
        for k, threshold in enumerate(IOU_THRESHOLDS) if label in tables else ():
            recall, precision = plainly(
                objects, [item for item in found if item[1] == label], threshold
            )
            points = [
                max((p for p, r in zip(precision, recall, strict=True) if r >= k / 10), default=0.0)
                for k in range(11)
            ]
            assert tables[label]["11point"][k] == pytest.approx(np.mean(points), abs=1e-12)
            steps = np.diff([0.0, *recall])
            assert tables[label]["area"][k] == pytest.approx(
                sum(s * max(precision[i:]) for i, s in enumerate(steps)), abs=1e-12
            )


def test_ap_falls_with_the_threshold_and_lies_between_0_and_1() -> None:
    for seed in range(5):
        annotations, found = random_case(100 + seed)
        for table in evaluated(annotations, *found).ap_tables().values():
            for values in table.values():
                assert (np.diff(values) <= 1e-12).all()
                assert values.min() >= 0
                assert values.max() <= 1
    assert ap_area(np.zeros(0), np.zeros(0)) == ap_11point(np.zeros(0), np.zeros(0)) == 0


def test_several_processes_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an image comes to two of them."""
    annotations, found = random_case(3)
    single = evaluated(annotations, *found).summarize()
    parts = [
        evaluated(annotations, *[item for item in found if item[0] in images])
        for images in ((1, 3, 5), (2, 3, 4))
    ]
    monkeypatch.setattr(
        detections_module, "all_gather_object", lambda mine: [part._detections for part in parts]
    )
    for part in parts:
        part.synchronize_between_processes()
    assert [part.summarize() for part in parts] == [single, single]


def test_results_are_cocos_results() -> None:
    (result,) = evaluated(truth((1, 0, BOX)), (1, 0, BOX, 0.25)).results()
    assert result == {"image_id": 1, "category_id": 0, "bbox": [10, 10, 20, 20], "score": 0.25}
    with pytest.raises(ValueError, match="image 9"):
        evaluated(truth(), (9, 0, BOX, 0.5))


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_table_has_ids_and_names_together() -> None:
    def row(number: int, ap: float) -> dict:
        return {
            "id": number,
            "name": f"kind {number}",
            "objects": 10 * number,
            "AP": ap,
            "AP50": ap,
            "AP75": ap,
        }

    few = class_table([row(1, 0.25), row(7, 0.5), row(40, 1.0)]).splitlines()
    assert few[0] == "AP, AP50 and objects of each class:"
    assert few[1].split()[:12] == [
        "1",
        "kind",
        "1",
        "0.250",
        "0.250",
        "10",
        "7",
        "kind",
        "7",
        "0.500",
        "0.500",
        "70",
    ]
    coco = class_table([row(i, 0.5) for i in range(1, 81)]).splitlines()
    assert len(coco) == 1 + 27, "all of COCO's classes, three a line"
    assert max(map(len, coco)) <= 140
    assert coco[27].split()[:3] == ["79", "kind", "79"]
    many = class_table([row(i, (i * 7 % 140) / 140) for i in range(1, 141)])
    assert "kind 59 " in many, "the first of the best, 133 / 140"
    assert "kind 140 " in many, "the worst, 0"
    assert len(many.splitlines()) == 5
    assert class_table([]) == "no class has objects"
