"""Class-agnostic AP and AR: how well boxes cover the annotated objects, regardless of their class.

As reported by DETReg (Bar et al., CVPR 2022, section 4.4).

Shapes: N boxes of all images, I images.
"""

import numpy as np

from datasets.evaluators.coco import CocoEvaluator, GroundTruth, mean_valid
from util.coco import CLASS_METRICS

MAX_DETS = (1, 10, 100, 1000)
OBJECT_ID = 1  # category id of the only class
METRICS = (*CLASS_METRICS, *(f"AR{limit}" for limit in MAX_DETS), "ARs", "ARm", "ARl")
SWAPPED = {name: f"{name}_swapped" for name in ("AP50", "AR10", "AR100")}


class ProposalEvaluator(CocoEvaluator):
    """COCO evaluation with a single class, "object", regardless of the labels of ground truth and detections."""

    def __init__(self, ground_truth: GroundTruth, backend: str = "auto") -> None:
        annotations = [
            {**annotation, "category_id": OBJECT_ID} for annotation in ground_truth["annotations"]
        ]
        one_class = {
            "categories": [{"id": OBJECT_ID, "name": "object"}],
            "annotations": annotations,
        }
        super().__init__({**ground_truth, **one_class}, backend)

    def summarize(self) -> dict[str, float]:
        """Return the metrics by name.

        AP, AP50 and AP75 count the best 100 boxes per image, ARk the best k; ARs, ARm and ARl (small, medium and large
        objects) the best 1000.

        AP50_swapped, AR10_swapped and AR100_swapped are a baseline: each image gets the boxes of the image before it,
        scaled to its size. Evenly spread boxes have a high recall, too, without looking at the image.

        -1 if there is no ground truth, 0 if there are no boxes.
        """
        rows = self.rows_xywh()  # [N, 7]
        rows[:, 6] = OBJECT_ID
        if not len(rows):
            objects = [a for a in self.ground_truth["annotations"] if not a["iscrowd"]]
            value = 0.0 if objects else -1.0
            return dict.fromkeys((*METRICS, *SWAPPED.values()), value)

        metrics = self._metrics(rows)
        swapped = self._metrics(self._swap_boxes(rows))
        return {**metrics, **{new: swapped[name] for name, new in SWAPPED.items()}}

    def _metrics(self, rows: np.ndarray) -> dict[str, float]:
        precision, recall = self._curves(rows, MAX_DETS)
        best_100 = precision[:, :, :, 0, MAX_DETS.index(100)]  # [10, 101, 1], all areas
        values = [
            mean_valid(best_100),
            mean_valid(best_100[:1]),  # IoU 0.50
            mean_valid(best_100[5:6]),  # IoU 0.75
        ]
        values += [mean_valid(recall[:, :, 0, limit]) for limit in range(len(MAX_DETS))]
        values += [mean_valid(recall[:, :, area, -1]) for area in (1, 2, 3)]
        return dict(zip(METRICS, values, strict=True))

    def _swap_boxes(self, rows: np.ndarray) -> np.ndarray:
        """Return the boxes of each image, at the same relative position in the next image by id.

        The boxes of the last image move to the first one.
        """
        images = sorted(
            (image["id"], image.get("width") or 0, image.get("height") or 0)
            for image in self.ground_truth["images"]
        )
        ids = np.array([image[0] for image in images])  # [I]
        sizes_wh = np.array([image[1:] for image in images], dtype=float)  # [I, 2]
        if not sizes_wh.all():  # a size is unknown: keep boxes in pixels
            sizes_wh = np.ones_like(sizes_wh)

        own = np.searchsorted(ids, rows[:, 0])  # [N]
        other = (own + 1) % len(ids)
        scale = np.tile(sizes_wh[other] / sizes_wh[own], 2)  # [N, 4], for x, y, width, height
        return np.concatenate([ids[other][:, None], rows[:, 1:5] * scale, rows[:, 5:]], axis=1)
