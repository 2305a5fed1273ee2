"""What every evaluator of boxes does alike: it collects detections image by image, over all processes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from util.distributed import all_gather_object


class Detections:
    """Detections of the images of a data set; an image that comes twice, or from several processes, counts once.

    image_ids: those that may come. category_ids: the annotations' category id of each label, None where labels are
    these ids; a detection whose label has none is left out, since nothing could match it.
    """

    def __init__(
        self, image_ids: Iterable[int], category_ids: Mapping[int, int] | None = None
    ) -> None:
        self._image_ids, self._category_ids = set(image_ids), category_ids
        self._detections: dict[int, np.ndarray] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Adds {image id: {"scores" [N], "labels" [N], "boxes" [N, 4], (x0, y0, x1, y1) in pixels}}.

        Raises:
            ValueError: an image id that the annotations do not list.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._image_ids:
                raise ValueError(f"image {image_id} is not in the annotations")
            rows = np.empty((len(prediction["boxes"]), 7))
            rows[:, 0] = image_id
            rows[:, 1:5] = prediction["boxes"].detach().double().cpu().numpy()
            rows[:, 5] = prediction["scores"].detach().double().cpu().numpy()
            rows[:, 6] = prediction["labels"].cpu().numpy()
            self._detections[image_id] = (
                rows if self._category_ids is None else self._with_category_ids(rows)
            )

    def _with_category_ids(self, rows: np.ndarray) -> np.ndarray:
        known = rows[np.isin(rows[:, 6], list(self._category_ids))]
        known[:, 6] = [self._category_ids[int(label)] for label in known[:, 6]]
        return known

    def synchronize_between_processes(self) -> None:
        """Gives every process the detections of all."""
        merged: dict[int, np.ndarray] = {}
        for detections in all_gather_object(self._detections):
            merged.update(detections)
        self._detections = merged

    def rows(self) -> np.ndarray:
        """float64 [N, 7] in the order of the image ids: (image id, x0, y0, x1, y1, score, category id)."""
        ordered = [self._detections[image_id] for image_id in sorted(self._detections)]
        return np.concatenate(ordered) if ordered else np.zeros((0, 7))

    def rows_xywh(self) -> np.ndarray:
        """The same with (x, y, width, height) for a box."""
        rows = self.rows()
        rows[:, 3:5] -= rows[:, 1:3]
        return rows

    def results(self) -> list[dict[str, Any]]:
        """The detections in COCO's results format (`bbox` as x, y, width, height)."""
        return [
            {
                "image_id": int(row[0]),
                "category_id": int(row[6]),
                "bbox": row[1:5].tolist(),
                "score": float(row[5]),
            }
            for row in self.rows_xywh()
        ]
