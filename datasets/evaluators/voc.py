"""PASCAL VOC average precision (Everingham et al., IJCV 2010, section 4.2), for IoU 0.50 to 0.95.

The corners in VOC's devkit are whole pixels, and the right and lower ones are inclusive. Boxes here span the area of
these pixels, so the plain IoU equals the devkit's.

Shapes: N detections of a class, M ground-truth objects of that class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.evaluators.detections import DetectionEvaluator
from datasets.labelled.annotations import Annotations
from util.coco import CLASS_METRICS

METRICS = ("11point", "area")
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100  # 0.50, 0.55, ... 0.95


@dataclass
class _ClassGroundTruth:
    """Objects of one class, sorted by image.

    Attributes:
        image: int64 [M], image index.
        boxes: float64 [M, 4], (x0, y0, x1, y1) in pixels.
        difficult: bool [M].
    """

    image: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray

    @property
    def count(self) -> int:
        """Number of objects that are not difficult: those to be detected."""
        return int((~self.difficult).sum())


class VocEvaluator(DetectionEvaluator):
    """VOC metrics of boxes.

    Objects marked `difficult` do not count as missed, and a detection that overlaps one best is neither a true nor a
    false positive. A second detection of an object is a false positive.

    Args:
        metric: "11point", the mean of the best precision at recall 0, 0.1, ... 1 (VOC until 2009, and for its 2007 test
            set); or "area", the area under the monotonic precision-recall curve (2010 or later).
        category_ids: see `DetectionEvaluator`.
        reproduce_published: evaluate as DETReg, which rounds scores to 3 decimals and corners to 1, requires an IoU
            above the threshold instead of at least the threshold, and misses recalls of exactly 0.3, 0.6 and 0.7.
    """

    def __init__(
        self,
        annotations: Annotations,
        metric: str = METRICS[0],
        category_ids: Mapping[int, int] | None = None,
        reproduce_published: bool = False,
    ) -> None:
        super().__init__(annotations.image_ids.tolist(), category_ids)
        self.annotations = annotations
        self.metric = metric
        self.published = reproduce_published
        self._image_indices = annotations.image_indices

    def summarize(self) -> dict[str, Any]:
        """Return {"stats", "voc_11point", "voc_area", "per_class"}.

        "voc_11point" and "voc_area" are AP, AP50 and AP75 of each metric, "stats" those of the selected one.
        "per_class" has a row {"id", "name", "objects", "AP", "AP50", "AP75"} of the selected metric for each class with
        an object that is not difficult. Other classes are in no mean; -1 if there is no such class.
        """
        tables = self.ap_tables()
        means = {metric: _stats([table[metric] for table in tables.values()]) for metric in METRICS}
        per_class = [
            {
                "id": label,
                "name": self.annotations.class_names[label],
                "objects": self._ground_truth(label).count,
                **dict(zip(CLASS_METRICS, _stats([table[self.metric]]), strict=True)),
            }
            for label, table in tables.items()
        ]
        return {
            "stats": means[self.metric],
            **{f"voc_{metric}": values for metric, values in means.items()},
            "per_class": per_class,
        }

    def ap_tables(self) -> dict[int, dict[str, np.ndarray]]:
        """Return label -> {metric: AP [10 IoU thresholds]} of classes with an object that is not difficult."""
        labels = [
            label
            for label in sorted(self.annotations.class_names)
            if self._ground_truth(label).count
        ]
        rows = self._comparable_rows()
        return {
            label: self._average_precisions(rows[rows[:, 6] == label], self._ground_truth(label))
            for label in labels
        }

    def precision_recall(self, label: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Return (recall [N], precision [N]) of a class after each detection, by descending score."""
        rows = self._comparable_rows()
        ground_truth = self._ground_truth(label)
        overlap, best = self._match(_by_score(rows[rows[:, 6] == label]), ground_truth)
        return self._precision_recall(overlap, best, ground_truth, threshold)

    def _comparable_rows(self) -> np.ndarray:
        return _round_as_published(self.rows()) if self.published else self.rows()

    def _ground_truth(self, label: int) -> _ClassGroundTruth:
        rows = np.flatnonzero(self.annotations.labels == label)  # [M]
        if self.annotations.difficult is None:
            difficult = np.zeros(len(rows), bool)
        else:
            difficult = self.annotations.difficult[rows]
        boxes = self.annotations.boxes_xyxy_abs[rows].astype(np.float64)
        return _ClassGroundTruth(self._image_indices[rows], boxes, difficult)

    def _average_precisions(
        self, rows: np.ndarray, ground_truth: _ClassGroundTruth
    ) -> dict[str, np.ndarray]:
        overlap, best = self._match(_by_score(rows), ground_truth)
        curves = [
            self._precision_recall(overlap, best, ground_truth, threshold)
            for threshold in IOU_THRESHOLDS
        ]
        return {
            "11point": np.array([ap_11point(*curve, self.published) for curve in curves]),
            "area": np.array([ap_area(*curve) for curve in curves]),
        }

    def _precision_recall(
        self,
        overlap: np.ndarray,
        best: np.ndarray,
        ground_truth: _ClassGroundTruth,
        threshold: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        matched = overlap > threshold if self.published else overlap >= threshold
        return precision_recall_curve(matched, best, ground_truth.difficult, ground_truth.count)

    def _match(
        self, rows: np.ndarray, ground_truth: _ClassGroundTruth
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return for each detection the largest IoU with an object of its image, and the index of that object.

        The IoU is 0 if the image has no object. Of several objects with this IoU, the first one counts.

        Args:
            rows: [N, 7], detections of one class.

        Returns:
            (float64 [N], int64 [N]).
        """
        overlap, best = np.zeros(len(rows)), np.zeros(len(rows), np.int64)  # [N], [N]

        # Objects are sorted by image: those of an image are a range of indices.
        image = np.searchsorted(self.annotations.image_ids, rows[:, 0].astype(np.int64))  # [N]
        first = np.searchsorted(ground_truth.image, image, "left")
        last = np.searchsorted(ground_truth.image, image, "right")
        counts = last - first
        with_objects = np.flatnonzero(counts)  # detections with at least one candidate
        if not len(with_objects):
            return overlap, best

        # All (detection, object) pairs in the same image, [P], grouped by detection.
        counts = counts[with_objects]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])  # first pair of each detection
        detection = np.repeat(with_objects, counts)
        candidate = np.arange(counts.sum()) - np.repeat(starts - first[with_objects], counts)
        iou = paired_iou(rows[detection, 1:5], ground_truth.boxes[candidate])  # [P]

        overlap[with_objects] = np.maximum.reduceat(iou, starts)
        # Several candidates may have the largest IoU. In reverse order, the first one is written last and stays.
        largest = np.flatnonzero(iou == overlap[detection])[::-1]
        best[detection[largest]] = candidate[largest]
        return overlap, best


def _by_score(rows: np.ndarray) -> np.ndarray:
    # A stable sort: equal scores keep the order of the images.
    return rows[np.argsort(-rows[:, 5], kind="stable")]


def _round_as_published(rows: np.ndarray) -> np.ndarray:
    """Return the detections as DETReg reads them back from its text files.

    In these files, corners count from 1 and the right and lower ones are inclusive. Scores have 3 decimals, corners 1.
    """
    rows = rows.copy()
    rows[:, 1:3] += 1
    # Formatting rounds like the published text; np.round may differ in the last digit.
    rows[:, 5] = [float(f"{value:.3f}") for value in rows[:, 5].tolist()]
    corners = [float(f"{value:.1f}") for value in rows[:, 1:5].ravel().tolist()]
    rows[:, 1:5] = np.array(corners).reshape(-1, 4)
    rows[:, 1:3] -= 1
    return rows


def paired_iou(boxes_xyxy_abs: np.ndarray, others_xyxy_abs: np.ndarray) -> np.ndarray:
    """Return the IoU [P] of P pairs of boxes, [P, 4] each."""
    low = np.maximum(boxes_xyxy_abs[:, :2], others_xyxy_abs[:, :2])
    high = np.minimum(boxes_xyxy_abs[:, 2:], others_xyxy_abs[:, 2:])
    intersection = (high - low).clip(min=0).prod(1)
    area, other_area = (
        (boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (boxes_xyxy_abs, others_xyxy_abs)
    )
    union = area + other_area - intersection
    # Two boxes without area have no union. The clip makes their IoU 0 instead of NaN.
    return intersection / np.maximum(union, np.finfo(np.float64).eps)


def precision_recall_curve(
    matched: np.ndarray, best: np.ndarray, difficult: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (recall [N], precision [N]) after each detection, by descending score.

    Args:
        matched: bool [N], whether the IoU with the best object reaches the threshold.
        best: int64 [N], index of that object.
        difficult: bool [M].
        total: number of objects that are not difficult.
    """
    ignored = np.zeros(len(matched), bool)
    ignored[matched] = difficult[best[matched]]

    # As in the devkit, a detection belongs to its best object, even if another one is still free. Of several detections
    # of an object, np.unique returns the first: the one with the highest score.
    candidates = np.flatnonzero(matched & ~ignored)
    _, first = np.unique(best[candidates], return_index=True)
    correct = np.zeros(len(matched), bool)
    correct[candidates[first]] = True

    true_positives = np.cumsum(correct)
    false_positives = np.cumsum(~correct & ~ignored)
    # The first detections may all be ignored: 0 / 0 becomes 0 / 1.
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    return true_positives / total, precision


def ap_11point(recall: np.ndarray, precision: np.ndarray, published: bool = False) -> float:
    """Return the mean of the best precision at a recall of at least 0, 0.1, ... 1.

    Args:
        published: use steps of 0.1, as DETReg. Floating-point error puts these points above 0.3, 0.6 and 0.7, so a
            recall of exactly that value misses them.
    """
    points = np.arange(0, 1.1, 0.1) if published else np.arange(11) / 10
    best = np.append(_best_precision(precision), 0.0)  # [N + 1], 0 beyond the highest recall
    return float(best[np.searchsorted(recall, points, "left")].mean())


def ap_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under the curve of the best precision at each recall or a higher one."""
    return float((np.diff(recall, prepend=0.0) * _best_precision(precision)).sum())


def _best_precision(precision: np.ndarray) -> np.ndarray:
    """Return the highest precision at each recall or a higher one, [N]: a cumulative maximum from the end."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def _stats(values: list[np.ndarray]) -> list[float]:
    """Return AP, AP50 and AP75 as the mean over classes; -1 without classes.

    Args:
        values: AP [10 IoU thresholds] of each class.
    """
    if not values:
        return [-1.0] * 3
    mean = np.mean(values, axis=0)  # [10]
    return [float(mean.mean()), float(mean[0]), float(mean[5])]  # over all, at 0.50, at 0.75
