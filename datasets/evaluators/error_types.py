"""What kind of errors a detector makes, and what each kind costs in AP.

The types are those of TIDE (Bolya et al., ECCV 2020, section 2.2), at an IoU of 0.5. A detection is correct if it is
matched to an object of its class as in COCO: by score, each object once. Any other one is the first of these that fits,
where IoU is the highest one with an object of its class or of another:

- duplicate: IoU >= 0.5 with an object of its class, which a better detection has;
- classification: IoU >= 0.5 with an object of another class;
- localisation: 0.1 <= IoU < 0.5 with an object of its class;
- both: 0.1 <= IoU < 0.5 with an object of another class only;
- background: IoU < 0.1 with every object.

Missed is an object that no detection is matched to, and that no classification or localisation error explains.
Detections that lie at least half in a crowd of their class are ignored, as in COCO, and crowds are never missed.

TIDE takes localisation before classification; here an overlap of 0.5 decides first.

Shapes: N detections, A objects, of one image or of all.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from datasets.evaluators.coco import CocoEvaluator, CompletedGroundTruth, mean_valid
from util.box_ops import box_iou

CORRECT, IGNORED = "correct", "ignored"
DUPLICATE, CLASSIFICATION, LOCALISATION = "duplicate", "classification", "localisation"
BOTH, BACKGROUND, MISSED = "both", "background", "missed"
# In the order of tables and pages.
ERROR_TYPES = (CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED)
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MAX_DETECTIONS = 100  # per image and class, as in COCO


@dataclass(frozen=True)
class Error:
    """One detection, or a missed object.

    Attributes:
        kind: CORRECT, IGNORED, or one of ERROR_TYPES.
        image_id: of the annotation file.
        category_id: of the detection, or of the missed object.
        score: of the detection; 0 if missed.
        box_xyxy: of the detection or the missed object, in pixels.
        iou: with `object`; 0 without.
        object: the annotation that the detection was compared with, or that was missed; None for background.
        row: number of the detection; -1 if missed.
    """

    kind: str
    image_id: int
    category_id: int
    score: float
    box_xyxy: tuple[float, float, float, float]
    iou: float = 0.0
    object: dict[str, Any] | None = None
    row: int = -1


@dataclass
class ErrorSummary:
    """Errors of a dataset.

    Attributes:
        errors: of detections with at least `threshold`, and missed objects.
        threshold: lowest score that counts in `errors`.
        num_objects: objects without crowds.
        ap50: AP at an IoU of 0.5 of all detections, whatever their score; -1 without ground truth.
        gains: error type -> how much higher `ap50` would be without its errors, one type at a time; 0 for missed
            objects if there are no others.
    """

    errors: list[Error]
    threshold: float
    num_objects: int
    ap50: float
    gains: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of errors of each type, and of correct detections."""
        found = Counter(error.kind for error in self.errors)
        return {kind: found[kind] for kind in (CORRECT, *ERROR_TYPES)}

    def confusions(self) -> list[tuple[int, int, int]]:
        """Return (category id of the detection, of the object, number) of confused classes, most frequent first."""
        pairs = Counter(
            (error.object["category_id"], error.category_id)
            for error in self.errors
            if error.kind == CLASSIFICATION and error.object is not None
        )
        return [(found, real, count) for (real, found), count in pairs.most_common()]

    def worst(self, kind: str, count: int) -> list[Error]:
        """Return the errors of a type that matter most: the highest scores, of missed objects the largest."""
        chosen = [error for error in self.errors if error.kind == kind]
        return sorted(chosen, key=lambda error: (-error.score, -_area(error.box_xyxy)))[:count]


def _area(box_xyxy: Sequence[float]) -> float:
    return (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])


class ErrorEvaluator(CocoEvaluator):
    """Finds the errors of a detector; detections are added as for `CocoEvaluator`."""

    def find_errors(self, threshold: float) -> ErrorSummary:
        """Return the errors of the detections with at least this score, and what each type costs in AP50."""
        rows, objects = self._listed_rows(), self.ground_truth["annotations"]
        confident = rows[rows[:, 5] >= threshold]
        errors = classify(confident, objects)
        all_errors = classify(rows, objects)
        ap50 = self._ap50(rows, objects)
        gains = {}
        for kind in ERROR_TYPES:
            fixed = self._ap50(*corrected(rows, objects, all_errors, kind))
            gains[kind] = fixed - ap50 if fixed >= 0 else 0.0  # every object is missed: none left
        num_objects = sum(not a["iscrowd"] for a in objects)
        return ErrorSummary(errors, threshold, num_objects, ap50, gains)

    def summarize(self) -> dict[str, Any]:
        """Return no metrics: `engine.evaluate` calls it, and `find_errors` has them."""
        return {"stats": [], "per_class": []}

    def _listed_rows(self) -> np.ndarray:
        """Return the detections of listed classes, the best 100 of each image and class, float64 [N, 7]."""
        rows = self.rows()
        rows = rows[np.isin(rows[:, 6], [c["id"] for c in self.ground_truth["categories"]])]
        order = np.lexsort((-rows[:, 5], rows[:, 6], rows[:, 0]))
        rows = rows[order]
        _, start, size = np.unique(rows[:, [0, 6]], axis=0, return_index=True, return_counts=True)
        rank = np.arange(len(rows)) - np.repeat(start, size)  # in its image and class
        return rows[rank < MAX_DETECTIONS]

    def _ap50(self, rows: np.ndarray, objects: list[dict[str, Any]]) -> float:
        """Return AP at an IoU of 0.5 of these detections and objects."""
        if not any(not a["iscrowd"] for a in objects):
            return -1.0
        if not len(rows):
            return 0.0
        content = CompletedGroundTruth({**self.ground_truth, "annotations": objects})
        evaluator = CocoEvaluator(content, self.backend)
        boxes_xywh = rows.copy()
        boxes_xywh[:, 3:5] -= boxes_xywh[:, 1:3]
        precision, _ = evaluator._curves(boxes_xywh, (1, 10, MAX_DETECTIONS))
        return mean_valid(precision[0, :, :, 0, -1])


def classify(rows: np.ndarray, objects: Iterable[dict[str, Any]]) -> list[Error]:
    """Return the kind of each detection, in the order of `rows`, and then the missed objects.

    rows: float64 [N, 7], see `DetectionEvaluator.rows`. objects: COCO annotations, with `bbox` and `iscrowd`.
    """
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in objects:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    errors: list[Error | None] = [None] * len(rows)
    missed: list[Error] = []
    numbers: dict[int, list[int]] = {image_id: [] for image_id in by_image}
    for number, image_id in enumerate(rows[:, 0].astype(int).tolist()):
        numbers.setdefault(image_id, []).append(number)
    for image_id, own in numbers.items():
        missed += _classify_image(rows, own, by_image.get(image_id, []), errors)
    return [error for error in errors if error is not None] + missed


def _classify_image(
    rows: np.ndarray,
    numbers: list[int],
    annotations: list[dict[str, Any]],
    errors: list[Error | None],
) -> list[Error]:
    """Write the kinds of the detections `numbers` of one image into `errors`; return its missed objects."""
    objects = [a for a in annotations if not a["iscrowd"]]
    crowds = [a for a in annotations if a["iscrowd"]]
    iou = _ious(rows[numbers, 1:5], objects)  # [N, A]
    inside = _covered(rows[numbers, 1:5], crowds)  # [N, crowds]
    same = rows[numbers, 6][:, None] == [a["category_id"] for a in objects]  # [N, A]
    same_crowd = rows[numbers, 6][:, None] == [a["category_id"] for a in crowds]

    matched, explained = set(), set()
    for i in np.argsort(-rows[numbers, 5], kind="stable").tolist():
        free = np.where(same[i], iou[i], -1.0)
        free[list(matched)] = -1.0
        if len(objects) and free.max() >= FOREGROUND_IOU:
            kind, a = CORRECT, int(free.argmax())
            matched.add(a)
        elif (inside[i] >= FOREGROUND_IOU)[same_crowd[i]].any():
            kind, a = IGNORED, -1
        else:
            kind, a = _error_kind(iou[i], same[i])
            if kind in (CLASSIFICATION, LOCALISATION):
                explained.add(a)
        errors[numbers[i]] = _detection(rows, numbers[i], kind, objects, a, iou[i])

    return [
        Error(MISSED, a["image_id"], a["category_id"], 0.0, _to_xyxy(a["bbox"]), object=a)
        for index, a in enumerate(objects)
        if index not in matched | explained
    ]


def _error_kind(iou: np.ndarray, same: np.ndarray) -> tuple[str, int]:
    """Return the type of a detection that is not correct, and the object that it was compared with; -1 for none."""
    own = np.where(same, iou, -1.0)
    other = np.where(same, -1.0, iou)
    best_own, best_other = own.max(initial=-1.0), other.max(initial=-1.0)
    if best_own >= FOREGROUND_IOU:
        return DUPLICATE, int(own.argmax())
    if best_other >= FOREGROUND_IOU:
        return CLASSIFICATION, int(other.argmax())
    if best_own >= BACKGROUND_IOU:
        return LOCALISATION, int(own.argmax())
    if best_other >= BACKGROUND_IOU:
        return BOTH, int(other.argmax())
    return BACKGROUND, -1


def _detection(
    rows: np.ndarray, number: int, kind: str, objects: list, index: int, iou: np.ndarray
) -> Error:
    image_id, x0, y0, x1, y1, score, category_id = rows[number].tolist()
    compared = objects[index] if index >= 0 else None
    overlap = float(iou[index]) if index >= 0 else 0.0
    box = (x0, y0, x1, y1)
    return Error(kind, int(image_id), int(category_id), score, box, overlap, compared, number)


def corrected(
    rows: np.ndarray, objects: list[dict[str, Any]], errors: list[Error], kind: str
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return detections and objects without the errors of one type, as TIDE's oracles do (section 2.3).

    A classification error gets the class, and a localisation error the box of its object, if no detection is matched to
    this and it is the best such error; otherwise it is removed, as all duplicates, errors of both kinds and background
    are. Missed objects are removed.
    """
    wrong = [error for error in errors if error.kind == kind]
    if kind == MISSED:
        missed = {id(error.object) for error in wrong}
        return rows, [a for a in objects if id(a) not in missed]

    fixed, removed = rows.copy(), []
    taken = {id(error.object) for error in errors if error.kind == CORRECT}
    for error in sorted(wrong, key=lambda error: -error.score):
        target = error.object
        if kind not in (CLASSIFICATION, LOCALISATION) or target is None or id(target) in taken:
            removed.append(error.row)
            continue
        taken.add(id(target))
        fixed[error.row, 1:5] = _to_xyxy(target["bbox"]) if kind == LOCALISATION else error.box_xyxy
        fixed[error.row, 6] = target["category_id"]
    return np.delete(fixed, removed, axis=0), objects


def _to_xyxy(bbox_xywh: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = bbox_xywh
    return x, y, x + width, y + height


def _boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    return np.array([_to_xyxy(a["bbox"]) for a in annotations], np.float64).reshape(-1, 4)


def _ious(boxes_xyxy: np.ndarray, objects: list[dict[str, Any]]) -> np.ndarray:
    """Return IoU of boxes [N, 4] with objects, float64 [N, A]."""
    return box_iou(torch.from_numpy(boxes_xyxy), torch.from_numpy(_boxes(objects)))[0].numpy()


def _covered(boxes_xyxy: np.ndarray, crowds: list[dict[str, Any]]) -> np.ndarray:
    """Return the fraction of each box [N, 4] that is inside of each crowd's box, float64 [N, A]."""
    others = _boxes(crowds)
    low = np.maximum(boxes_xyxy[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes_xyxy[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)  # [N, A]
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(-1, keepdims=True)
    return shared / np.maximum(areas, 1e-12)
