"""Error types: each definition, agreement with pycocotools, and what the types cost in AP50."""

from typing import Any

import numpy as np
import pytest
import torch

from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from datasets.evaluators.error_types import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    ERROR_TYPES,
    IGNORED,
    LOCALISATION,
    MISSED,
    ErrorEvaluator,
    classify,
)

CAT, DOG = 1, 2


def ground_truth(objects: list[tuple], images: int = 1) -> dict[str, Any]:
    """Return a COCO file. objects: (image id, category id, box x y w h), and perhaps 1 for a crowd."""
    return build_ground_truth(
        {
            "images": [{"id": i + 1, "width": 100, "height": 100} for i in range(images)],
            "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(map(float, box)),
                    "area": float(box[2] * box[3]),
                    "iscrowd": crowd[0] if crowd else 0,
                }
                for i, (image_id, category_id, box, *crowd) in enumerate(objects)
            ],
        }
    )


def rows(*detections: tuple) -> np.ndarray:
    """Return detections (image id, category id, score, box x y w h) as rows of an evaluator."""
    return np.array(
        [
            (image_id, x, y, x + w, y + h, score, category_id)
            for image_id, category_id, score, (x, y, w, h) in detections
        ],
        float,
    ).reshape(-1, 7)


def evaluator(objects: list[tuple], detections: np.ndarray, images: int = 1) -> ErrorEvaluator:
    found = ErrorEvaluator(ground_truth(objects, images))
    for image_id in range(1, images + 1):
        own = torch.from_numpy(detections[detections[:, 0] == image_id])
        values = {"boxes": own[:, 1:5], "scores": own[:, 5], "labels": own[:, 6].long()}
        found.update({image_id: values})
    return found


def kinds(objects: list[tuple], *detections: tuple) -> list[str]:
    return [
        error.kind for error in classify(rows(*detections), ground_truth(objects)["annotations"])
    ]


CAT_AT = (1, CAT, (10, 10, 20, 20))


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        ((1, CAT, 0.9, (10, 10, 20, 20)), [CORRECT]),
        ((1, CAT, 0.9, (20, 10, 20, 20)), [LOCALISATION]),  # IoU 1/3
        ((1, DOG, 0.9, (10, 10, 20, 20)), [CLASSIFICATION]),
        ((1, DOG, 0.9, (20, 10, 20, 20)), [BOTH, MISSED]),
        ((1, CAT, 0.9, (60, 60, 20, 20)), [BACKGROUND, MISSED]),
        ((1, CAT, 0.9, (28, 10, 20, 20)), [BACKGROUND, MISSED]),  # IoU 1/19
    ],
)
def test_definitions(detection: tuple, expected: list[str]) -> None:
    assert kinds([CAT_AT], detection) == expected


def test_duplicates_and_the_order_of_the_definitions() -> None:
    better, worse = (1, CAT, 0.9, (10, 10, 20, 20)), (1, CAT, 0.8, (11, 10, 20, 20))
    assert kinds([CAT_AT], worse, better) == [DUPLICATE, CORRECT], (
        "the score decides, not the order"
    )
    dog = (1, DOG, (11, 10, 20, 20))
    # On a cat that is taken and a dog: a duplicate, although it overlaps the dog more.
    assert kinds([CAT_AT, dog], better, worse) == [CORRECT, DUPLICATE, MISSED]
    # Half on a cat, fully on a dog: the class is wrong, not the place.
    assert kinds([CAT_AT, (1, DOG, (20, 10, 20, 20))], (1, CAT, 0.9, (20, 10, 20, 20))) == [
        CLASSIFICATION,
        MISSED,
    ]
    # Another object of the class is free: correct, although the first one is taken.
    assert kinds([CAT_AT, (1, CAT, (14, 10, 20, 20))], better, worse) == [CORRECT, CORRECT]


def test_crowds_are_neither_errors_nor_missed() -> None:
    crowd = (1, CAT, (0, 0, 100, 100), 1)
    assert kinds([crowd], (1, CAT, 0.9, (5, 5, 9, 9)), (1, DOG, 0.9, (5, 5, 9, 9))) == [
        IGNORED,
        BACKGROUND,
    ]
    assert kinds([crowd]) == []


def test_nothing_is_gained_if_every_object_is_missed() -> None:
    summary = evaluator([CAT_AT], rows((1, CAT, 0.9, (60, 60, 20, 20)))).find_errors(0.5)
    assert summary.ap50 == 0.0
    assert summary.gains == dict.fromkeys(ERROR_TYPES, 0.0), "an AP without objects is undefined"


def random_case(seed: int) -> tuple[list[tuple], np.ndarray]:
    """Return objects with crowds, and detections near to them, of five images."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image_id in range(1, 6):
        for _ in range(rng.integers(0, 6)):
            box = rng.integers(1, 40, 4)
            category_id = int(rng.integers(1, 3))
            objects.append((image_id, category_id, tuple(box), int(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 4)):
                near = np.maximum(box + rng.integers(-6, 7, 4), 1)
                label = category_id if rng.random() < 0.7 else 3 - category_id
                found.append((image_id, label, float(rng.random()), tuple(near)))
        found.append((image_id, 1, float(rng.random()), tuple(rng.integers(1, 40, 4))))
    return objects, rows(*found)


@pytest.mark.parametrize("seed", range(4))
def test_correct_and_ignored_are_those_of_pycocotools(
    seed: int, capsys: pytest.CaptureFixture
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects, detections = random_case(seed)
    content = ground_truth(objects, 5)
    ours = classify(detections, content["annotations"])
    boxes = detections.copy()
    boxes[:, 3:5] -= boxes[:, 1:3]
    coco = COCO()
    coco.dataset = {**content, "annotations": [dict(a) for a in content["annotations"]]}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(boxes), "bbox")
    evaluation.evaluate()
    expected: dict[int, str] = {}
    for result in evaluation.evalImgs:
        if result is None or result["aRng"] != evaluation.params.areaRng[0]:
            continue
        for detection_id, match, ignored in zip(
            result["dtIds"], result["dtMatches"][0], result["dtIgnore"][0], strict=True
        ):
            if match:
                expected[detection_id - 1] = IGNORED if ignored else CORRECT
    capsys.readouterr()
    known = {e.row: e.kind for e in ours if e.kind in (CORRECT, IGNORED)}
    assert known == expected
    assert CORRECT in known.values()


def test_ap_and_what_each_type_costs() -> None:
    far = (1, DOG, (60, 60, 20, 20))
    # Before the correct cat (0.8): a background error; the dog has the class of a cat, or is missed.
    cat, noise = (1, CAT, 0.8, (10, 10, 20, 20)), (1, CAT, 0.9, (10, 70, 9, 9))
    summary = evaluator([CAT_AT, far], rows(noise, cat)).find_errors(0.5)
    assert summary.ap50 == pytest.approx((0.5 + 0) / 2)
    assert summary.counts == {**dict.fromkeys(ERROR_TYPES, 0), CORRECT: 1, BACKGROUND: 1, MISSED: 1}
    assert summary.gains[BACKGROUND] == pytest.approx(0.25)  # AP of cats 1
    assert summary.gains[MISSED] == pytest.approx(0.25)  # only cats are left: 0.5
    assert summary.gains[CLASSIFICATION] == 0

    wrong_class = (1, CAT, 0.9, (60, 60, 20, 20))
    summary = evaluator([CAT_AT, far], rows(wrong_class, cat)).find_errors(0.5)
    assert summary.gains[CLASSIFICATION] == pytest.approx(0.75)  # both classes 1
    assert summary.confusions() == [(CAT, DOG, 1)]
    wrong_box = (1, DOG, 0.9, (70, 60, 20, 20))
    summary = evaluator([CAT_AT, far], rows(wrong_box, cat)).find_errors(0.5)
    assert (summary.ap50, summary.gains[LOCALISATION]) == pytest.approx((0.5, 0.5))
    twice = (1, CAT, 0.7, (10, 10, 20, 20))
    summary = evaluator([CAT_AT], rows(cat, twice)).find_errors(0.75)
    assert (summary.gains[DUPLICATE], summary.counts[DUPLICATE]) == (0, 0), "below the threshold"


def test_ap_is_that_of_the_coco_evaluator() -> None:
    objects, detections = random_case(7)
    ours = evaluator(objects, detections, 5)
    theirs = CocoEvaluator(ground_truth(objects, 5))
    theirs._detections = ours._detections
    summary = ours.find_errors(0.3)
    assert summary.ap50 == pytest.approx(theirs.summarize()["stats"][1])
    assert all(gain > -1e-9 for gain in summary.gains.values())
    assert all(error.score >= 0.3 for error in summary.errors if error.kind != MISSED)
    worst = summary.worst(LOCALISATION, 2)
    assert [error.score for error in worst] == sorted((e.score for e in worst), reverse=True)


def test_nothing_to_find() -> None:
    assert evaluator([], rows((1, CAT, 0.9, (1, 1, 5, 5)))).find_errors(0.5).ap50 == -1
    summary = evaluator([CAT_AT], rows()).find_errors(0.5)
    assert (summary.ap50, summary.counts[MISSED], summary.gains[MISSED]) == (0, 1, 0.0)
