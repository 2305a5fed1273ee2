"""Average precision and recall of boxes as COCO defines them."""

import contextlib
import functools
import importlib.util
import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from datasets.evaluators.detections import Detections
from datasets.labelled.annotations import has_area
from util.coco import CLASS_METRICS
from util.errors import UserError
from util.logger import log

THRESHOLDS = (slice(None), slice(0, 1), slice(5, 6))  # of the ten those of AP, AP50, AP75
LIMITS = (1, 10, 100)  # detections of a class in an image, the best ones
AREAS = (  # square pixels, both ends inside
    (0, 1e10),  # all
    (0, 32**2),  # small
    (32**2, 96**2),  # medium
    (96**2, 1e10),  # large
)

GroundTruth = dict[str, Any]  # content of a COCO detection file as `ground_truth_of` completes it

# A backend gets the ground truth, detections float64 [N, 7] (image id, x, y, w, h, score, category id) and limits; it
# returns precision [10 thresholds, 101 recalls, K classes, 4 areas, limits] and recall [10, K, 4, limits]; -1: no
# ground truth.
Curves = tuple[np.ndarray, np.ndarray]


def _hotcoco(ground_truth: GroundTruth, detections: np.ndarray, limits: Sequence[int]) -> Curves:
    import hotcoco

    coco = hotcoco.COCO(ground_truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    evaluation.params.max_dets = list(limits)
    return _run(evaluation)


def _pycocotools(
    ground_truth: GroundTruth, detections: np.ndarray, limits: Sequence[int]
) -> Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    own = [
        dict(annotation) for annotation in ground_truth["annotations"]
    ]  # pycocotools writes into them
    coco.dataset = {**ground_truth, "annotations": own}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.params.maxDets = list(limits)
    return _run(evaluation)


def _run(evaluation: Any) -> Curves:
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    return np.asarray(curves["precision"]), np.asarray(curves["recall"])


BACKENDS: dict[str, Callable[[GroundTruth, np.ndarray, Sequence[int]], Curves]] = {
    "hotcoco": _hotcoco,
    "pycocotools": _pycocotools,
}


def choose_backend(name: str) -> str:
    """A name of BACKENDS; "auto" is the fastest that is installed (they are listed from fast to slow), which is logged
    once.

    Raises:
        UserError: unknown or not installed.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"evaluator {name} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend) is not None]
    if name == "auto" and installed:
        _log_choice(installed[0])
        return installed[0]
    if name not in installed:
        raise UserError(
            f"evaluator {name} is not installed: pip install {'pycocotools' if name == 'auto' else name}"
        )
    return name


@functools.cache
def _log_choice(backend: str) -> None:
    log.info("COCO metrics: computed by %s", backend)


class CocoEvaluator(Detections):
    """Collects detections image by image and compares them with the ground truth of a COCO detection file.

    Both backends were compared on random cases with crowds, more than 100 detections an image, equal scores and
    unlisted classes: hotcoco gives exactly pycocotools' metrics.

    ground_truth: from `ground_truth_of`; evaluators share it and don't change it. category_ids: see `Detections`.

    Raises:
        UserError: a backend that isn't installed.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        backend: str = "auto",
        category_ids: Mapping[int, int] | None = None,
    ) -> None:
        self.backend = choose_backend(backend)
        self.ground_truth = ground_truth
        super().__init__((image["id"] for image in ground_truth["images"]), category_ids)

    def summarize(self) -> dict[str, Any]:
        """{"stats": the 12 values of `util.coco.BBOX_METRICS`, "per_class": a row for each class with objects in the
        ground truth}.

        A row is {"id", "name", "objects", "AP", "AP50", "AP75"}, in the order of the category ids. As in pycocotools,
        -1 stands for a value without ground truth. Without a single detection the others are 0.
        """
        classes = sorted(category["id"] for category in self.ground_truth["categories"])
        rows = self.rows_xywh()
        rows = rows[np.isin(rows[:, 6], classes)]  # others match nothing, and limits count by class
        if not len(rows):
            return _without_detections(self.ground_truth)
        precision, recall = self._curves(rows, LIMITS)
        values = {
            label: [mean_of_known(precision[select, :, k, 0, -1]) for select in THRESHOLDS]
            for k, label in enumerate(classes)
        }
        known = {label: numbers for label, numbers in values.items() if numbers[0] > -1}
        return {
            "stats": _stats(precision, recall),
            "per_class": _per_class(self.ground_truth, known),
        }

    def _curves(self, rows: np.ndarray, limits: Sequence[int]) -> Curves:
        with contextlib.redirect_stdout(io.StringIO()):
            return BACKENDS[self.backend](self.ground_truth, rows, limits)


def _without_detections(ground_truth: GroundTruth) -> dict[str, Any]:
    """What pycocotools' rules give where nothing was found, which the backends do not take: 0 where there is ground
    truth, else -1.
    """
    objects = [
        annotation for annotation in ground_truth["annotations"] if not annotation["iscrowd"]
    ]
    overall, *by_area = (
        0.0 if any(low <= annotation["area"] <= high for annotation in objects) else -1.0
        for low, high in AREAS
    )
    classes = sorted(
        {
            annotation["category_id"]
            for annotation in objects
            if AREAS[0][0] <= annotation["area"] <= AREAS[0][1]
        }
    )
    return {
        "stats": [overall] * 3 + by_area + [overall] * 3 + by_area,
        "per_class": _per_class(ground_truth, dict.fromkeys(classes, [0.0] * 3)),
    }


def _per_class(
    ground_truth: GroundTruth, values: Mapping[int, Sequence[float]]
) -> list[dict[str, Any]]:
    """values: category id -> AP, AP50, AP75. Rows as `CocoEvaluator.summarize` gives them."""
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    counts = Counter(
        annotation["category_id"]
        for annotation in ground_truth["annotations"]
        if not annotation["iscrowd"]
    )
    return [
        {
            "id": label,
            "name": names[label],
            "objects": counts[label],
            **dict(zip(CLASS_METRICS, values[label], strict=True)),
        }
        for label in sorted(values)
    ]


def mean_of_known(values: np.ndarray) -> float:
    """-1 where nothing is known."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _stats(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """The values of BBOX_METRICS. Axes as in `Curves`; areas: all, small, medium, large; limits: 1, 10, 100 detections
    an image.
    """
    thresholds = [mean_of_known(precision[select, :, :, 0, 2]) for select in THRESHOLDS]
    areas = [mean_of_known(precision[:, :, :, area, 2]) for area in (1, 2, 3)]
    limits = [mean_of_known(recall[:, :, 0, limit]) for limit in (0, 1, 2)]
    area_recalls = [mean_of_known(recall[:, :, area, 2]) for area in (1, 2, 3)]
    return thresholds + areas + limits + area_recalls


def ground_truth_of(content: Mapping[str, Any]) -> GroundTruth:
    """What the backends need of a COCO detection file's content, complete: a missing `iscrowd` is 0, a missing `area`
    is the box's, ids count from 1 (pycocotools takes an annotation with id 0 for unmatched).

    Annotations of unlisted images or classes are skipped, as they are never evaluated, and so are the boxes that
    `parse_coco` skips. A class that is listed twice counts once.
    """
    sizes_hw = {
        image["id"]: (image.get("height") or 0, image.get("width") or 0)
        for image in content["images"]
    }
    classes = {category["id"]: str(category.get("name", "")) for category in content["categories"]}
    listed = [
        a
        for a in content["annotations"]
        if a["image_id"] in sizes_hw and a["category_id"] in classes
    ]
    counted = _counted(listed, np.array([sizes_hw[a["image_id"]] for a in listed]).reshape(-1, 2))
    keys = ("id", "width", "height", "file_name")
    annotations = [
        {
            "id": i,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": a["area"]
            if isinstance(a.get("area"), int | float)
            else a["bbox"][2] * a["bbox"][3],
            "iscrowd": a.get("iscrowd") or 0,
        }
        for i, a in enumerate(itertools.compress(listed, counted), start=1)
    ]
    return {
        "info": {},
        "images": [
            {key: image[key] for key in keys if image.get(key) is not None}
            for image in content["images"]
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in classes.items()],
    }


def _counted(annotations: Sequence[dict[str, Any]], sizes_hw: np.ndarray) -> np.ndarray:
    """bool [A]: crowds, and boxes with something to find: finite, in float32 as they are trained on, and with an area
    in their image.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.array(
            [annotation["bbox"] for annotation in annotations], dtype=np.float32
        ).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    return np.isfinite(boxes).all(1) & (crowd | has_area(boxes, sizes_hw))
