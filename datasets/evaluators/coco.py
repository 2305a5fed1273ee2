"""COCO average precision and recall of boxes.

Shapes: N detections, A ground-truth boxes, K classes. Precision is [10 IoU thresholds, 101 recalls, K, 4 areas, M],
recall is [10, K, 4, M], for M limits: the maximum number of detections per image and class.
"""

import contextlib
import functools
import importlib.util
import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from datasets.evaluators.detections import DetectionEvaluator
from datasets.labelled.annotations import (
    class_name,
    has_visible_area,
    is_ignored_region,
    is_usable_area,
    parse_areas,
    rotate_boxes,
)
from util.coco import CLASS_METRICS
from util.errors import UserError
from util.logger import log

# AP, AP50 and AP75 as slices of the ten IoU thresholds 0.50, 0.55, ... 0.95.
IOU_SLICES = (slice(None), slice(0, 1), slice(5, 6))

MAX_DETS = (1, 10, 100)  # the best detections per image and class
AREA_RANGES = (  # square pixels, both ends included
    (0, 1e10),  # all
    (0, 32**2),  # small
    (32**2, 96**2),  # medium
    (96**2, 1e10),  # large
)

GroundTruth = dict[str, Any]  # content of a COCO detection file, completed by `build_ground_truth`


class CompletedGroundTruth(dict[str, Any]):
    """Result of `build_ground_truth`."""


# (precision, recall), with the shapes above; -1 where there is no ground truth.
PrecisionRecall = tuple[np.ndarray, np.ndarray]

# A backend gets the ground truth, detections float64 [N, 7] (image id, x, y, width, height, score, category id) and the
# limits.
Backend = Callable[[GroundTruth, np.ndarray, Sequence[int]], PrecisionRecall]


def _hotcoco(
    ground_truth: GroundTruth, detections: np.ndarray, limits: Sequence[int]
) -> PrecisionRecall:
    import hotcoco

    coco = hotcoco.COCO(_with_valid_names(ground_truth))
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    evaluation.params.max_dets = list(limits)
    return _run(evaluation)


def _with_valid_names(ground_truth: GroundTruth) -> GroundTruth:
    """Return the ground truth with names that can be encoded in UTF-8, which hotcoco does; they change no metric.

    JSON may have half of a surrogate pair, and Python represents the bytes of file names in Latin-1 by such halves.
    """

    def fix(record: dict[str, Any], key: str) -> dict[str, Any]:
        name = record.get(key)
        if not isinstance(name, str):
            return record
        return {**record, key: name.encode("utf-8", "backslashreplace").decode()}

    return {
        **ground_truth,
        "images": [fix(image, "file_name") for image in ground_truth["images"]],
        "categories": [fix(category, "name") for category in ground_truth["categories"]],
    }


def _pycocotools(
    ground_truth: GroundTruth, detections: np.ndarray, limits: Sequence[int]
) -> PrecisionRecall:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    # pycocotools writes into the annotations, but evaluators share the ground truth: pass copies.
    annotations = [dict(annotation) for annotation in ground_truth["annotations"]]
    coco.dataset = {**ground_truth, "annotations": annotations}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.params.maxDets = list(limits)
    return _run(evaluation)


def _run(evaluation: Any) -> PrecisionRecall:
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    return np.asarray(curves["precision"]), np.asarray(curves["recall"])


# From fast to slow.
BACKENDS: dict[str, Backend] = {
    "hotcoco": _hotcoco,
    "pycocotools": _pycocotools,
}


def select_backend(name: str) -> str:
    """Return a name of BACKENDS. "auto" selects the fastest one that is installed, and logs it once.

    Raises:
        UserError: the backend is unknown or not installed.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"evaluator {name} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend) is not None]
    if name == "auto" and installed:
        _log_choice(installed[0])
        return installed[0]
    if name not in installed:
        package = "pycocotools" if name == "auto" else name
        raise UserError(f"evaluator {name} is not installed: pip install {package}")
    return name


@functools.cache  # logs a backend once, although each evaluation makes an evaluator
def _log_choice(backend: str) -> None:
    log.info("COCO metrics: computed by %s", backend)


class CocoEvaluator(DetectionEvaluator):
    """COCO metrics of boxes.

    Both backends were compared on random cases with crowds, more than 100 detections per image, equal scores and
    unlisted classes: hotcoco gives exactly the metrics of pycocotools.

    Args:
        ground_truth: from `build_ground_truth`, which is called for the content of any other COCO detection file.
            Evaluators share it and do not change it.
        backend: see `select_backend`.
        category_ids: see `DetectionEvaluator`.

    Raises:
        UserError: the backend is not installed.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        backend: str = "auto",
        category_ids: Mapping[int, int] | None = None,
    ) -> None:
        self.backend = select_backend(backend)
        if not isinstance(ground_truth, CompletedGroundTruth):
            ground_truth = build_ground_truth(ground_truth)
        self.ground_truth = ground_truth
        super().__init__((image["id"] for image in ground_truth["images"]), category_ids)

    def summarize(self) -> dict[str, Any]:
        """Return {"stats": the 12 values of `util.coco.BBOX_METRICS`, "per_class": rows}.

        There is a row for each class with ground-truth objects, in the order of the category ids: {"id", "name",
        "objects", "AP", "AP50", "AP75"}.

        As in pycocotools, -1 means that there is no ground truth for a value. Without any detections, all other values
        are 0.
        """
        category_ids = sorted(category["id"] for category in self.ground_truth["categories"])
        rows = self.rows_xywh()  # [N, 7]
        # Detections of unlisted classes match nothing. Limits count per class, so dropping them changes no metric.
        rows = rows[np.isin(rows[:, 6], category_ids)]
        if not len(rows):
            return _summary_without_detections(self.ground_truth)

        precision, recall = self._curves(rows, MAX_DETS)
        metrics = {}
        for k, category_id in enumerate(category_ids):
            values = [mean_valid(precision[ious, :, k, 0, -1]) for ious in IOU_SLICES]
            if values[0] > -1:
                metrics[category_id] = values
        return {
            "stats": _stats(precision, recall),
            "per_class": _per_class(self.ground_truth, metrics),
        }

    def _curves(self, rows: np.ndarray, limits: Sequence[int]) -> PrecisionRecall:
        # The backends print their progress.
        with contextlib.redirect_stdout(io.StringIO()):
            return BACKENDS[self.backend](self.ground_truth, rows, limits)


def _summary_without_detections(ground_truth: GroundTruth) -> dict[str, Any]:
    """Return the summary for no detections: 0 where there is ground truth, else -1.

    The backends do not accept an empty array. These are the values that the rules of pycocotools give.
    """
    objects = [a for a in ground_truth["annotations"] if not a["iscrowd"]]
    overall, *by_area = (
        0.0 if any(low <= a["area"] <= high for a in objects) else -1.0 for low, high in AREA_RANGES
    )
    low, high = AREA_RANGES[0]
    category_ids = sorted({a["category_id"] for a in objects if low <= a["area"] <= high})
    zeros = dict.fromkeys(category_ids, [0.0] * len(CLASS_METRICS))
    return {
        # AP, AP50, AP75 and AP by area, then AR1, AR10, AR100 and AR by area.
        "stats": [overall] * 3 + by_area + [overall] * 3 + by_area,
        "per_class": _per_class(ground_truth, zeros),
    }


def _per_class(
    ground_truth: GroundTruth, metrics: Mapping[int, Sequence[float]]
) -> list[dict[str, Any]]:
    """Return the rows of `CocoEvaluator.summarize`.

    Args:
        metrics: category id -> [AP, AP50, AP75].
    """
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    counts = Counter(a["category_id"] for a in ground_truth["annotations"] if not a["iscrowd"])
    return [
        {
            "id": category_id,
            "name": names[category_id],
            "objects": counts[category_id],
            **dict(zip(CLASS_METRICS, metrics[category_id], strict=True)),
        }
        for category_id in sorted(metrics)
    ]


def mean_valid(values: np.ndarray) -> float:
    """Return the mean of the values other than -1 (no ground truth); -1 if there are none."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _stats(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """Return the values of BBOX_METRICS, for the limits 1, 10 and 100."""
    ap = [mean_valid(precision[ious, :, :, 0, 2]) for ious in IOU_SLICES]
    ap_by_area = [mean_valid(precision[:, :, :, area, 2]) for area in (1, 2, 3)]
    ar = [mean_valid(recall[:, :, 0, limit]) for limit in (0, 1, 2)]
    ar_by_area = [mean_valid(recall[:, :, area, 2]) for area in (1, 2, 3)]
    return ap + ap_by_area + ar + ar_by_area


def build_ground_truth(content: Mapping[str, Any]) -> GroundTruth:
    """Return what the backends need of a COCO detection file.

    A missing `iscrowd` becomes 0, and 1 for an object with `ignore` 1, which pycocotools itself would not skip. A
    missing `area`, or one that can't be right, becomes the area of the box, and a rotated box the one around it, as in
    `parse_coco`. Annotation ids are renumbered from 1: pycocotools treats a ground-truth box with id 0 as unmatched. A
    class that is listed twice counts once.

    Annotations of unlisted images or classes are skipped, since they are never evaluated, and so are the boxes that
    `parse_coco` skips.
    """
    sizes_hw = {
        image["id"]: (image.get("height") or 0, image.get("width") or 0)
        for image in content["images"]
    }
    names = {category["id"]: class_name(category) for category in content["categories"]}
    listed = [
        a for a in content["annotations"] if a["image_id"] in sizes_hw and a["category_id"] in names
    ]
    sizes = np.array([sizes_hw[a["image_id"]] for a in listed]).reshape(-1, 2)  # [A, 2]
    objects = _complete(listed)
    evaluated = itertools.compress(objects, _is_evaluated(objects, sizes))

    image_keys = ("id", "width", "height", "file_name")
    images = [
        {key: image[key] for key in image_keys if image.get(key) is not None}
        for image in content["images"]
    ]
    return CompletedGroundTruth(
        info={},
        images=images,
        annotations=[{"id": i, **a} for i, a in enumerate(evaluated, start=1)],
        categories=[{"id": category_id, "name": name} for category_id, name in names.items()],
    )


def _complete(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the backends need of annotations, except the ids. Values that can be used stay as in the file."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    rotated, boxes = rotate_boxes(annotations, boxes)  # [A], [A, 4]
    _, areas = parse_areas(annotations)
    usable = is_usable_area(areas, boxes)  # [A]

    completed = []
    for i, annotation in enumerate(annotations):
        bbox = boxes[i].tolist() if rotated[i] else annotation["bbox"]
        completed.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": bbox,
                "area": annotation["area"] if usable[i] else bbox[2] * bbox[3],
                "iscrowd": int(is_ignored_region(annotation)),
            }
        )
    return completed


def _is_evaluated(annotations: Sequence[dict[str, Any]], sizes_hw: np.ndarray) -> np.ndarray:
    """Return which annotations are evaluated, bool [A]: finite ones that are crowds or have an area in their image.

    Args:
        sizes_hw: [A, 2], size of each annotation's image.
    """
    # In float32, as in training: the same boxes must count as infinite or without area.
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # [A, 4], x0, y0, x1, y1
    crowd = np.array([a["iscrowd"] for a in annotations], dtype=bool)
    return np.isfinite(boxes).all(1) & (crowd | has_visible_area(boxes, sizes_hw))
