"""Average precision as PASCAL VOC defines it (Everingham et al., IJCV 2010, section 4.2), over IoU 0.50 to 0.95.

The boxes of VOC's devkit are whole numbers that include their last pixel. Here a box is the area that these pixels
cover, so that the plain intersection over union is that of the devkit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.evaluators.detections import Detections
from datasets.labelled.annotations import Annotations
from util.coco import CLASS_METRICS

METRICS = ("11point", "area")
THRESHOLDS = np.arange(50, 100, 5) / 100


@dataclass
class _Objects:
    """Objects of one class, by image: int64 [N] indices, float64 [N, 4], (x0, y0, x1, y1) in pixels; bool [N]."""

    image: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray

    @property
    def count(self) -> int:
        """Those that are to be found."""
        return int((~self.difficult).sum())


class VocEvaluator(Detections):
    """Collects detections image by image and compares them with annotations in arrays.

    An object that is marked `difficult` need not be found: it does not count as missed, and a detection that covers it
    best counts neither as right nor as wrong. A second detection of an object is wrong.

    metric: "11point", the mean of the best precision at recalls of 0, 0.1, ... 1 (VOC until 2009, and for its 2007 test
    images), or "area" under the monotonous precision-recall curve (from 2010 on). reproduce_published: as DETReg
    evaluates, which rounds scores to 3 decimals and corners to 1, takes an overlap only above the threshold, and
    compares recalls with 0.1 added up.
    """

    def __init__(
        self,
        annotations: Annotations,
        metric: str = METRICS[0],
        category_ids: Mapping[int, int] | None = None,
        reproduce_published: bool = False,
    ) -> None:
        super().__init__(annotations.image_ids.tolist(), category_ids)
        self.annotations, self.metric, self.published = annotations, metric, reproduce_published
        self._image_of = annotations.image_of

    def summarize(self) -> dict[str, Any]:
        """{"stats": AP, AP50 and AP75 of the chosen metric, "voc_11point" and "voc_area": the same three of each,
        "per_class"}.

        `per_class` has a row {"id", "name", "objects", "AP", "AP50", "AP75"} of the chosen metric for each class with
        an object that is not difficult; others are in no mean. -1: there is no such class.
        """
        tables = self.tables()
        means = {metric: _stats([table[metric] for table in tables.values()]) for metric in METRICS}
        per_class = [
            {
                "id": label,
                "name": self.annotations.class_names[label],
                "objects": self._objects(label).count,
                **dict(zip(CLASS_METRICS, _stats([table[self.metric]]), strict=True)),
            }
            for label, table in tables.items()
        ]
        return {
            "stats": means[self.metric],
            **{f"voc_{metric}": values for metric, values in means.items()},
            "per_class": per_class,
        }

    def tables(self) -> dict[int, dict[str, np.ndarray]]:
        """Category id -> AP [10 thresholds] by each of METRICS, of classes with an object that is not difficult."""
        labels = [
            label for label in sorted(self.annotations.class_names) if self._objects(label).count
        ]
        rows = self._comparable_rows()
        return {
            label: self._average_precisions(rows[rows[:, 6] == label], self._objects(label))
            for label in labels
        }

    def curve(self, label: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """(recall, precision) of a class after each detection, in the order of falling scores."""
        rows, objects = self._comparable_rows(), self._objects(label)
        overlap, best = self._best_objects(_by_score(rows[rows[:, 6] == label]), objects)
        return self._curve(overlap, best, objects, threshold)

    def _comparable_rows(self) -> np.ndarray:
        return _rounded(self.rows()) if self.published else self.rows()

    def _objects(self, label: int) -> _Objects:
        rows = np.flatnonzero(self.annotations.labels == label)
        difficult = (
            np.zeros(len(rows), bool)
            if self.annotations.difficult is None
            else self.annotations.difficult[rows]
        )
        return _Objects(
            self._image_of[rows],
            self.annotations.boxes_xyxy_abs[rows].astype(np.float64),
            difficult,
        )

    def _average_precisions(self, rows: np.ndarray, objects: _Objects) -> dict[str, np.ndarray]:
        overlap, best = self._best_objects(_by_score(rows), objects)
        curves = [self._curve(overlap, best, objects, threshold) for threshold in THRESHOLDS]
        return {
            "11point": np.array([eleven_points(*points, self.published) for points in curves]),
            "area": np.array([area(*points) for points in curves]),
        }

    def _curve(
        self, overlap: np.ndarray, best: np.ndarray, objects: _Objects, threshold: float
    ) -> tuple[np.ndarray, np.ndarray]:
        covers = overlap > threshold if self.published else overlap >= threshold
        return curve(covers, best, objects.difficult, objects.count)

    def _best_objects(self, rows: np.ndarray, objects: _Objects) -> tuple[np.ndarray, np.ndarray]:
        """For each detection the largest IoU with an object of its image, 0 without any, and the first such object's
        index.
        """
        image = np.searchsorted(self.annotations.image_ids, rows[:, 0].astype(np.int64))
        first, last = (
            np.searchsorted(objects.image, image, "left"),
            np.searchsorted(objects.image, image, "right"),
        )
        counts = last - first
        overlap, best = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        some = np.flatnonzero(counts)
        if not len(some):
            return overlap, best
        counts, starts = counts[some], np.concatenate([[0], np.cumsum(counts[some])[:-1]])
        detection = np.repeat(some, counts)
        candidate = np.arange(counts.sum()) - np.repeat(starts - first[some], counts)
        iou = paired_iou(rows[detection, 1:5], objects.boxes[candidate])
        overlap[some] = np.maximum.reduceat(iou, starts)
        largest = np.flatnonzero(iou == overlap[detection])[::-1]
        best[detection[largest]] = candidate[
            largest
        ]  # of equal ones the first, which is written last
        return overlap, best


def _by_score(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-rows[:, 5], kind="stable")]


def _rounded(rows: np.ndarray) -> np.ndarray:
    """As DETReg writes detections to text and reads them again: corners count from 1 there, the right and lower ones
    inclusive.
    """
    rows = rows.copy()
    rows[:, 1:3] += 1
    rows[:, 5] = [float(f"{value:.3f}") for value in rows[:, 5].tolist()]
    rows[:, 1:5] = np.array(
        [float(f"{value:.1f}") for value in rows[:, 1:5].ravel().tolist()]
    ).reshape(-1, 4)
    rows[:, 1:3] -= 1
    return rows


def paired_iou(boxes_xyxy_abs: np.ndarray, others_xyxy_abs: np.ndarray) -> np.ndarray:
    """[N, 4], [N, 4] -> intersection over union [N]."""
    low = np.maximum(boxes_xyxy_abs[:, :2], others_xyxy_abs[:, :2])
    high = np.minimum(boxes_xyxy_abs[:, 2:], others_xyxy_abs[:, 2:])
    shared = (high - low).clip(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (boxes_xyxy_abs, others_xyxy_abs)]
    return shared / np.maximum(areas[0] + areas[1] - shared, np.finfo(np.float64).eps)


def curve(
    covers: np.ndarray, best: np.ndarray, difficult: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) after each detection, in the order of falling scores.

    covers bool [N]: it overlaps its best object (`best`, an index into difficult [M]) enough. total: objects that are
    not difficult.
    """
    ignored = np.zeros(len(covers), bool)
    ignored[covers] = difficult[best[covers]]
    candidates = np.flatnonzero(covers & ~ignored)
    _, first = np.unique(best[candidates], return_index=True)
    right = np.zeros(len(covers), bool)
    right[candidates[first]] = True
    true_positives, wrong = np.cumsum(right), np.cumsum(~right & ~ignored)
    return true_positives / total, true_positives / np.maximum(true_positives + wrong, 1)


def eleven_points(recall: np.ndarray, precision: np.ndarray, published: bool = False) -> float:
    """Mean of the best precision at a recall of 0, 0.1, ... 1 or more. published: 0.1 added up, which passes 0.3, 0.6
    and 0.7.
    """
    points = np.arange(0, 1.1, 0.1) if published else np.arange(11) / 10
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best[np.searchsorted(recall, points, "left")].mean())


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve whose precision at each recall is the best at that recall or more."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())


def _stats(values: list[np.ndarray]) -> list[float]:
    """AP, AP50, AP75 from APs [10] of classes; -1 without any."""
    if not values:
        return [-1.0] * 3
    mean = np.mean(values, axis=0)
    return [float(mean.mean()), float(mean[0]), float(mean[5])]
