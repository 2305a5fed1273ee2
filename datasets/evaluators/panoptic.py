"""Panoptic quality (PQ), segmentation quality (SQ) and recognition quality (RQ).

Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4, with the rules of COCO's panopticapi for void pixels and
crowds.

Shapes: an image of H x W pixels with G ground-truth and P predicted segments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.evaluators.detections import gather_by_image
from util.distributed import is_main_process
from util.errors import UserError
from util.files import to_json, write_atomically, write_text
from util.masks import ids_to_png

Segment = dict[str, Any]  # a record of "segments_info": "id", "category_id", ...
GroundTruth = Callable[[int], tuple[np.ndarray, list[Segment]]]

VOID = 0  # segment id of pixels without a segment, in COCO's files
MATCH_IOU = 0.5  # a match has a larger IoU, so that a segment has at most one
IGNORED_FRACTION = 0.5  # a prediction with a larger fraction of void and crowd pixels is not wrong
PREDICTIONS_FILE = "predictions.json"


class PanopticEvaluator:
    """Panoptic quality over a dataset. An image that is seen twice, or on several ranks, counts once.

    Each image is scored when it is added. Only its counts are kept, about 1 KB per image, not its segments.

    Args:
        things: category id -> whether it is a thing (or stuff).
        names: category id -> name.
        ground_truth: image id -> (segment ids int [H, W], segments_info), as in COCO's files: id 0 is void; a segment
            has "id", "category_id", and may have "iscrowd" and "area".
        image_ids: the images of the dataset. All segments of an image without prediction count as missed.
        folder: also write the predictions to it, as COCO's evaluation server reads them: `{image_id:012d}.png` with
            id = R + 256 G + 65536 B, and predictions.json. The ids in both are one larger than those of `update`, which
            may start from 0: in files, 0 is void.
    """

    def __init__(
        self,
        things: Mapping[int, bool],
        names: Mapping[int, str],
        ground_truth: GroundTruth,
        image_ids: Iterable[int],
        folder: Path | None = None,
    ) -> None:
        self.things, self.names = things, names
        self.ground_truth = ground_truth
        self.folder = folder
        self._image_ids = set(image_ids)
        self._counts: dict[int, np.ndarray] = {}  # image id -> [S, 5], see `count_matches`
        self._records: dict[int, dict[str, Any]] = {}  # image id -> its entry in predictions.json

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Score the predictions of some images.

        Args:
            predictions: image id -> {"ids": int [H, W], segment id of each pixel, "segments_info": [{"id",
                "category_id", ...}]}. Ids start from 0, and -1 is void. 0 is also void if no segment has this id: a
                map of zeros without any segments is an image without predictions.

        Raises:
            ValueError: an image id is not in the annotations, or "ids" and "segments_info" have not the same segments.
            UserError: a category is unknown, or the size is not that of the ground truth.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._image_ids:
                raise ValueError(f"image {image_id} is not in the annotations")
            ids, segments = _shift_ids(prediction)
            self._counts[image_id] = self._score(image_id, ids, segments)
            if self.folder is not None:
                self._records[image_id] = _write_png(self.folder, image_id, ids, segments)

    def _score(self, image_id: int, ids: np.ndarray, segments: list[Segment]) -> np.ndarray:
        true_ids, true_segments = self.ground_truth(image_id)
        if ids.shape != true_ids.shape:
            raise UserError(
                f"image {image_id}: the prediction has (height, width) {ids.shape}, the ground truth {true_ids.shape}; "
                "check that the image file and its annotations belong together"
            )
        self._check_categories(image_id, "a predicted segment", segments)
        self._check_categories(image_id, "the ground truth", true_segments)
        try:
            return count_matches(ids, segments, true_ids, true_segments)
        except ValueError as error:
            raise ValueError(f"image {image_id}: {error}") from error

    def _check_categories(self, image_id: int, what: str, segments: list[Segment]) -> None:
        for segment in segments:
            if segment["category_id"] not in self.things:
                raise UserError(
                    f"image {image_id}: {what} has category {segment['category_id']}, which is not in the categories "
                    "of the panoptic annotations"
                )

    def synchronize_between_processes(self) -> None:
        """Give each rank the counts of all ranks. With a folder, rank 0 writes predictions.json."""
        self._counts = gather_by_image(self._counts)
        if self.folder is None:
            return
        self._records = gather_by_image(self._records)
        if is_main_process():
            annotations = [self._records[image_id] for image_id in sorted(self._records)]
            write_text(self.folder / PREDICTIONS_FILE, to_json({"annotations": annotations}))

    def summarize(self) -> dict[str, Any]:
        """Return {"PQ_all", "PQ_th", "PQ_st": {"pq", "sq", "rq", "n"} of all classes, things and stuff,
        "panoptic_per_class": rows}.

        Qualities are fractions, means over the n classes with a segment in the ground truth or a prediction that is not
        ignored; -1 without such classes. There is a row for each of them, in the order of the category ids: {"id",
        "name", "isthing", "segments", "PQ", "SQ", "RQ"}, where "segments" counts the ground truth without crowds.
        """
        category_ids = sorted(self.things)
        totals = self._totals(category_ids)  # [K, 4]
        rows = [
            {
                "id": category_id,
                "name": self.names[category_id],
                "isthing": bool(self.things[category_id]),
                "segments": int(matched + missed),
                **_qualities(matched, wrong, missed, iou),
            }
            for category_id, (matched, wrong, missed, iou) in zip(
                category_ids, totals.tolist(), strict=True
            )
            if matched + wrong + missed
        ]
        return {
            "PQ_all": _mean_qualities(rows),
            "PQ_th": _mean_qualities([row for row in rows if row["isthing"]]),
            "PQ_st": _mean_qualities([row for row in rows if not row["isthing"]]),
            "panoptic_per_class": rows,
        }

    def _totals(self, category_ids: Sequence[int]) -> np.ndarray:
        """Return the sums over all images, [K, 4]: true positives, false positives, false negatives, IoU."""
        # In the order of the image ids, so that sums are equal on any number of processes.
        counts = [
            self._counts[i] if i in self._counts else self._count_missed(i)
            for i in sorted(self._image_ids)
        ]
        rows = np.concatenate([np.zeros((0, 5)), *counts])  # [S, 5]
        totals = np.zeros((len(category_ids), 4))
        np.add.at(totals, np.searchsorted(category_ids, rows[:, 0]), rows[:, 1:])
        return totals

    def _count_missed(self, image_id: int) -> np.ndarray:
        ids, _ = self.ground_truth(image_id)
        return self._score(image_id, np.full_like(ids, VOID), [])


def _shift_ids(prediction: Mapping[str, Any]) -> tuple[np.ndarray, list[Segment]]:
    """Return the ids and segments of `PanopticEvaluator.update` with ids from 1, and 0 for void."""
    segments = [
        {**segment, "id": int(segment["id"]) + 1} for segment in prediction["segments_info"]
    ]
    ids = np.asarray(prediction["ids"]).astype(np.int64) + 1  # [H, W]
    if all(segment["id"] != 1 for segment in segments):
        ids[ids == 1] = VOID
    return ids, segments


def count_matches(
    ids: np.ndarray,
    segments: Sequence[Segment],
    true_ids: np.ndarray,
    true_segments: Sequence[Segment],
) -> np.ndarray:
    """Return what each segment of an image counts for its class.

    Args:
        ids: int [H, W], predicted segment of each pixel; 0 is void.
        segments: the predicted segments.
        true_ids: int [H, W], of the ground truth; 0 is void. Pixels with an id that `true_segments` does not have
            belong to no segment, but are not void.
        true_segments: the segments of the ground truth.

    Returns:
        float64 [S, 5]: (category id, true positives, false positives, false negatives, sum of IoU). A row stands for a
        match, a missed segment or a wrong prediction.

    Raises:
        ValueError: a predicted id is not in `segments`, or has no pixel.
    """
    # As in panopticapi, the last one of equal ids counts.
    segments = list({segment["id"]: segment for segment in segments}.values())  # P
    true_segments = list({segment["id"]: segment for segment in true_segments}.values())  # G
    pixels, area, true_area = _overlaps(ids, segments, true_ids, true_segments)  # [G + 1, P]
    void, pixels = pixels[0], pixels[1:]  # [P], [G, P]

    category = np.array([s["category_id"] for s in segments], np.int64)  # [P]
    true_category = np.array([s["category_id"] for s in true_segments], np.int64)  # [G]
    crowd = np.array([bool(s.get("iscrowd")) for s in true_segments], bool)  # [G]

    # Void pixels are not part of the union.
    union = area + true_area[:, None] - pixels - void  # [G, P]
    # An annotated area that is too small may leave no union.
    iou = pixels / np.maximum(union, 1)
    is_match = (iou > MATCH_IOU) & (true_category[:, None] == category) & ~crowd[:, None]
    g, p = np.nonzero(is_match)
    missed = ~is_match.any(1) & ~crowd  # [G]

    ignored = void + _crowd_pixels(pixels, category, true_category, crowd)  # [P]
    wrong = ~is_match.any(0) & (ignored <= IGNORED_FRACTION * area)  # [P]
    return np.concatenate(
        [
            _rows(true_category[g], (1, 0, 0), iou[g, p]),
            _rows(category[wrong], (0, 1, 0)),
            _rows(true_category[missed], (0, 0, 1)),
        ]
    )


def _overlaps(
    ids: np.ndarray,
    segments: Sequence[Segment],
    true_ids: np.ndarray,
    true_segments: Sequence[Segment],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (common pixels [G + 1, P], where row 0 is void in the ground truth, areas [P], true areas [G]).

    Raises:
        ValueError: as `count_matches`.
    """
    # Both ids in one number: a single sort finds all pairs. Ids of three bytes leave room in 64 bits.
    pairs, counts = np.unique((true_ids.astype(np.int64) << 32) | ids, return_counts=True)  # [E]
    rows = {VOID: 0, **{s["id"]: i for i, s in enumerate(true_segments, start=1)}}
    columns = {VOID: 0, **{s["id"]: i for i, s in enumerate(segments, start=1)}}
    unlisted = len(rows)  # row of pixels that are neither void nor in a segment

    pixels = np.zeros((len(rows) + 1, len(columns)), np.int64)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        true_id, segment_id = pair >> 32, pair & 0xFFFFFFFF
        if segment_id not in columns:
            raise ValueError(f"segment {segment_id - 1} of the ids is not in segments_info")
        pixels[rows.get(true_id, unlisted), columns[segment_id]] += count

    areas = pixels.sum(0)[1:]  # [P]
    if not areas.all():
        empty = segments[int(np.argmin(areas))]
        raise ValueError(f"segment {empty['id'] - 1} of segments_info has no pixel")
    counted = pixels.sum(1)[1:unlisted].tolist()  # [G]
    # The annotated areas count, as in panopticapi.
    annotated = [s.get("area") for s in true_segments]
    true_areas = [c if a is None else a for a, c in zip(annotated, counted, strict=True)]
    return pixels[:unlisted, 1:], areas, np.array(true_areas, np.float64)


def _crowd_pixels(
    pixels: np.ndarray, category: np.ndarray, true_category: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Return the pixels [P] of each prediction in the crowd of its class; of several crowds, the last one counts."""
    last = {int(true_category[g]): g for g in np.flatnonzero(crowd)}
    overlaps = [pixels[last[c], p] if c in last else 0 for p, c in enumerate(category.tolist())]
    return np.array(overlaps, np.int64)


def _rows(
    categories: np.ndarray, counts: tuple[int, int, int], iou: np.ndarray | float = 0.0
) -> np.ndarray:
    """Return rows of `count_matches`, [S, 5]."""
    rows = np.empty((len(categories), 5))
    rows[:, 0], rows[:, 1:4], rows[:, 4] = categories, counts, iou
    return rows


def _qualities(matched: float, wrong: float, missed: float, iou: float) -> dict[str, float]:
    """Return the qualities of a class with at least one segment; equation 1 and 2 of the paper."""
    total = matched + wrong / 2 + missed / 2
    return {"PQ": iou / total, "SQ": iou / matched if matched else 0.0, "RQ": matched / total}


def _mean_qualities(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {
        name.lower(): float(np.mean([row[name] for row in rows])) if rows else -1.0
        for name in ("PQ", "SQ", "RQ")
    }
    return {**means, "n": len(rows)}


def _write_png(
    folder: Path, image_id: int, ids: np.ndarray, segments: Sequence[Segment]
) -> dict[str, Any]:
    """Write the ids of an image, and return its entry in predictions.json."""
    name = f"{image_id:012d}.png"
    content = ids_to_png(ids)
    # Several ranks may have the same image.
    write_atomically(folder / name, lambda file: file.write(content), shared=True)
    return {"image_id": image_id, "file_name": name, "segments_info": list(segments)}
