"""Boxes without classes: how much of what is annotated do they cover? As DETReg reports it (Bar et al., CVPR 2022, section 4.4)."""
from typing import Any

from datasets.evaluators.coco import CocoEvaluator, mean_of_known

LIMITS = (1, 10, 100, 1000)
OBJECT = 1


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
