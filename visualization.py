"""Pictures of training: samples as the model gets them, the query patches that a pretext finds, and DETReg's panels of
proposals, predicted and ground-truth boxes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import build_dataset
from datasets.collate import collate, normalize, separate_views, to_device
from datasets.images.image_folder import ImageFile, cut_box, read_image
from datasets.images.unlabelled import unlabelled_images
from datasets.proposals import Selected, build_proposals
from datasets.sample import BadImageError, SampleDataset
from predictor import Predictor
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed import is_main_process
from util.errors import UserError
from util.logger import log
from util.plots.pages import panel_page, patch_page, sample_page
from util.random_state import SampleRandom
from util.settings import Settings

SHOWN = 8  # images on a page
FEW = 10  # boxes drawn in an image for which no annotation says how many objects there are
STRIPES = 12  # pixels from one stripe of the padding to the next


def draw_samples(
    folder: Path | None,
    dataset: SampleDataset,
    batch_size: int,
    epoch: int,
    normalization: Mapping[str, Sequence[float]],
    count: int = SHOWN,
) -> None:
    """Writes samples.png: `count` images from all over the dataset as `epoch` augments them, in batches of
    `batch_size`.

    They are read beside the loader, whose order and random states are left alone: augmentation depends on (seed, epoch,
    index) only. Real batches have other neighbours, and so other padding. A page that can't be drawn is logged, and
    training continues.
    """
    if folder is None or not is_main_process():
        return
    names = getattr(dataset, "class_names", {})
    try:
        samples = [dataset[(epoch, index)] for index in _spread(len(dataset), count)]
        rows = []
        for start in range(0, len(samples), batch_size):
            rows += batch_rows(
                samples[start : start + batch_size], normalization["mean"], normalization["std"]
            )
        sample_page(rows, names, folder / "samples.png")
    except UserError as error:
        log.warning("no page of training samples: %s", error)


def _spread(length: int, count: int) -> list[int]:
    """`count` indices from all over a dataset, or all there are."""
    return [i * length // count for i in range(count)] if length > count else list(range(length))


def batch_rows(
    samples: Sequence[tuple[Tensor, dict]], mean: Sequence[float], std: Sequence[float]
) -> list[dict]:
    """What `util.plots.pages.sample_page` draws of one batch: the inputs of the model, with the normalisation undone.
    Views of an image stand together."""
    batch, packed = collate(samples)
    inputs = normalize(batch, mean, std)
    shift, scale = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
    pixels = ((inputs.tensors * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    height, width = pixels.shape[-2:]
    rows, views = [], len(pixels) // len(samples)
    for place, (image, mask, target) in enumerate(
        zip(pixels, inputs.mask, packed.unpack(), strict=True)
    ):
        h, w = target["size"].tolist()
        view = f", view {place // len(samples) + 1}" if views > 1 else ""
        rows.append(
            {
                "image": _striped(image, mask),
                "boxes": box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([w, h, w, h]),
                "labels": target["labels"],
                "patches": [patch.permute(1, 2, 0).numpy() for patch in target.get("patches", ())],
                "title": f"image {int(target['image_id'])}{view}: {w} x {h} in {width} x {height}",
            }
        )
    return [row for first in range(len(samples)) for row in rows[first :: len(samples)]]


def _striped(image: Tensor, mask: Tensor) -> np.ndarray:
    """uint8 [H, W, 3]; padding is what normalised zeros look like, with stripes so that it is seen."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in mask.shape), indexing="ij")
    stripes = mask & ((rows + columns) % STRIPES < 2)
    return torch.where(stripes, 225, image).permute(1, 2, 0).to(torch.uint8).numpy()


@dataclass
class Found:
    """What the queries of patches find in one image.

    image uint8 [H, W, 3]; patches M of uint8 [S, S, 3]; boxes_xyxy_abs [M, 4], where the patches are from, and
    found_xyxy_abs [M, 4], in pixels of the image; scores [M].
    """

    image: np.ndarray
    patches: list[np.ndarray]
    boxes_xyxy_abs: Tensor
    found_xyxy_abs: Tensor
    scores: Tensor

    def row(self) -> tuple:
        """For `util.plots.pages.patch_page`."""
        return (
            self.image,
            self.patches,
            self.boxes_xyxy_abs,
            {"boxes": self.found_xyxy_abs, "scores": self.scores},
        )


@torch.no_grad()
def find_patches(
    model: Any,
    sample: tuple[Tensor, dict],
    normalization: Mapping[str, Sequence[float]],
    device: torch.device,
) -> list[Found]:
    """Asks a pretext with `patch_boxes`, in evaluation mode, where the patches of a sample are; of two views, where the
    regions of each are in the other. Random states stay as they were."""
    views = separate_views([sample]) if sample[0].ndim == 4 else [sample]
    inputs, targets = to_device(
        *collate([sample]), device, normalization["mean"], normalization["std"]
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs = model(inputs, targets)
    boxes, scores = (
        values.cpu() for values in model.patch_boxes(outputs, len(targets[0]["boxes"]))
    )
    found = []
    for i, (image, target) in enumerate(views):
        asked = views[(i + len(views) // 2) % len(views)]
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        places, answers = (box_cxcywh_to_xyxy(b) * size for b in (target["boxes"], boxes[i]))
        found.append(
            Found(image.permute(1, 2, 0).numpy(), _patches(*asked), places, answers, scores[i])
        )
    return found


def _patches(image: Tensor, target: dict) -> list[np.ndarray]:
    """The patches that come with a sample, else what is in its boxes; uint8 [h, w, 3] each."""
    if "patches" in target:
        return [patch.permute(1, 2, 0).numpy() for patch in target["patches"]]
    size = torch.tensor([image.shape[2], image.shape[1]] * 2)
    return [
        cut_box(image, box).permute(1, 2, 0).numpy()
        for box in box_cxcywh_to_xyxy(target["boxes"]) * size
    ]


def draw_found_patches(
    folder: Path | None,
    model: Any,
    dataset: SampleDataset,
    normalization: Mapping[str, Sequence[float]],
    device: torch.device,
    count: int = 4,
) -> None:
    """Writes patches.png for a pretext that says where patches are: the same few training samples each time, one by
    one.

    Leaves the model in evaluation mode, and random states as they were.
    """
    if folder is None or not is_main_process() or not hasattr(model, "patch_boxes"):
        return
    model.eval()
    try:
        samples = [dataset[(0, index)] for index in _spread(len(dataset), count)]
        rows = [
            found.row()
            for sample in samples
            for found in find_patches(model, sample, normalization, device)
        ]
        patch_page(rows, folder / "patches.png")
    except UserError as error:
        log.warning("no page of patches: %s", error)


# ----------------------------------------------------------------------------------- proposals, objects, ground truth


def draw_objects(
    predictor: Predictor,
    settings: Settings,
    path: Path,
    *,
    labelled: Settings | None = None,
    count: int = SHOWN,
) -> Path:
    """Draws proposals, the boxes that look most like objects to the model, and the ground truth where it is known.

    Args:
        predictor: class-agnostic.
        settings: of the pretext: its proposals, and its images unless there are labelled ones.
        path: of the PNG file.
        labelled: settings of labelled images, whose validation images are drawn.
        count: images to draw. As many boxes are drawn in each as it has objects.
    """
    proposals = Selected(
        build_proposals(settings.replace(cache_path="")), settings.strategy, settings.max_prop
    )
    rows = []
    for index, (file, name, boxes) in enumerate(_images(settings, labelled, count)):
        try:
            image = read_image(file)
        except BadImageError as error:
            log.warning("skipped %s: %s", name, error)
            continue
        pixels, drawn = image.permute(1, 2, 0).numpy(), FEW if boxes is None else max(len(boxes), 1)
        found = predictor(image, threshold=0.0)
        proposed = proposals(image, SampleRandom.of(settings.seed, 0, index), name)[:drawn]
        row = [
            ("proposals", pixels, _drawn(proposed)),
            ("most object-like", pixels, _drawn(found.boxes[:drawn], found.scores[:drawn])),
        ]
        if boxes is not None:
            height, width = image.shape[1:]
            row.append(("ground truth", pixels, _drawn(boxes * torch.tensor([width, height] * 2))))
        rows.append(row)
    return panel_page(rows, path)


def _images(
    settings: Settings, labelled: Settings | None, count: int
) -> list[tuple[ImageFile, str, Tensor | None]]:
    """(file, name, ground-truth boxes_xyxy relative to the image, None if unknown) of the first images."""
    if labelled is None:
        images = unlabelled_images("val", settings)
        return [(images.file(i), images.name(i), None) for i in range(min(count, len(images)))]
    dataset = build_dataset("val", labelled, any_class_count=True)
    shown = range(min(count, len(dataset)))
    names = dataset.annotations.file_names
    return [(dataset.path(i), names[i], box_cxcywh_to_xyxy(dataset[i][1]["boxes"])) for i in shown]


def _drawn(boxes_xyxy_abs: Tensor, scores: Tensor | None = None) -> dict[str, Any]:
    return {
        "boxes": np.asarray(boxes_xyxy_abs),
        "labels": None,
        "scores": None if scores is None else scores.tolist(),
    }
