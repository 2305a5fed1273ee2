"""What a detector finds, confuses and misses: precision-recall curves, confusions, and the best and worst images.

Detections are matched as COCO matches them: per image, in order of their score, each to the free object of its class
with the highest IoU. AP50 of these curves is COCO's (for any area and at most 100 detections per image).

Shapes: N detections of all images, n of one image; A ground-truth objects, m of one image; K classes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IOU_THRESHOLDS = (0.5, 0.75)
RECALLS = np.linspace(0, 1, 101)  # COCO's
DEFAULT_THRESHOLD = 0.5  # where no detection is right
DIGITS = 4

Confusion = tuple[int | None, int | None]  # (class of the object, predicted class); None: nothing
_Pool = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # score, predicted class, whether it is right; [N] each


@dataclass(frozen=True)
class ImageScore:
    """How well the detections of an image fit at the score threshold.

    found: objects with a detection of their class. wrong: other detections. missed: other objects.
    """

    image_id: int
    found: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        return 2 * self.found / (2 * self.found + self.wrong + self.missed)


@dataclass(frozen=True)
class Analysis:
    """Result of `analyse`.

    Attributes:
        threshold: the score with the best F1 over all detections, at IoU 0.5. What follows is for scores from it on.
        precision, recall: over all classes together.
        confusions: how often an object of one class was detected as one of another, was missed, or was not there.
        images: of images with an object or a detection.
        curves: IoU threshold -> category id -> precision [101] at recall 0, 0.01, ... 1.
    """

    threshold: float
    precision: float
    recall: float
    confusions: dict[Confusion, int]
    images: list[ImageScore]
    curves: dict[float, dict[int, np.ndarray]]

    def best_and_worst(self, count: int) -> tuple[list[ImageScore], list[ImageScore]]:
        """Return up to `count` images each, by F1; of equal ones those with more objects, or more errors.

        No image is in both lists, and the worst ones have at least one error.
        """
        best = sorted(self.images, key=lambda i: (-i.f1, -i.found, i.image_id))
        worst = sorted(self.images, key=lambda i: (i.f1, -(i.wrong + i.missed), i.image_id))
        best = [image for image in best if image.found][:count]
        worst = [image for image in worst if image.f1 < 1 and image not in best][:count]
        return best, worst

    def as_dict(self) -> dict[str, Any]:
        """Return what is saved with a run, without `images`."""
        return {
            "threshold": self.threshold,
            "precision": self.precision,
            "recall": self.recall,
            "confusions": [[*pair, count] for pair, count in sorted(self.confusions.items(), key=str)],
            "precision_recall": {
                f"{threshold:.2f}": {
                    str(category): np.round(precision, DIGITS).tolist()
                    for category, precision in curves.items()
                }
                for threshold, curves in self.curves.items()
            },
        }  # fmt: skip


@dataclass
class _Image:
    """Detections and objects of one image, and how they match.

    Attributes:
        scores, predicted: [n]. labels: [m].
        iou: [n, m].
        in_crowd: [n], the largest fraction of each detection inside of a crowd of its class. COCO ignores those above
            the IoU threshold.
    """

    image_id: int
    scores: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    iou: np.ndarray
    in_crowd: np.ndarray

    def match(self, threshold: float) -> np.ndarray:
        """Return the object of each detection, [n]; -1 without one."""
        same_class = self.predicted[:, None] == self.labels
        return _match(self.scores, np.where(same_class, self.iou, 0), threshold)


def analyse(rows: np.ndarray, ground_truth: Mapping[str, Any]) -> Analysis:
    """Match detections with the ground truth.

    Args:
        rows: float64 [N, 7], see `DetectionEvaluator.rows`.
        ground_truth: from `datasets.evaluators.coco.build_ground_truth`.
    """
    images = list(_images(rows, ground_truth))
    matches = {
        threshold: [image.match(threshold) for image in images] for threshold in IOU_THRESHOLDS
    }
    curves = {
        threshold: _curves(images, _pool(images, found, threshold))
        for threshold, found in matches.items()
    }
    found = matches[IOU_THRESHOLDS[0]]
    threshold, precision, recall = _best_threshold(images, found)

    confusions: Counter[Confusion] = Counter()
    scores = []
    for image, matched in zip(images, found, strict=True):
        score = _count_confusions(image, matched, threshold, confusions)
        if score.found + score.wrong + score.missed:
            scores.append(score)
    return Analysis(threshold, precision, recall, dict(confusions), scores, curves)


def _images(rows: np.ndarray, ground_truth: Mapping[str, Any]) -> Iterable[_Image]:
    known = [category["id"] for category in ground_truth["categories"]]
    rows = rows[np.isin(rows[:, 6], known)]
    annotations = ground_truth["annotations"]
    ids = np.array([a["image_id"] for a in annotations], np.int64)  # [A]
    labels = np.array([a["category_id"] for a in annotations], np.int64)  # [A]
    boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)  # [A, 4], xywh
    boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([a["iscrowd"] for a in annotations], bool)  # [A]

    objects_of = _rows_by_image(ids)
    detections_of = _rows_by_image(rows[:, 0].astype(np.int64))
    nothing = np.zeros(0, np.int64)
    for image_id in sorted({*objects_of, *detections_of}):
        own = objects_of.get(image_id, nothing)
        detections = rows[detections_of.get(image_id, nothing)]  # [n, 7]
        detections = detections[np.argsort(-detections[:, 5], kind="stable")]
        predicted = detections[:, 6].astype(np.int64)
        objects, crowds = own[~crowd[own]], own[crowd[own]]
        iou, _ = _overlaps(detections[:, 1:5], boxes[objects])
        _, inside = _overlaps(detections[:, 1:5], boxes[crowds])
        same_class = predicted[:, None] == labels[crowds]
        in_crowd = (inside * same_class).max(1, initial=0)
        yield _Image(image_id, detections[:, 5], predicted, labels[objects], iou, in_crowd)


def _rows_by_image(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Return image id -> its rows."""
    if not len(ids):
        return {}
    order = np.argsort(ids, kind="stable")
    unique, first = np.unique(ids[order], return_index=True)
    return dict(zip(unique.tolist(), np.split(order, first[1:]), strict=True))


def _overlaps(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairwise IoU, and the fraction of each box of `a` inside of `b`; [n, m] each."""
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(-1)  # [n, m]
    area_a = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(-1)[:, None]
    area_b = (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(-1)
    tiny = np.finfo(np.float64).tiny
    iou = intersection / np.maximum(area_a + area_b - intersection, tiny)
    return iou, intersection / np.maximum(area_a, tiny)


def _match(scores: np.ndarray, iou: np.ndarray, threshold: float) -> np.ndarray:
    """Match detections, best first, each to the free object with the highest IoU. Returns [n], -1 without one."""
    matched = np.full(len(scores), -1)
    if not iou.size:
        return matched
    free = np.ones(iou.shape[1], bool)
    for i in np.flatnonzero((iou >= threshold).any(1)):
        overlaps = np.where(free, iou[i], 0)
        best = int(overlaps.argmax())
        if overlaps[best] >= threshold:
            matched[i] = best
            free[best] = False
    return matched


def _curves(images: Sequence[_Image], pool: _Pool) -> dict[int, np.ndarray]:
    """Return category id -> precision [101] of each class with objects."""
    scores, predicted, is_right = pool
    totals = Counter(label for image in images for label in image.labels.tolist())
    curves = {}
    for category, total in sorted(totals.items()):
        own = predicted == category
        order = np.argsort(-scores[own], kind="stable")
        hits = is_right[own][order].cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # never rises with the recall
        at = np.searchsorted(hits / total, RECALLS, side="left")
        curves[category] = np.append(precision, 0)[np.minimum(at, len(precision))]
    return curves


def _pool(images: Sequence[_Image], matches: Sequence[np.ndarray], threshold: float) -> _Pool:
    """Return all detections that count, see `_Pool`."""
    groups = [
        (image, matched, (matched >= 0) | (image.in_crowd < threshold))
        for image, matched in zip(images, matches, strict=True)
    ]
    empty = np.zeros(0)
    scores = np.concatenate([empty, *(image.scores[kept] for image, _, kept in groups)])
    predicted = np.concatenate([empty, *(image.predicted[kept] for image, _, kept in groups)])
    is_right = np.concatenate([empty, *(matched[kept] >= 0 for _, matched, kept in groups)])
    return scores, predicted, is_right.astype(bool)


def _best_threshold(
    images: Sequence[_Image], matches: Sequence[np.ndarray]
) -> tuple[float, float, float]:
    """Return the score with the best F1, and precision and recall of the detections from that score on."""
    scores, _, is_right = _pool(images, matches, IOU_THRESHOLDS[0])
    total = sum(len(image.labels) for image in images)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], is_right[order].cumsum()
    if not total or not len(hits) or not hits[-1]:
        return DEFAULT_THRESHOLD, 0.0, 0.0
    # A threshold keeps all detections of one score or none: bfloat16 gives many of them the same.
    last = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))  # of each score
    counts, hits = last + 1, hits[last]
    best = int((2 * hits / (counts + total)).argmax())
    return (
        float(ranked[last[best]]),
        float(hits[best] / counts[best]),
        float(hits[best] / total),
    )


def _count_confusions(
    image: _Image, matched: np.ndarray, threshold: float, confusions: Counter[Confusion]
) -> ImageScore:
    """Add the confusions of an image. Detections that are not right may take a free object of another class."""
    kept = image.scores >= threshold
    matched = np.where(kept, matched, -1)
    right = matched >= 0
    free = np.ones(len(image.labels), bool)
    free[matched[right]] = False
    rest = np.flatnonzero(kept & ~right & (image.in_crowd < IOU_THRESHOLDS[0]))
    others = _match(image.scores[rest], image.iou[rest] * free, IOU_THRESHOLDS[0])

    for label in image.labels[matched[right]].tolist():
        confusions[label, label] += 1
    for i, other in zip(rest.tolist(), others.tolist(), strict=True):
        label = int(image.labels[other]) if other >= 0 else None
        confusions[label, int(image.predicted[i])] += 1
    free[others[others >= 0]] = False
    for label in image.labels[free].tolist():
        confusions[label, None] += 1
    num_found = int(right.sum())
    return ImageScore(image.image_id, num_found, len(rest), len(image.labels) - num_found)
