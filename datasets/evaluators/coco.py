"""COCO average precision and recall of boxes and masks.

Shapes: N detections, A ground-truth boxes, K classes. Precision is [10 IoU thresholds, 101 recalls, K, 4 areas, M],
recall is [10, K, 4, M], for M limits: the maximum number of detections per image and class.
"""

import contextlib
import functools
import importlib.util
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datasets.evaluators.detections import DetectionEvaluator, gather_by_image
from datasets.labelled.box_formats import has_visible_area
from datasets.labelled.coco_parser import (
    class_name,
    is_ignored_region,
    is_usable_area,
    parse_areas,
    rotate_boxes,
)
from datasets.labelled.segmentations import (
    SegmentationError,
    SegmentationTexts,
    Size,
    to_rle_or_box,
)
from util.coco import CLASS_METRICS, MASK_CLASS_METRICS
from util.errors import UserError
from util.logger import log
from util.masks import RLE

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

# Detections by box, float64 [N, 7] (image id, x, y, width, height, score, category id), or by mask, in COCO's results
# format, see `_mask_results`.
Detections = np.ndarray | list[dict[str, Any]]

# A backend gets the ground truth, the detections, the limits, and what to compare: "bbox" or "segm".
Backend = Callable[[GroundTruth, Detections, Sequence[int], str], PrecisionRecall]


def _hotcoco(
    ground_truth: GroundTruth, detections: Detections, limits: Sequence[int], iou_type: str
) -> PrecisionRecall:
    import hotcoco

    coco = hotcoco.COCO(_with_valid_names(ground_truth))
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), iou_type)
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
    ground_truth: GroundTruth, detections: Detections, limits: Sequence[int], iou_type: str
) -> PrecisionRecall:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    # pycocotools writes into the annotations, but evaluators share the ground truth: pass copies.
    annotations = [dict(annotation) for annotation in ground_truth["annotations"]]
    coco.dataset = {**ground_truth, "annotations": annotations}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), iou_type)
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
    """COCO metrics of boxes, and of masks.

    Both backends were compared on random cases with crowds, more than 100 detections per image, equal scores, unlisted
    classes and empty masks: hotcoco gives exactly the metrics of pycocotools.

    Args:
        ground_truth: from `build_ground_truth`, which is called for the content of any other COCO detection file.
            Evaluators share it and do not change it.
        backend: see `select_backend`.
        category_ids: see `DetectionEvaluator`.
        masks: also evaluate masks. Each annotation then has its mask in `segmentation`, as RLE.

    Raises:
        UserError: the backend is not installed.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        backend: str = "auto",
        category_ids: Mapping[int, int] | None = None,
        masks: bool = False,
    ) -> None:
        self.backend = select_backend(backend)
        if not isinstance(ground_truth, CompletedGroundTruth):
            ground_truth = build_ground_truth(ground_truth)
        self.ground_truth = ground_truth
        self.masks = masks
        # image id -> (size of the masks, their counts in the order of the detections)
        self._masks: dict[int, tuple[list[int], list[bytes]]] = {}
        super().__init__((image["id"] for image in ground_truth["images"]), category_ids)

    @functools.cached_property
    def _mask_sizes(self) -> dict[int, list[int]]:
        """Image id -> [height, width] of the masks of the ground truth."""
        annotations = self.ground_truth["annotations"]
        return {a["image_id"]: list(a["segmentation"]["size"]) for a in annotations}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the detections of some images, see `DetectionEvaluator.update`.

        With masks, each prediction also has "masks": the RLE of each detection, in the order of the scores. It may be
        None without detections.

        Raises:
            ValueError: an image id is not in the annotations, there are more or fewer masks than detections, or masks
                differ in size from those of the ground truth.
        """
        super().update(predictions)
        if self.masks:
            for image_id, prediction in predictions.items():
                self._masks[image_id] = self._pack_masks(image_id, prediction)

    def _pack_masks(
        self, image_id: int, prediction: Mapping[str, Any]
    ) -> tuple[list[int], list[bytes]]:
        rles = prediction.get("masks") or []
        labels = prediction["labels"].tolist()
        if len(rles) != len(labels):
            raise ValueError(f"image {image_id} has {len(rles)} masks for {len(labels)} detections")

        size = list(rles[0]["size"]) if rles else []
        expected = self._mask_sizes.get(image_id, size)
        for rle in rles:
            if list(rle["size"]) != expected:
                raise ValueError(
                    f"image {image_id} has a predicted mask of (height, width) {tuple(rle['size'])}, "
                    f"but masks of {tuple(expected)} in the annotations"
                )
        counts = [rle["counts"] for rle in rles]
        counts = [c.encode() if isinstance(c, str) else c for c in counts]
        return size, list(itertools.compress(counts, map(self._has_category_id, labels)))

    def synchronize_between_processes(self) -> None:
        """Give each rank the detections and masks of all ranks."""
        super().synchronize_between_processes()
        if self.masks:
            self._masks = gather_by_image(self._masks)

    def _rles(self) -> list[RLE]:
        """Return the masks of all detections, in the order of `rows`."""
        ordered = [self._masks[image_id] for image_id in sorted(self._masks)]
        return [{"size": size, "counts": counts} for size, masks in ordered for counts in masks]

    def results(self) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, with masks also the RLE in `segmentation`.

        pycocotools takes the area of a result with `bbox` from the box, also to evaluate masks. Remove `bbox` to get
        the AP and AR of small, medium and large objects of `summarize` from a file.
        """
        results = super().results()
        if self.masks:
            for result, rle in zip(results, self._rles(), strict=True):
                result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        return results

    def summarize(self) -> dict[str, Any]:
        """Return {"stats": the 12 values of `util.coco.BBOX_METRICS`, "per_class": rows}.

        There is a row for each class with ground-truth objects, in the order of the category ids: {"id", "name",
        "objects", "AP", "AP50", "AP75"}.

        With masks, "stats_masks" has the 12 values of masks, and the rows "mask AP" and "mask AP50".

        As in pycocotools, -1 means that there is no ground truth for a value. Without any detections, all other values
        are 0.
        """
        category_ids = sorted(category["id"] for category in self.ground_truth["categories"])
        rows = self.rows_xywh()  # [N, 7]
        # Detections of unlisted classes match nothing. Limits count per class, so dropping them changes no metric.
        listed = np.isin(rows[:, 6], category_ids)  # [N]
        rows = rows[listed]
        if not len(rows):
            summary = _summary_without_detections(self.ground_truth)
            return _with_mask_zeros(summary) if self.masks else summary

        precision, recall = self._curves(rows, MAX_DETS)
        metrics = _class_metrics(precision, category_ids)
        summary = {
            "stats": _stats(precision, recall),
            "per_class": _per_class(self.ground_truth, metrics),
        }
        if self.masks:
            results = _mask_results(rows, itertools.compress(self._rles(), listed))
            precision, recall = self._curves(results, MAX_DETS, "segm")
            summary["stats_masks"] = _stats(precision, recall)
            _add_mask_metrics(summary["per_class"], _class_metrics(precision, category_ids))
        return summary

    def _curves(
        self, detections: Detections, limits: Sequence[int], iou_type: str = "bbox"
    ) -> PrecisionRecall:
        # The backends print their progress.
        with contextlib.redirect_stdout(io.StringIO()):
            return BACKENDS[self.backend](self.ground_truth, detections, limits, iou_type)


def _mask_results(rows: np.ndarray, rles: Iterable[RLE]) -> list[dict[str, Any]]:
    """Return detections by mask, in COCO's results format.

    They have no `bbox`: with one, both backends would take a detection's area from its box.

    Args:
        rows: [N, 7], detections by box.
        rles: their masks.
    """
    return [
        {"image_id": int(row[0]), "category_id": int(row[6]), "score": row[5], "segmentation": rle}
        for row, rle in zip(rows.tolist(), rles, strict=True)
    ]


def _class_metrics(precision: np.ndarray, category_ids: Sequence[int]) -> dict[int, list[float]]:
    """Return category id -> [AP, AP50, AP75] of classes with ground-truth objects."""
    metrics = {}
    for k, category_id in enumerate(category_ids):
        values = [mean_valid(precision[ious, :, k, 0, -1]) for ious in IOU_SLICES]
        if values[0] > -1:
            metrics[category_id] = values
    return metrics


def _add_mask_metrics(
    per_class: list[dict[str, Any]], metrics: Mapping[int, Sequence[float]]
) -> None:
    """Add the metrics of masks to the rows of `CocoEvaluator.summarize`. metrics: see `_class_metrics`."""
    for row in per_class:
        row.update(zip(MASK_CLASS_METRICS, metrics[row["id"]], strict=False))  # without AP75


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


def _with_mask_zeros(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary for no detections with the metrics of masks, which are those of boxes."""
    zeros = dict.fromkeys(MASK_CLASS_METRICS, 0.0)
    per_class = [{**row, **zeros} for row in summary["per_class"]]
    return {**summary, "stats_masks": list(summary["stats"]), "per_class": per_class}


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


def build_ground_truth(
    content: Mapping[str, Any],
    segmentations: SegmentationTexts | None = None,
    sizes_hw: Mapping[int, Size] | None = None,
) -> GroundTruth:
    """Return what the backends need of a COCO detection file.

    A missing `iscrowd` becomes 0, and 1 for an object with `ignore` 1, which pycocotools itself would not skip. A
    missing `area`, or one that can't be right, becomes the area of the box, and a rotated box the one around it, as in
    `parse_coco`. Annotation ids are renumbered from 1: pycocotools treats a ground-truth box with id 0 as unmatched. A
    class that is listed twice counts once.

    Annotations of unlisted images or classes are skipped, since they are never evaluated, and so are the boxes that
    `parse_coco` skips.

    Args:
        segmentations: texts that were replaced in `content`, see `read_json`. With them each annotation has
            `segmentation`: compressed RLE {"size", "counts"} of the size of its image. The mask of an object without a
            usable segmentation is its whole box.
        sizes_hw: image id -> (height, width) of images for which `content` does not say it.
    """
    listed_hw = {
        image["id"]: (image.get("height") or 0, image.get("width") or 0)
        for image in content["images"]
    }
    names = {category["id"]: class_name(category) for category in content["categories"]}
    listed = [
        a
        for a in content["annotations"]
        if a["image_id"] in listed_hw and a["category_id"] in names
    ]
    sizes = np.array([listed_hw[a["image_id"]] for a in listed]).reshape(-1, 2)  # [A, 2]
    objects = _complete(listed)
    if segmentations is not None:
        _add_masks(objects, listed, segmentations, {**listed_hw, **(sizes_hw or {})})
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


def _add_masks(
    objects: Sequence[dict[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    segmentations: SegmentationTexts,
    sizes_hw: Mapping[int, Size],
) -> None:
    """Add `segmentation` to each object, from the annotation at the same place."""
    broken = []
    for target, annotation in zip(objects, annotations, strict=True):
        x, y, width, height = np.nan_to_num(target["bbox"], posinf=0, neginf=0).tolist()
        box, size_hw = (x, y, x + width, y + height), sizes_hw[target["image_id"]]
        if not all(size_hw):  # the file is missing, too: such an image has no detections
            size_hw = (max(int(y + height), 1), max(int(x + width), 1))
        text = segmentations.text(annotation.get("segmentation"))
        try:
            rle = to_rle_or_box(text, box, size_hw)
        except SegmentationError as error:
            broken.append(f"annotation {annotation.get('id')}: {error}")
            rle = to_rle_or_box(None, box, size_hw)
        target["segmentation"] = {"size": list(size_hw), "counts": rle["counts"].decode()}
    if broken:
        log.warning(
            "%d segmentations can't be decoded, and their boxes are the masks in evaluation, the first: %s",
            len(broken),
            broken[0],
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
