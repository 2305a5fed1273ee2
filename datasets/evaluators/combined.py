"""Boxes, instance masks and panoptic segments of one dataset, evaluated together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasets.evaluators.detections import DetectionEvaluator
from datasets.evaluators.panoptic import PanopticEvaluator


class CombinedEvaluator:
    """COCO metrics and panoptic quality of the same predictions, see both evaluators."""

    def __init__(self, coco: DetectionEvaluator, panoptic: PanopticEvaluator) -> None:
        self.coco, self.panoptic = coco, panoptic

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the predictions of some images; `panoptic` is what `PanopticEvaluator.update` gets."""
        self.coco.update(predictions)
        self.panoptic.update({image_id: p["panoptic"] for image_id, p in predictions.items()})

    def synchronize_between_processes(self) -> None:
        self.coco.synchronize_between_processes()
        self.panoptic.synchronize_between_processes()

    def summarize(self) -> dict[str, Any]:
        return {**self.coco.summarize(), **self.panoptic.summarize()}

    def results(self) -> list[dict[str, Any]]:
        return self.coco.results()

    def rows(self) -> np.ndarray:
        return self.coco.rows()
