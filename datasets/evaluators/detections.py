"""The base class of all evaluators: collects detections image by image and merges them over processes."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from util.distributed import all_gather_object
from util.gc_paused import gc_paused

Value = TypeVar("Value")


def gather_by_image(values: dict[int, Value]) -> dict[int, Value]:
    """Return the values of all ranks by image id. Of an image that several ranks have, the last rank counts."""
    merged: dict[int, Value] = {}
    for of_rank in all_gather_object(values):
        merged.update(of_rank)
    return merged


class DetectionEvaluator:
    """Collects the detections of a dataset. An image that is seen twice, or on several ranks, counts once.

    Args:
        image_ids: the images of the dataset.
        category_ids: label -> category id of the annotation file; None if labels are these ids. A detection whose
            label has no id is dropped: no ground-truth box could match it.
    """

    def __init__(
        self, image_ids: Iterable[int], category_ids: Mapping[int, int] | None = None
    ) -> None:
        self._image_ids = set(image_ids)
        self._category_ids = category_ids
        self._detections: dict[int, np.ndarray] = {}  # image id -> [N, 7], see `rows`

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the detections of some images.

        Args:
            predictions: image id -> {"scores" [N], "labels" [N], "boxes" [N, 4], (x0, y0, x1, y1) in pixels}.

        Raises:
            ValueError: an image id is not in the annotations.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._image_ids:
                raise ValueError(f"image {image_id} is not in the annotations")
            rows = np.empty((len(prediction["boxes"]), 7))
            rows[:, 0] = image_id
            rows[:, 1:5] = prediction["boxes"].detach().double().cpu().numpy()
            rows[:, 5] = prediction["scores"].detach().double().cpu().numpy()
            rows[:, 6] = prediction["labels"].cpu().numpy()
            if self._category_ids is not None:
                rows = self._labels_to_category_ids(rows)
            self._detections[image_id] = rows  # [N, 7]

    def _has_category_id(self, label: int) -> bool:
        return self._category_ids is None or label in self._category_ids

    def _labels_to_category_ids(self, rows: np.ndarray) -> np.ndarray:
        rows = rows[np.isin(rows[:, 6], list(self._category_ids))]
        rows[:, 6] = [self._category_ids[int(label)] for label in rows[:, 6]]
        return rows

    def synchronize_between_processes(self) -> None:
        """Give each rank the detections of all ranks."""
        self._detections = gather_by_image(self._detections)

    def rows(self) -> np.ndarray:
        """Return all detections, float64 [N, 7]: (image id, x0, y0, x1, y1, score, category id).

        They are sorted by image id, so that equal scores have the same order on any number of processes.
        """
        ordered = [self._detections[image_id] for image_id in sorted(self._detections)]
        return np.concatenate(ordered) if ordered else np.zeros((0, 7))

    def rows_xywh(self) -> np.ndarray:
        """Return the same as `rows`, with (x, y, width, height) of each box."""
        rows = self.rows()  # a copy, safe to change in place
        rows[:, 3:5] -= rows[:, 1:3]
        return rows

    def results(self) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, with `bbox` as x, y, width, height."""
        with gc_paused():
            return self._results()

    def _results(self) -> list[dict[str, Any]]:
        return [
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": bbox,
                "score": score,
            }
            # One `tolist` for all rows, 500 000 of COCO's validation set.
            for image_id, *bbox, score, category_id in self.rows_xywh().tolist()
        ]
