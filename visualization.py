"""Images for a look at training: samples as the model gets them, query patches and where a pretext finds them, and
DETReg's panels of proposals, predicted and ground-truth boxes.

Letters in shape comments: B images of a batch, M patches of an image, N objects, K boxes, S side of a patch, H and W
the size of an image or of a padded batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import build_dataset
from datasets.collate import (
    apply_colors,
    collate,
    flatten_views,
    normalize,
    to_device,
    unpack_masks,
)
from datasets.evaluators.analysis import ImageScore
from datasets.images.image_folder import crop_box
from datasets.images.unlabelled import build_unlabelled_images
from datasets.proposals import SelectedProposals, build_proposals
from datasets.sample import BadImageError, SampleDataset
from predictor import Predictor
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed import is_main_process
from util.errors import UserError
from util.logger import log
from util.plots.pages import panel_page, patch_page, prediction_page, sample_page
from util.random_state import SampleRNG
from util.settings import Settings

NUM_IMAGES = 8  # images on a page
DEFAULT_NUM_BOXES = 10  # boxes to draw in an image without annotations
STRIPE_PERIOD = 12  # pixels from one stripe of the padding to the next
STRIPE_COLOR = 225  # light gray, all three channels


# ------------------------------------------------------------------------------------------------------------- samples


def draw_samples(
    folder: Path | None,
    dataset: SampleDataset,
    batch_size: int,
    epoch: int,
    normalization: Mapping[str, Sequence[float]],
    count: int = NUM_IMAGES,
) -> None:
    """Write samples.png: `count` images, evenly spaced over the dataset, augmented as in `epoch`.

    The images are batched by `batch_size`; in training they have other neighbors and therefore other padding. The
    loader's order and random states are not touched, since augmentation depends on (seed, epoch, index) only. A page
    that can't be drawn is logged, and training continues.
    """
    if folder is None or not is_main_process():
        return
    try:
        write_samples(folder / "samples.png", dataset, batch_size, epoch, normalization, count)
    except UserError as error:
        log.warning("no page of training samples: %s", error)


def write_samples(
    path: Path,
    dataset: SampleDataset,
    batch_size: int,
    epoch: int,
    normalization: Mapping[str, Sequence[float]],
    count: int = NUM_IMAGES,
) -> None:
    """Write the page of `draw_samples`.

    Raises:
        UserError: images can't be used, or the page can't be written.
    """
    samples = [dataset[(epoch, index)] for index in evenly_spaced(len(dataset), count)]
    rows = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        rows += samples_to_rows(batch, normalization["mean"], normalization["std"])
    sample_page(rows, getattr(dataset, "class_names", None), path)


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` indices, evenly spaced over a dataset, or all of a smaller one."""
    if length <= count:
        return list(range(length))
    return [i * length // count for i in range(count)]


def samples_to_rows(
    samples: Sequence[tuple[Tensor, dict]], mean: Sequence[float], std: Sequence[float]
) -> list[dict]:
    """Return rows for `util.plots.pages.sample_page` from one batch: the model's inputs, denormalized.

    The views of an image are next to each other.
    """
    batch, packed = collate(samples)
    sizes = packed.tensors["size"].view(-1, 2).tolist()
    colored, packed = apply_colors(batch, packed, sizes)
    inputs = normalize(colored, mean, std)
    shift = torch.tensor(list(mean))[:, None, None]  # [3, 1, 1]
    scale = torch.tensor(list(std))[:, None, None]  # [3, 1, 1]
    # Through normalization and back: what is drawn is what the model gets, not what the file had.
    pixels = ((inputs.tensors * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    height, width = pixels.shape[-2:]

    num_images = len(samples)
    num_views = len(pixels) // num_images
    rows = []
    for i, (image, mask, target) in enumerate(
        zip(pixels, inputs.mask, packed.unpack(), strict=True)
    ):
        h, w = target["size"].tolist()
        masks = {}
        if "masks" in target:
            masks["masks"] = _to_bool_masks(target["masks"], width)  # [N, H, W]
        view = f", view {i // num_images + 1}" if num_views > 1 else ""
        rows.append(
            {
                "image": _mark_padding(image, mask),
                "boxes": box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([w, h, w, h]),  # [N, 4]
                "labels": target["labels"],
                **masks,
                "patches": [_to_array(patch) for patch in target.get("patches", ())],
                "title": f"image {int(target['image_id'])}{view}: {w} x {h} in {width} x {height}",
            }
        )

    # A batch has view 1 of all images, then view 2; on the page both views of an image come together.
    return [row for first in range(num_images) for row in rows[first::num_images]]


def _to_bool_masks(masks: Tensor, width: int) -> np.ndarray:
    """Return masks of a batch as bool [N, H, W]. They may be packed bits, see `datasets.collate.unpack_masks`."""
    return (masks if masks.dtype == torch.bool else unpack_masks(masks, width)).numpy()


def _mark_padding(image: Tensor, mask: Tensor) -> np.ndarray:
    """Return uint8 [H, W, 3]. Padding is zero after normalization, so it has the mean color; stripes make it visible.

    image: uint8 [3, H, W]. mask: bool [H, W], True on padding.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in mask.shape), indexing="ij")
    stripes = mask & ((rows + columns) % STRIPE_PERIOD < 2)  # [H, W], diagonal
    return _to_array(torch.where(stripes, STRIPE_COLOR, image).to(torch.uint8))


def _to_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()  # [3, H, W] -> [H, W, 3]


# ------------------------------------------------------------------------------------------------------------- patches


@dataclass
class PatchPredictions:
    """Where a pretext finds the patches of one image.

    Attributes:
        image: uint8 [H, W, 3].
        patches: M arrays, uint8 [S, S, 3].
        boxes_xyxy_abs: [M, 4], where the patches were cut out, in pixels of the image.
        predicted_xyxy_abs: [M, 4], where they were found.
        scores: [M].
    """

    image: np.ndarray
    patches: list[np.ndarray]
    boxes_xyxy_abs: Tensor
    predicted_xyxy_abs: Tensor
    scores: Tensor

    def row(self) -> tuple:
        """Return a row for `util.plots.pages.patch_page`."""
        predictions = {"boxes": self.predicted_xyxy_abs, "scores": self.scores}
        return self.image, self.patches, self.boxes_xyxy_abs, predictions


@torch.no_grad()
def predict_patches(
    model: Any,
    sample: tuple[Tensor, dict],
    normalization: Mapping[str, Sequence[float]],
    device: torch.device,
) -> list[PatchPredictions]:
    """Find the patches of a sample with a pretext that has `patch_boxes`, in evaluation mode.

    A sample with two views gives one result per view: the regions of the other view, found in this one. Random states
    are restored.
    """
    views = flatten_views([sample]) if sample[0].ndim == 4 else [sample]
    mean, std = normalization["mean"], normalization["std"]
    inputs, targets = to_device(*collate([sample]), device, mean, std)

    # The Siamese pretext disturbs boxes at random in evaluation mode too. Drawing a page must not change training.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs = model(inputs, targets)
    num_patches = len(targets[0]["boxes"])
    boxes, scores = model.patch_boxes(outputs, num_patches)
    boxes, scores = boxes.cpu(), scores.cpu()  # [B, M, 4] and [B, M]; B is the number of views

    results = []
    for i, (image, target) in enumerate(views):
        # The queries of a view are those of the other view; of a single view, its own.
        patches = _patch_images(*views[(i + len(views) // 2) % len(views)])
        scale = torch.tensor([image.shape[2], image.shape[1]] * 2)  # W, H, W, H
        ground_truth = box_cxcywh_to_xyxy(target["boxes"]) * scale
        predicted = box_cxcywh_to_xyxy(boxes[i]) * scale
        results.append(
            PatchPredictions(_to_array(image), patches, ground_truth, predicted, scores[i])
        )
    return results


def _patch_images(image: Tensor, target: dict) -> list[np.ndarray]:
    """Return the patches of a sample, or the crops of its boxes if it has none; uint8 [h, w, 3] each."""
    if "patches" in target:
        return [_to_array(patch) for patch in target["patches"]]
    scale = torch.tensor([image.shape[2], image.shape[1]] * 2)
    boxes_xyxy_abs = box_cxcywh_to_xyxy(target["boxes"]) * scale
    return [_to_array(crop_box(image, box)) for box in boxes_xyxy_abs]


def draw_found_patches(
    folder: Path | None,
    model: Any,
    dataset: SampleDataset,
    normalization: Mapping[str, Sequence[float]],
    device: torch.device,
    count: int = 4,
) -> None:
    """Write patches.png for a pretext that has `patch_boxes`; do nothing for any other.

    The samples are the same each time, those of epoch 0, so that pages of different epochs can be compared. They go
    through the model one by one, without padding. Leaves the model in evaluation mode; random states are restored.
    """
    if folder is None or not is_main_process() or not hasattr(model, "patch_boxes"):
        return
    try:
        write_patches(folder / "patches.png", model, dataset, normalization, device, count)
    except UserError as error:
        log.warning("no page of patches: %s", error)


def write_patches(
    path: Path,
    model: Any,
    dataset: SampleDataset,
    normalization: Mapping[str, Sequence[float]],
    device: torch.device,
    count: int,
) -> None:
    """Write the page of `draw_found_patches`.

    Raises:
        UserError: images can't be used, or the page can't be written.
    """
    model.eval()
    rows = []
    for index in evenly_spaced(len(dataset), count):
        results = predict_patches(model, dataset[(0, index)], normalization, device)
        rows += [result.row() for result in results]
    patch_page(rows, path)


# ------------------------------------------------------------------------------------- proposals, objects, ground truth


def draw_objects(
    predictor: Predictor,
    settings: Settings,
    path: Path,
    *,
    labelled: Settings | None = None,
    count: int = NUM_IMAGES,
) -> Path:
    """Draw proposals, the predicted boxes with the best scores, and the ground truth where it is known, side by side.

    Without proposals where they come from a file and the images are labelled ones.

    Args:
        predictor: a class-agnostic one.
        settings: of the pretext: its proposals, and its images if `labelled` is None.
        path: the PNG file to write.
        labelled: settings of a labelled dataset, whose validation images are drawn.
        count: number of images. In each, as many boxes are drawn as it has objects.
    """
    proposals = None
    # A file has boxes of the unlabelled images. Labelled ones may have the same names, as COCO's numbers.
    if labelled is None or not settings.proposals.startswith("file:"):
        # Searched again: a cache of the training images does not have these.
        method = build_proposals(settings.replace(cache_path=""))
        proposals = SelectedProposals(method, settings.strategy, settings.max_prop)

    rows = []
    for index, (read, name, gt_boxes) in enumerate(_images(settings, labelled, count)):
        try:
            image = read()  # uint8 [3, H, W]
        except BadImageError as error:
            log.warning("skipped %s: %s", name, error)
            continue

        num_boxes = DEFAULT_NUM_BOXES if gt_boxes is None else max(len(gt_boxes), 1)
        found = predictor(image, threshold=0.0)  # best first
        found_boxes, found_scores = found.boxes[:num_boxes], found.scores[:num_boxes]

        pixels = _to_array(image)
        row = [("predicted", pixels, _to_draw(found_boxes, found_scores))]
        if proposals is not None:
            proposed = proposals(image, SampleRNG.from_key(settings.seed, 0, index), name)
            row.insert(0, ("proposals", pixels, _to_draw(proposed[:num_boxes])))
        if gt_boxes is not None:
            height, width = image.shape[1:]
            gt_boxes_abs = gt_boxes * torch.tensor([width, height, width, height])
            row.append(("ground truth", pixels, _to_draw(gt_boxes_abs)))
        rows.append(row)
    return panel_page(rows, path)


def _images(
    settings: Settings, labelled: Settings | None, count: int
) -> list[tuple[Callable[[], Tensor], str, Tensor | None]]:
    """Return (function that reads the image, name, ground-truth boxes) of the first images.

    Boxes are (x0, y0, x1, y1) [N, 4] relative to the image, None without annotations.
    """
    if labelled is None:
        images = build_unlabelled_images("val", settings)
        return [
            (partial(images.read, i), images.name(i), None) for i in range(min(count, len(images)))
        ]

    dataset = build_dataset("val", labelled, allow_any_num_classes=True)
    names = dataset.annotations.file_names
    return [
        (partial(dataset.read, i), names[i], box_cxcywh_to_xyxy(dataset[i][1]["boxes"]))
        for i in range(min(count, len(dataset)))
    ]


def _to_draw(boxes_xyxy_abs: Tensor, scores: Tensor | None = None) -> dict[str, Any]:
    """Return boxes as `util.plots.pages.panel_page` takes them."""
    return {
        "boxes": np.asarray(boxes_xyxy_abs),
        "labels": None,
        "scores": None if scores is None else scores.tolist(),
    }


# ---------------------------------------------------------------------------------------------- best and worst images


def draw_scored_images(
    images: Sequence[ImageScore],
    dataset: SampleDataset,
    rows: np.ndarray,
    threshold: float,
    path: Path,
) -> None:
    """Draw images of a labelled dataset with their detections and ground truth; without images, remove the file.

    Args:
        images: of an `Analysis`. An image that can't be read is logged and left out.
        rows: all detections, see `DetectionEvaluator.rows`.
        threshold: lowest score of a detection.
        path: the PNG file to write.
    """
    path.unlink(missing_ok=True)
    names = {c["id"]: c["name"] for c in dataset.ground_truth["categories"]}
    index_of = {int(id_): i for i, id_ in enumerate(dataset.annotations.image_ids)}
    drawn = []
    for image in images:
        try:
            pixels = _to_array(dataset.read(index_of[image.image_id]))
        except BadImageError as error:
            log.warning("image %d is not drawn: %s", image.image_id, error)
            continue
        own = rows[rows[:, 0] == image.image_id]  # [K, 7]
        predictions = {"boxes": own[:, 1:5], "scores": own[:, 5], "labels": own[:, 6].astype(int)}
        drawn.append((pixels, predictions, _ground_truth(dataset, image.image_id)))
    if drawn:
        prediction_page(drawn, names, path, score_threshold=threshold)


def _ground_truth(dataset: SampleDataset, image_id: int) -> dict[str, Any]:
    """Return the boxes and category ids of an image, without crowds."""
    objects = [
        a
        for a in dataset.ground_truth["annotations"]
        if a["image_id"] == image_id and not a["iscrowd"]
    ]
    boxes = np.array([a["bbox"] for a in objects], float).reshape(-1, 4)  # [N, 4], xywh
    boxes[:, 2:] += boxes[:, :2]
    return {"boxes": boxes, "labels": [a["category_id"] for a in objects]}
