"""tools/evaluate_patches.py: IoU of query patches with where they were cut out, and in another image."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from datasets.sample import BadImageError
from tests.tiny import FROZEN, PRETEXT_FLAGS, RUN_FLAGS, pre_train, write_images
from tools import evaluate_patches
from tools.evaluate_patches import PatchIoU, in_image_of
from util.errors import UserError
from util.nested_tensor import as_nested_tensor


def evaluate(checkpoint: Path, images: Path, *flags: object) -> dict[str, float]:
    words = [
        "--checkpoint",
        checkpoint,
        "--imagenet_path",
        images,
        *RUN_FLAGS,
        *PRETEXT_FLAGS,
        *flags,
    ]
    return evaluate_patches.main(evaluate_patches.parse([str(word) for word in words]))


def test_iou_and_found() -> None:
    metric = PatchIoU()
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    # Row i of both is one patch: an IoU of 0.5 and one of 0.25, and no pair across rows counts.
    metric.update(torch.tensor([[0.0, 0, 10, 5], [0, 0, 5, 5]]), boxes)
    metric.update(boxes[:1], boxes[:1])
    assert metric.summarize("_x") == pytest.approx({"mean_IoU_x": 1.75 / 3, "found_x": 2 / 3})


def test_sample_in_another_image() -> None:
    target, pixels = {"boxes": torch.rand(2, 4)}, torch.full((3, 20, 30), 7, dtype=torch.uint8)
    image, kept = in_image_of((torch.zeros(3, 10, 10, dtype=torch.uint8), target), (pixels, {}))
    assert image is pixels
    assert kept is target

    views = torch.zeros(2, 3, 10, 12, dtype=torch.uint8)
    image, kept = in_image_of((views, target), (torch.stack([pixels, pixels]), {}))
    assert kept is target
    assert image.dtype == torch.uint8
    assert image.shape == views.shape
    assert (image[0] == 7).all()
    assert (image[1] == 0).all()


@pytest.mark.parametrize("pretext", ["random_query_patch", "siamese"])
def test_metrics_of_a_checkpoint(pretext: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3)
    proposals = ("--proposals", "random") if pretext == "siamese" else ()
    run = tmp_path / "run"
    pre_train(
        "--pretext", pretext, *proposals, "--imagenet_path", images, "--output_dir", run, *FROZEN
    )

    folder = tmp_path / "metrics"
    metrics = evaluate(run / "checkpoint.pth", images, "--output_dir", folder)
    # Of three images; the first one only lends its pixels.
    assert metrics["patches"] == 2 * 5
    for name in ("mean_IoU", "found", "mean_IoU_swapped", "found_swapped"):
        assert 0 <= metrics[name] <= 1
    assert metrics["mean_IoU"] != metrics["mean_IoU_swapped"]
    written = json.loads((folder / "patch_metrics.json").read_text())
    assert metrics.items() <= written.items()

    with pytest.raises(UserError, match="already has patch_metrics.json"):
        evaluate(run / "checkpoint.pth", images, "--output_dir", folder)
    with pytest.raises(UserError, match="1 usable images: two are needed"):
        evaluate(run / "checkpoint.pth", images, "--count", 1)


class Oracle:
    """Stands in for a pretext: finds patch 0 where it was cut out, if the image is the one that it was cut from."""

    normalization: ClassVar = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def eval(self) -> None: ...

    def __call__(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        pixels = as_nested_tensor(inputs).tensors
        own = targets[0]["value"].item() / 255
        box = targets[0]["boxes"] if (pixels - own).abs().max() < 1e-3 else torch.full((1, 4), 0.9)
        return box[None], torch.ones(1, 1)

    @staticmethod
    def patch_boxes(outputs: tuple[Tensor, Tensor], num_patches: int) -> tuple[Tensor, Tensor]:
        assert num_patches == 1
        return outputs


def test_own_and_swapped_images_are_not_confused() -> None:
    """A model that looks at the image has an IoU of 1 with its own; a bad image is skipped."""

    class Samples(list):
        def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict]:
            _, index = key
            if index == 1:
                raise BadImageError("broken")
            image = torch.full((3, 32, 40 + 8 * index), 20 * index, dtype=torch.uint8)
            boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2]])
            crop = image[:, :8, :8][None]
            value = torch.tensor([20 * index])
            return image, {"boxes": boxes, "patches": crop, "value": value}

    metrics = evaluate_patches.evaluate(Oracle(), Samples(range(4)), torch.device("cpu"), 9)
    assert metrics["patches"] == 2
    assert metrics["mean_IoU"] == pytest.approx(1)
    assert metrics["found"] == 1
    assert metrics["mean_IoU_swapped"] == metrics["found_swapped"] == 0


def test_region_prior_has_no_patches(tmp_path: Path) -> None:
    images, run = write_images(tmp_path / "images", 4), tmp_path / "run"
    flags = (
        "--pretext",
        "region_prior",
        "--proposals",
        "random",
        "--max_prop",
        "6",
        "--num_patches",
        "10",
    )
    pre_train(*flags, "--imagenet_path", images, "--output_dir", run, *FROZEN)
    with pytest.raises(UserError, match="region_prior searches no patches"):
        evaluate(run / "checkpoint.pth", images, "--num_patches", "10")
