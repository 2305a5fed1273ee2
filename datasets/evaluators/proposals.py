"""Boxes without classes: how much of what is annotated do they cover? As DETReg reports it (Bar et al., CVPR 2022, section 4.4)."""
from typing import Any

import torch
from torch import Tensor

from datasets.evaluators.coco import CocoEvaluator, mean_of_known
from util.distributed import all_gather_object

LIMITS = (1, 10, 100, 1000)
OBJECT = 1


class BoxSpread:
    """Where the boxes of a model's queries differ: from image to image, or from query to query.

    A model that gives every image the same boxes, well spread, has a high recall too, and has found nothing.
    """

    def __init__(self) -> None:
        self.images, self.sums = 0, torch.zeros(2, 1, 1)

    def update(self, boxes: Tensor) -> None:
        """boxes [B, Q, 4] of B images, the q-th of each from the same query."""
        boxes = boxes.double()
        self.images, self.sums = self.images + len(boxes), self.sums.to(boxes) + torch.stack([boxes.sum(0), boxes.square().sum(0)])

    def image_share(self) -> float:
        """Variance of a query's boxes over the images, as a share of that of all boxes: 0 where all images have the same boxes."""
        parts = all_gather_object((self.images, self.sums.cpu()))
        if not any(images for images, _ in parts):
            return 0.0
        mean, square = sum(sums for _, sums in parts) / sum(images for images, _ in parts)
        of_images, of_all = (square - mean.square()).mean(0).sum(), (square.mean(0) - mean.mean(0).square()).sum()
        return float((of_images / of_all).clamp(0, 1)) if of_all > 0 else 0.0


class ProposalEvaluator(CocoEvaluator):
    """COCO's evaluation with one class, "object", whatever the labels of truth and detections."""

    def __init__(self, annotation_file: str | dict[str, Any], backend: str = "auto") -> None:
        super().__init__(annotation_file, backend)
        self.truth["categories"] = [{"id": OBJECT, "name": "object"}]
        for annotation in self.truth["annotations"]:
            annotation["category_id"] = OBJECT

    def summarize(self) -> dict[str, float]:
        """AP, AP50 and AP75 of the best 100 boxes of an image, AR1, AR10, AR100 and AR1000 of as many, ARs, ARm and ARl of the best 1000.

        -1 where there is no truth; 0 without a single box.
        """
        rows = self.rows_xywh()
        rows[:, 6] = OBJECT
        if not len(rows):
            known = any(not annotation["iscrowd"] for annotation in self.truth["annotations"])
            return dict.fromkeys(NAMES, 0.0 if known else -1.0)
        precision, recall = self._curves(rows, LIMITS)
        best_100 = precision[:, :, :, 0, LIMITS.index(100)]
        values = [mean_of_known(best_100), mean_of_known(best_100[:1]), mean_of_known(best_100[5:6])]
        values += [mean_of_known(recall[:, :, 0, limit]) for limit in range(len(LIMITS))]
        return dict(zip(NAMES, values + [mean_of_known(recall[:, :, area, -1]) for area in (1, 2, 3)], strict=True))


NAMES = ("AP", "AP50", "AP75", *(f"AR{limit}" for limit in LIMITS), "ARs", "ARm", "ARl")
