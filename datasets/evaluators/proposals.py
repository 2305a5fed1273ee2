"""Boxes without classes: how much of what is annotated do they cover? As DETReg reports it (Bar et al., CVPR 2022,
section 4.4).
"""

import numpy as np

from datasets.evaluators.coco import CocoEvaluator, GroundTruth, mean_of_known
from util.coco import CLASS_METRICS

LIMITS = (1, 10, 100, 1000)
OBJECT = 1
METRICS = (*CLASS_METRICS, *(f"AR{limit}" for limit in LIMITS), "ARs", "ARm", "ARl")
SWAPPED = {name: f"{name}_swapped" for name in ("AP50", "AR10", "AR100")}


class ProposalEvaluator(CocoEvaluator):
    """COCO's evaluation with one class, "object", whatever the labels of ground truth and detections."""

    def __init__(self, ground_truth: GroundTruth, backend: str = "auto") -> None:
        one_class = {
            "categories": [{"id": OBJECT, "name": "object"}],
            "annotations": [
                {**annotation, "category_id": OBJECT} for annotation in ground_truth["annotations"]
            ],
        }
        super().__init__({**ground_truth, **one_class}, backend)

    def summarize(self) -> dict[str, float]:
        """AP, AP50 and AP75 of the best 100 boxes of an image, AR1, AR10, AR100 and AR1000 of as many, ARs, ARm and ARl
        of the best 1000.

        Then AP50_swapped, AR10_swapped and AR100_swapped: the same of each image with the boxes of the image before it,
        moved to its size. It is what boxes reach that do not depend on the image; well spread, they have a high recall
        too, and have found nothing.

        -1 where there is no ground truth; 0 without a single box.
        """
        rows = self.rows_xywh()
        rows[:, 6] = OBJECT
        if not len(rows):
            known = any(
                not annotation["iscrowd"] for annotation in self.ground_truth["annotations"]
            )
            return dict.fromkeys((*METRICS, *SWAPPED.values()), 0.0 if known else -1.0)
        numbers, swapped = self._numbers(rows), self._numbers(self._swapped(rows))
        return {**numbers, **{new: swapped[name] for name, new in SWAPPED.items()}}

    def _numbers(self, rows: np.ndarray) -> dict[str, float]:
        precision, recall = self._curves(rows, LIMITS)
        best_100 = precision[:, :, :, 0, LIMITS.index(100)]
        values = [
            mean_of_known(best_100),
            mean_of_known(best_100[:1]),
            mean_of_known(best_100[5:6]),
        ]
        values += [mean_of_known(recall[:, :, 0, limit]) for limit in range(len(LIMITS))]
        return dict(
            zip(
                METRICS,
                values + [mean_of_known(recall[:, :, area, -1]) for area in (1, 2, 3)],
                strict=True,
            )
        )

    def _swapped(self, rows: np.ndarray) -> np.ndarray:
        """The boxes of each image at the same relative place of the next one, in the order of ids; of the last one in
        the first.
        """
        images = sorted(
            (image["id"], image.get("width") or 0, image.get("height") or 0)
            for image in self.ground_truth["images"]
        )
        ids, sizes = (
            np.array([image[0] for image in images]),
            np.array([image[1:] for image in images], dtype=float),
        )
        if not sizes.all():  # data that does not say its sizes
            sizes = np.ones_like(sizes)
        own = np.searchsorted(ids, rows[:, 0])
        other = (own + 1) % len(ids)
        scale = np.tile(sizes[other] / sizes[own], 2)
        return np.concatenate([ids[other][:, None], rows[:, 1:5] * scale, rows[:, 5:]], axis=1)
