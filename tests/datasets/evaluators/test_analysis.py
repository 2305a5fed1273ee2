"""What is found, confused and missed, by hand and compared with COCO's AP."""

from typing import Any

import numpy as np
import pytest
import torch

from datasets.evaluators.analysis import analyse
from datasets.evaluators.coco import CocoEvaluator, build_ground_truth

CAT, DOG = 3, 7
BOXES = {"a": [0, 0, 10, 10], "b": [50, 50, 20, 20], "c": [20, 0, 10, 10]}  # x, y, width, height


def ground_truth(*objects: tuple[int, str, int, int], images: int = 3) -> dict[str, Any]:
    """objects: (image, key of BOXES, category, iscrowd)."""
    annotations = [
        {
            "id": number,
            "image_id": image,
            "bbox": BOXES[box],
            "category_id": category,
            "area": BOXES[box][2] * BOXES[box][3],
            "iscrowd": crowd,
        }
        for number, (image, box, category, crowd) in enumerate(objects, start=1)
    ]
    return build_ground_truth(
        {
            "images": [{"id": i, "width": 100, "height": 100} for i in range(1, images + 1)],
            "annotations": annotations,
            "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        }
    )


def row(image: int, box: str, score: float, category: int) -> list[float]:
    x, y, w, h = BOXES[box]
    return [image, x, y, x + w, y + h, score, category]


def test_confusions_and_image_scores() -> None:
    truth = ground_truth((1, "a", CAT, 0), (1, "b", DOG, 0), (2, "a", CAT, 0), (2, "b", CAT, 1))
    rows = np.array(
        [
            row(1, "a", 0.9, CAT),  # right
            row(1, "b", 0.8, CAT),  # a dog
            row(2, "a", 0.7, CAT),  # right
            row(2, "a", 0.6, CAT),  # a second detection of the same cat
            row(2, "b", 0.65, CAT),  # on a crowd of cats: ignored
            row(3, "c", 0.3, DOG),  # nothing there, and below the threshold
        ]
    )
    result = analyse(rows, truth)
    assert result.threshold == 0.7
    assert (result.precision, result.recall) == (2 / 3, 2 / 3)
    assert result.confusions == {(CAT, CAT): 2, (DOG, CAT): 1}
    scores = {i.image_id: (i.found, i.wrong, i.missed) for i in result.images}
    assert scores == {1: (1, 1, 1), 2: (1, 0, 0)}
    best, worst = result.best_and_worst(1)
    assert [image.image_id for image in (*best, *worst)] == [2, 1]
    assert result.images[0].f1 == 0.5
    assert result.best_and_worst(5)[1] == [], "no image is in both lists"


def test_an_object_that_is_missed_and_a_detection_of_nothing() -> None:
    truth = ground_truth((1, "a", CAT, 0), (2, "a", DOG, 0))
    rows = np.array([row(1, "a", 0.5, CAT), row(1, "c", 0.9, DOG)])
    result = analyse(rows, truth)
    assert result.confusions == {(CAT, CAT): 1, (None, DOG): 1, (DOG, None): 1}
    assert sorted(result.as_dict()["confusions"], key=lambda pair: pair[0] or 0) == [
        [None, DOG, 1],
        [CAT, CAT, 1],
        [DOG, None, 1],
    ]


def test_detections_of_one_score_are_kept_or_left_out_together() -> None:
    truth = ground_truth((1, "a", CAT, 0), (1, "b", CAT, 0))
    rows = np.array(
        [
            row(1, "b", 0.9, CAT),  # right
            row(1, "a", 0.5, CAT),  # right
            row(1, "c", 0.5, CAT),  # wrong, and no threshold is between it and the one above
        ]
    )
    result = analyse(rows, truth)
    assert (result.threshold, result.precision, result.recall) == (0.5, 2 / 3, 1.0)
    assert result.confusions == {(CAT, CAT): 2, (None, CAT): 1}


@pytest.mark.parametrize("rows", [np.zeros((0, 7)), np.array([row(1, "c", 0.9, CAT)])])
def test_without_a_right_detection(rows: np.ndarray) -> None:
    result = analyse(rows, ground_truth((1, "a", CAT, 0)))
    assert (result.threshold, result.precision, result.recall) == (0.5, 0, 0)
    assert result.confusions[CAT, None] == 1
    assert result.best_and_worst(4)[0] == []
    assert analyse(rows, ground_truth()).curves == {0.5: {}, 0.75: {}}


def test_average_precision_of_the_curves_is_that_of_coco() -> None:
    """Exactly, on random detections with crowds."""
    rng = np.random.default_rng(0)
    objects, rows = [], []
    for image in range(1, 41):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = *rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)
            category = int(rng.choice([CAT, DOG]))
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "bbox": [x, y, w, h],
                    "category_id": category,
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
            for _ in range(rng.integers(0, 4)):
                x1, y1, x2, y2 = np.array([x, y, x + w, y + h]) + rng.normal(0, 1, 4)
                rows.append([image, x1, y1, x2, y2, rng.random(), category])
    truth = build_ground_truth({**ground_truth(images=40), "annotations": objects})
    rows = np.array(rows)
    evaluator = CocoEvaluator(truth, "pycocotools")
    for image in range(1, 41):
        own = torch.tensor(rows[rows[:, 0] == image])
        found = {"boxes": own[:, 1:5], "scores": own[:, 5], "labels": own[:, 6].long()}
        evaluator.update({image: found})
    result = analyse(evaluator.rows(), truth)
    for per_class in evaluator.summarize()["per_class"]:
        for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            assert result.curves[threshold][per_class["id"]].mean() == pytest.approx(
                per_class[name], abs=1e-12
            )
