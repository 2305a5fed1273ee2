"""Average precision and recall of boxes as COCO defines them."""

import contextlib
import importlib.util
import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from datasets.evaluators.detections import Detections
from datasets.labelled.annotations import has_area, read_json
from util.errors import UserError

STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
THRESHOLDS = (slice(None), slice(0, 1), slice(5, 6))  # of the ten those of AP, AP50, AP75
LIMITS = (1, 10, 100)  # detections of a class in an image, the best ones
AREAS = (
    (0, 1e10),
    (0, 32**2),
    (32**2, 96**2),
    (96**2, 1e10),
)  # all, small, medium, large; square pixels, both ends inside

# A matcher gets the ground truth (a COCO dict), detections float64 [N, 7] (image id, x, y, w, h, score, category id)
# and limits; it returns precision [10 thresholds, 101 recalls, K classes, 4 areas, limits] and recall [10, K, 4,
# limits]; -1 = no truth.
Curves = tuple[np.ndarray, np.ndarray]


def _hotcoco(truth: dict[str, Any], detections: np.ndarray, limits: Sequence[int]) -> Curves:
    import hotcoco

    coco = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    evaluation.params.max_dets = list(limits)
    return _run(evaluation)


def _faster_coco_eval(truth: dict[str, Any], detections: np.ndarray, limits: Sequence[int]) -> Curves:
    from faster_coco_eval import COCO, COCOeval_faster

    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(detections), "bbox")
    evaluation.params.maxDets = list(limits)
    return _run(evaluation)


def _pycocotools(truth: dict[str, Any], detections: np.ndarray, limits: Sequence[int]) -> Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.params.maxDets = list(limits)
    return _run(evaluation)


def _run(evaluation: Any) -> Curves:
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    return np.asarray(curves["precision"]), np.asarray(curves["recall"])


BACKENDS: dict[str, Callable[[dict[str, Any], np.ndarray, Sequence[int]], Curves]] = {
    "hotcoco": _hotcoco,
    "faster_coco_eval": _faster_coco_eval,
    "pycocotools": _pycocotools,
}


def choose_backend(name: str) -> str:
    """A name of BACKENDS; "auto" is the fastest that is installed (they are listed from fast to slow).

    Raises:
        UserError: unknown or not installed.
    """
    installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend) is not None]
    if name == "auto" and installed:
        return installed[0]
    if name not in BACKENDS and name != "auto":
        raise UserError(f"evaluator {name} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    if name not in installed:
        package = "pycocotools" if name == "auto" else name.replace("_", "-")
        raise UserError(f"evaluator {name} is not installed: pip install {package}")
    return name


class CocoEvaluator(Detections):
    """Collects detections image by image and compares them with a COCO detection file.

    All three backends were compared on random cases with crowds, more than 100 detections an image, equal scores and
    unlisted classes: hotcoco gives exactly pycocotools' numbers, faster_coco_eval the same to 1e-15.

    annotation_file: path, or the content as a dict. category_ids: see `Detections`.

    Raises:
        UserError: unreadable annotations, or a backend that isn't installed.
    """

    def __init__(
        self,
        annotation_file: str | dict[str, Any],
        backend: str = "auto",
        category_ids: Mapping[int, int] | None = None,
    ) -> None:
        self.backend = choose_backend(backend)
        self.truth = _slim_truth(annotation_file)
        super().__init__((image["id"] for image in self.truth["images"]), category_ids)

    def summarize(self) -> dict[str, Any]:
        """{"stats": the 12 numbers in the order of STAT_NAMES, "per_class": a row for each class with objects in the
        truth}.

        A row is {"id", "name", "objects", "AP", "AP50", "AP75"}, in the order of the category ids. As in pycocotools,
        -1 stands for a number without ground truth. Without a single detection the others are 0.
        """
        classes = sorted(category["id"] for category in self.truth["categories"])
        rows = self.rows_xywh()
        rows = rows[np.isin(rows[:, 6], classes)]  # others match nothing, and limits count by class
        if not len(rows):
            return _without_detections(self.truth)
        precision, recall = self._curves(rows, LIMITS)
        values = {
            label: [mean_of_known(precision[select, :, k, 0, -1]) for select in THRESHOLDS]
            for k, label in enumerate(classes)
        }
        known = {label: numbers for label, numbers in values.items() if numbers[0] > -1}
        return {"stats": _stats(precision, recall), "per_class": _per_class(self.truth, known)}

    def _curves(self, rows: np.ndarray, limits: Sequence[int]) -> Curves:
        with contextlib.redirect_stdout(io.StringIO()):
            return BACKENDS[self.backend](self.truth, rows, limits)


def _without_detections(truth: dict[str, Any]) -> dict[str, Any]:
    """What pycocotools' rules give where nothing was found, which the backends do not take: 0 where there is truth,
    else -1.
    """
    objects = [annotation for annotation in truth["annotations"] if not annotation["iscrowd"]]
    overall, *by_area = (
        0.0 if any(low <= annotation["area"] <= high for annotation in objects) else -1.0 for low, high in AREAS
    )
    classes = sorted(
        {annotation["category_id"] for annotation in objects if AREAS[0][0] <= annotation["area"] <= AREAS[0][1]}
    )
    return {
        "stats": [overall] * 3 + by_area + [overall] * 3 + by_area,
        "per_class": _per_class(truth, dict.fromkeys(classes, [0.0] * 3)),
    }


def _per_class(truth: dict[str, Any], values: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """values: category id -> AP, AP50, AP75. Rows as `CocoEvaluator.summarize` gives them."""
    names = {category["id"]: category["name"] for category in truth["categories"]}
    counts = Counter(annotation["category_id"] for annotation in truth["annotations"] if not annotation["iscrowd"])
    return [
        {
            "id": label,
            "name": names[label],
            "objects": counts[label],
            **dict(zip(STAT_NAMES[:3], values[label], strict=True)),
        }
        for label in sorted(values)
    ]


def mean_of_known(values: np.ndarray) -> float:
    """-1 where nothing is known."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _stats(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """COCO's 12 numbers. Axes as in `Curves`; areas: all, small, medium, large; limits: 1, 10, 100 detections an
    image.
    """
    thresholds = [mean_of_known(precision[select, :, :, 0, 2]) for select in THRESHOLDS]
    areas = [mean_of_known(precision[:, :, :, area, 2]) for area in (1, 2, 3)]
    limits = [mean_of_known(recall[:, :, 0, limit]) for limit in (0, 1, 2)]
    area_recalls = [mean_of_known(recall[:, :, area, 2]) for area in (1, 2, 3)]
    return thresholds + areas + limits + area_recalls


def _slim_truth(annotation_file: str | dict[str, Any]) -> dict[str, Any]:
    """What the backends need, complete: missing `iscrowd` is 0, missing `area` is the box's, ids count from 1.

    (pycocotools takes an annotation with id 0 for unmatched.) Annotations of unlisted images or classes are left out,
    as they are never evaluated, and so are the boxes that `parse_coco` leaves out. A class that is listed twice counts
    once.
    """
    content = annotation_file if isinstance(annotation_file, dict) else read_json(annotation_file)
    sizes_hw = {image["id"]: (image.get("height") or 0, image.get("width") or 0) for image in content["images"]}
    classes = {category["id"]: str(category.get("name", "")) for category in content["categories"]}
    listed = [a for a in content["annotations"] if a["image_id"] in sizes_hw and a["category_id"] in classes]
    counted = _counted(listed, np.array([sizes_hw[a["image_id"]] for a in listed]).reshape(-1, 2))
    keys = ("id", "width", "height", "file_name")
    annotations = [
        {
            "id": i,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": a["area"] if isinstance(a.get("area"), int | float) else a["bbox"][2] * a["bbox"][3],
            "iscrowd": a.get("iscrowd") or 0,
        }
        for i, a in enumerate(itertools.compress(listed, counted), start=1)
    ]
    return {
        "info": {},
        "images": [{key: image[key] for key in keys if image.get(key) is not None} for image in content["images"]],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in classes.items()],
    }


def _counted(annotations: Sequence[dict[str, Any]], sizes_hw: np.ndarray) -> np.ndarray:
    """bool [A]: crowds, and boxes with something to find: finite, in float32 as they are trained on, and with an area
    in their image.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    return np.isfinite(boxes).all(1) & (crowd | has_area(boxes, sizes_hw))
