"""Post-processing of masks: instance masks for detections, and panoptic segmentation.

Everything runs on the device, for the queries that are kept only.

Shapes: B images, Q queries, K results of an image, n segments of an image, h1 x w1 size of the mask
logits; sizes are (height, width).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classification import Classification
from models.detector import full_precision
from models.segmentation import select_masks
from util.coco import MAX_THING_ID
from util.masks import encode_masks, ids_to_png

THRESHOLD = 0.5  # probability above which a pixel belongs to a mask
# Masks of the original image that exist at once: 32 of 4000 x 3000 pixels are 380 MB.
MASKS_PER_CHUNK = 32
MIN_SEGMENT_AREA = 4  # pixels; segments of this area or less are dropped, as published
# Published for softmax; a focal head has lower scores.
SCORE_THRESHOLDS = {"softmax": 0.85, "focal": 0.5}

Size = tuple[int, int]


class PostProcessSegm(nn.Module):
    """Add masks to the results of `PostProcess`, in the pixels of the given sizes."""

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, Tensor]],
        outputs: dict[str, Any],
        orig_target_sizes: Tensor,
        max_target_sizes: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Add `masks`, uint8 [K, 1, H, W], to the results of each image, as published.

        Args:
            orig_target_sizes: [B, 2], sizes of the results.
            max_target_sizes: [B, 2], sizes of the images in the batch, without padding.
        """
        all_sizes = _image_sizes(max_target_sizes, orig_target_sizes)
        for i, (result, image_sizes) in enumerate(zip(results, all_sizes, strict=True)):
            masks = list(_masks_in_chunks(outputs, i, result["queries"], image_sizes))
            result["masks"] = torch.cat(masks)[:, None].byte()  # [K, 1, H, W]
        return results

    @torch.no_grad()
    def encode(
        self, queries: list[Tensor], outputs: dict[str, Any], orig_sizes: Tensor, sizes: Tensor
    ) -> list[list[dict[str, Any]]]:
        """Return the masks of some queries of each image as compressed RLE, never all of them decoded at once.

        Args:
            queries: B tensors [K].
            orig_sizes, sizes: as in `forward`.
        """
        encoded = []
        all_sizes = _image_sizes(sizes, orig_sizes)
        for i, (chosen, image_sizes) in enumerate(zip(queries, all_sizes, strict=True)):
            # Focal results can have a query with several classes.
            unique, index = chosen.unique(return_inverse=True)
            chunks = _masks_in_chunks(outputs, i, unique, image_sizes)
            rles = [rle for chunk in chunks for rle in encode_masks(chunk)]
            encoded.append([rles[k] for k in index.tolist()])
        return encoded


class _ImageSizes(NamedTuple):
    """Padded size of the batch, size of an image in it, and size of the result."""

    padded: Size
    image: Size
    result: Size


def _image_sizes(sizes: Tensor, result_sizes: Tensor) -> list[_ImageSizes]:
    """Return the sizes of each image of a batch. Reading them makes the host wait, so it is done once."""
    images = [(height, width) for height, width in sizes.tolist()]
    padded = max(height for height, _ in images), max(width for _, width in images)
    results = [(height, width) for height, width in result_sizes.tolist()]
    return [_ImageSizes(padded, *pair) for pair in zip(images, results, strict=True)]


def _masks_in_chunks(
    outputs: dict[str, Any], image: int, queries: Tensor, sizes: _ImageSizes
) -> Iterator[Tensor]:
    """Yield the masks of an image's queries, bool [up to MASKS_PER_CHUNK, H, W]; one chunk at least."""
    for chunk in queries.split(MASKS_PER_CHUNK):
        logits = _upsample(select_masks(outputs, torch.full_like(chunk, image), chunk), sizes)
        masks = logits.sigmoid() > THRESHOLD
        masks = functional.interpolate(masks[:, None].float(), size=sizes.result, mode="nearest")
        yield masks[:, 0] > 0


def _upsample(logits: Tensor, sizes: _ImageSizes) -> Tensor:
    """Upsample mask logits [K, h1, w1] to the padded batch and cut the padding off: [K, h, w] of the image."""
    logits = functional.interpolate(
        logits[:, None], size=sizes.padded, mode="bilinear", align_corners=False
    )[:, 0]
    height, width = sizes.image
    return logits[:, :height, :width]


class PostProcessPanoptic(nn.Module):
    """Merge masks into one segmentation of the image (Carion et al. 2020, section 4.4).

    Queries whose best class is an object with a score above the threshold are kept. Each pixel goes to the
    kept query with the highest logit. Segments of one stuff class are merged, and small ones are dropped.

    Args:
        is_thing_map: category id -> whether it is a thing; default: COCO's. Other classes make no segments.
        threshold: lowest score of a segment; default: `SCORE_THRESHOLDS`.
        reproduce_published: as the published code, spread the masks of the padded batch over the image without
            its padding, and undo the merge of stuff where small segments are dropped.
    """

    def __init__(
        self,
        classification: Classification,
        is_thing_map: Mapping[int, bool] | None = None,
        threshold: float | None = None,
        reproduce_published: bool = False,
    ) -> None:
        super().__init__()
        self.classification = classification
        if is_thing_map is None:
            is_thing_map = {i: i <= MAX_THING_ID for i in range(classification.num_classes)}
        self.is_thing_map = is_thing_map
        self.threshold = SCORE_THRESHOLDS[classification.kind] if threshold is None else threshold
        self.reproduce_published = reproduce_published

    def forward(
        self, outputs: dict[str, Any], processed_sizes: Tensor, target_sizes: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Return `png_string`, a PNG with segment ids as RGB, and `segments_info` of each image, as published.

        The first segment has id 0. Without any segment the PNG is 0 everywhere.

        Args:
            processed_sizes: [B, 2], sizes of the images in the batch, without padding.
            target_sizes: [B, 2], sizes of the results; default: the processed sizes.
        """
        results = self.segment(outputs, processed_sizes, target_sizes)
        return [
            {
                "png_string": ids_to_png(result["ids"].clamp(min=0).numpy()),
                "segments_info": result["segments_info"],
            }
            for result in results
        ]

    @torch.no_grad()
    def segment(
        self, outputs: dict[str, Any], processed_sizes: Tensor, target_sizes: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Return the segmentation of each image, see `forward` for the arguments.

        Returns:
            `ids`: int64 [H, W] on the CPU, the segment of each pixel, -1 if the image has none.
            `segments_info`: a list of {"id", "category_id", "isthing", "area", "score"}, with ids from 0 and areas in
            pixels.
        """
        if target_sizes is None:
            target_sizes = processed_sizes
        scores, labels = self._scores(full_precision(outputs["pred_logits"]))  # [B, Q] each
        all_sizes = _image_sizes(processed_sizes, target_sizes)
        return [
            self._segment_image(outputs, i, scores[i], labels[i], image_sizes)
            for i, image_sizes in enumerate(all_sizes)
        ]

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return score and class of each query, [B, Q] each; score 0 for no segment."""
        is_focal = self.classification.kind == "focal"
        scores, labels = (logits.sigmoid() if is_focal else logits.softmax(-1)).max(-1)
        # "No object", the last output of a softmax head, is not in the map either.
        is_segment = torch.tensor([label in self.is_thing_map for label in range(logits.shape[-1])])
        return scores.masked_fill(~is_segment.to(labels.device)[labels], 0), labels

    def _segment_image(
        self,
        outputs: dict[str, Any],
        image: int,
        scores: Tensor,
        labels: Tensor,
        sizes: _ImageSizes,
    ) -> dict[str, Any]:
        queries = (scores > self.threshold).nonzero()[:, 0]  # [n]
        if not len(queries):
            return {"ids": torch.full(sizes.result, -1), "segments_info": []}

        if self.reproduce_published:
            sizes = _ImageSizes(sizes.image, sizes.image, sizes.result)
        logits = select_masks(outputs, torch.full_like(queries, image), queries)
        logits = _upsample(logits, sizes)  # [n, h, w]
        labels_list = labels[queries].tolist()
        kept, ids, areas = self._drop_small(logits, labels_list, sizes.result)
        if not kept:
            return {"ids": torch.full(sizes.result, -1), "segments_info": []}
        rows = [
            {
                "id": i,
                "isthing": bool(self.is_thing_map[labels_list[k]]),
                "category_id": labels_list[k],
                "area": area,
                "score": float(scores[queries[k]]),
            }
            for i, (k, area) in enumerate(zip(kept, areas, strict=True))
        ]
        return {"ids": ids.cpu(), "segments_info": rows}

    def _drop_small(
        self, logits: Tensor, labels: list[int], size: Size
    ) -> tuple[list[int], Tensor, list[int]]:
        """Assign pixels, and drop small segments until none is left.

        Returns:
            The kept segments m by index into `logits`, their ids from 0 in an int64 map [H, W] of the given size, and
            their areas.
        """
        candidates = list(range(len(labels)))
        merge = self._merge_stuff(labels)
        while True:
            # The segment that gets the pixels of each candidate.
            owners = [merge[k] for k in candidates]
            segments = sorted(set(owners))
            position = {segment: i for i, segment in enumerate(segments)}
            ids = _assign_pixels(logits[candidates], [position[k] for k in owners], size)
            areas = torch.bincount(ids.flatten(), minlength=len(segments)).tolist()
            large = {k for k, area in zip(segments, areas, strict=True) if area > MIN_SEGMENT_AREA}
            if self.reproduce_published:
                # A merged segment has no pixels of its own, so it is dropped as a small one, and what is left is not
                # merged again.
                merge = list(range(len(labels)))
                done = len(large) == len(candidates)
                kept = [k for k in candidates if k in large]
            else:
                done = len(large) == len(segments)
                kept = [k for k in candidates if merge[k] in large]
            if done or not kept:
                return segments if done else [], ids, areas if done else []
            candidates = kept

    def _merge_stuff(self, labels: list[int]) -> list[int]:
        """Return for each segment which one it belongs to: the first of its class for stuff, itself for things."""
        first: dict[int, int] = {}
        return [
            k if self.is_thing_map[label] else first.setdefault(label, k)
            for k, label in enumerate(labels)
        ]


def _assign_pixels(logits: Tensor, ids: list[int], size: Size) -> Tensor:
    """Return the id of the mask with the highest logit in each pixel, int64 [H, W].

    Resizes by nearest neighbor, with the pixels that Pillow reads, as published.

    logits: [n, h, w]. ids: n.
    """
    winner = torch.tensor(ids, device=logits.device)[logits.argmax(0)]  # [h, w]
    rows, columns = (
        torch.from_numpy(_nearest_pixels(before, after)).to(winner.device)
        for before, after in zip(winner.shape, size, strict=True)
    )
    return winner[rows[:, None], columns]


def _nearest_pixels(before: int, after: int) -> np.ndarray:
    """Return the pixel that Pillow reads for each pixel of a resized side: the one at its center, int64 [after].

    Pillow adds up steps in float64. Where a center is between two pixels, its rounding decides.
    """
    step = before / after
    centers = np.cumsum(np.append(step * 0.5, np.full(after - 1, step)))
    return centers.astype(np.int64).clip(max=before - 1)
