"""Augmentation beyond the golden cases: draws and pixels are separate, tensors against PIL images, scaled sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.images.image_folder import to_tensor
from datasets.transforms import (
    Compose,
    PatchAugmentation,
    RandomHorizontalFlip,
    RandomResize,
    RandomSelect,
    RandomSizeCrop,
    crop,
    detection_transforms,
    query_patch_transforms,
    resize,
    resized_size,
)
from util.box_ops import box_cxcywh_to_xyxy
from util.random_state import SampleRNG


def make_image(height: int = 60, width: int = 90) -> Image.Image:
    """Smooth colors with edges, so that different resampling gives different pixels."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        128 + 90 * np.sin(x / 9),
        128 + 90 * np.cos(y / 11),
        90 + 60 * ((x // 30 + y // 30) % 2),
    ]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def make_target() -> dict[str, Tensor]:
    boxes = torch.tensor([[5.0, 5.0, 40.0, 30.0], [60.0, 40.0, 90.0, 60.0]])
    return {
        "boxes": boxes,
        "labels": torch.tensor([3, 7]),
        "area": torch.tensor([875.0, 600.0]),
        "iscrowd": torch.zeros(2, dtype=torch.int64),
        "size": torch.tensor([60, 90]),
        "orig_size": torch.tensor([60, 90]),
    }


def mean_gray_level_difference(tensor: Tensor, image: Image.Image) -> float:
    return float((tensor.float() - to_tensor(image).float()).abs().mean())


@pytest.mark.parametrize("seed", range(12))
def test_tensors_equal_pil_images(seed: int) -> None:
    transforms = detection_transforms("train", image_size=100)
    image = make_image()
    fast, fast_target = transforms(to_tensor(image), make_target(), SampleRNG(seed))
    plain, plain_target = transforms(image, make_target(), SampleRNG(seed))
    assert fast.dtype == torch.uint8
    assert fast.shape == plain.shape
    assert float((fast.float() - plain.float()).abs().mean()) < 1
    for key, value in plain_target.items():
        assert torch.equal(fast_target[key], value), key


@pytest.mark.parametrize("seed", range(12))
def test_patch_augmentation_of_tensors_is_close_to_pil_images(seed: int) -> None:
    augmentation = PatchAugmentation(32, augment=True)
    image = make_image()
    fast, _ = augmentation(to_tensor(image), {}, SampleRNG(seed))
    plain, _ = augmentation(image, {}, SampleRNG(seed))
    assert fast.shape == (3, 32, 32)
    assert mean_gray_level_difference(fast, plain) < 2


def test_patch_augmentation_has_the_published_probabilities() -> None:
    draws = [
        PatchAugmentation(32, augment=True).draw(SampleRNG(seed), (50, 50)) for seed in range(600)
    ]
    fractions = [
        np.mean([bool(jitter) for jitter, _, _ in draws]),
        np.mean([gray for _, gray, _ in draws]),
    ]
    radii = [radius for _, _, radius in draws if radius is not None]
    assert np.allclose([*fractions, len(radii) / len(draws)], [0.8, 0.2, 0.5], atol=0.07)
    assert 0.1 <= min(radii) < 0.3
    assert 1.8 < max(radii) <= 2.0
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-0.1, 0.1),
    }
    for jitter, _, _ in draws:
        assert not jitter or {name for name, _ in jitter} == set(ranges)
        assert all(ranges[name][0] <= factor <= ranges[name][1] for name, factor in jitter)
    assert len({tuple(name for name, _ in jitter) for jitter, _, _ in draws if jitter}) == 24


def test_output_size_equals_the_size_after_apply() -> None:
    for seed in range(20):
        transforms = detection_transforms("train", image_size=120)
        parameters = transforms.draw(SampleRNG(seed), (60, 90))
        image, _ = transforms.apply(to_tensor(make_image()), make_target(), parameters)
        assert tuple(image.shape[1:]) == transforms.output_size((60, 90), parameters)


def test_same_parameters_give_the_same_sample() -> None:
    transforms = detection_transforms("train", image_size=120)
    parameters = transforms.draw(SampleRNG(1), (60, 90))
    first, _ = transforms.apply(to_tensor(make_image()), make_target(), parameters)
    second, _ = transforms.apply(to_tensor(make_image()), make_target(), parameters)
    assert torch.equal(first, second)


def test_inputs_are_not_modified() -> None:
    image, before = to_tensor(make_image()), make_target()
    pixels, boxes = image.clone(), before["boxes"].clone()
    for seed in range(6):
        detection_transforms("train", image_size=80)(image, before, SampleRNG(seed))
    assert torch.equal(image, pixels)
    assert torch.equal(before["boxes"], boxes)


def test_published_sizes() -> None:
    flip, select, _ = detection_transforms("train").transforms
    whole, cropped = select.choices
    assert whole.sizes == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert whole.max_size == 1333
    before, cut, after = cropped.transforms
    assert (before.sizes, before.max_size) == ([400, 500, 600], None)
    assert (cut.min_size, cut.max_size) == (384, 600)
    assert (after.sizes, after.max_size) == (whole.sizes, 1333)
    pretext = query_patch_transforms("train").transforms[0]
    assert (pretext.sizes, pretext.max_size) == (
        [320, 336, 352, 368, 400, 416, 432, 448, 464, 480],
        600,
    )
    evaluation = [
        detection_transforms("val").transforms[0],
        query_patch_transforms("val").transforms[0],
    ]
    assert [(step.sizes, step.max_size) for step in evaluation] == [([800], 1333), ([480], 600)]


def test_sizes_scale_with_image_size() -> None:
    _, select, _ = detection_transforms("train", image_size=128).transforms
    whole, cropped = select.choices
    assert (min(whole.sizes), max(whole.sizes), whole.max_size) == (77, 128, 213)
    assert cropped.transforms[0].sizes == [64, 80, 96]
    assert (cropped.transforms[1].min_size, cropped.transforms[1].max_size) == (61, 96)
    assert query_patch_transforms("val", image_size=240).transforms[0].max_size == 300
    assert detection_transforms("val", image_size=128, max_size=150).transforms[0].max_size == 150


def test_resized_size() -> None:
    examples = {
        (480, 640): (800, 1066),
        (720, 1280): (750, 1333),
        (1000, 333): (1333, 444),
        (427, 640): (800, 1199),
    }
    for size, expected in examples.items():
        assert resized_size(size, 800, 1333) == expected
    # Rounding may exceed the maximum, as published.
    assert resized_size((100, 2000), 800, 1333) == (67, 1340)


def test_crop_of_an_image_smaller_than_min_size() -> None:
    image, cut = RandomSizeCrop(100, 200)(
        to_tensor(make_image(60, 90)), make_target(), SampleRNG(0)
    )
    assert image.shape == (3, 60, 90)
    assert cut["boxes"].shape == (2, 4)


def test_crop_may_drop_all_objects() -> None:
    _, cut = crop(to_tensor(make_image()), make_target(), (0, 0, 5, 5))
    assert cut["boxes"].shape == (0, 4)
    assert [len(cut[key]) for key in ("labels", "area", "iscrowd")] == [0, 0, 0]


def test_resize_scales_area_by_the_actual_ratios() -> None:
    _, scaled = resize(to_tensor(make_image()), make_target(), (33, 47))
    sides = scaled["boxes"][:, 2:] - scaled["boxes"][:, :2]
    assert torch.allclose(sides.prod(1), scaled["area"], rtol=1e-5)
    assert scaled["size"].tolist() == [33, 47]


def test_random_select_uses_both_transforms() -> None:
    select = RandomSelect(Compose([RandomResize([10])]), Compose([RandomResize([20])]))
    choices = [select.draw(SampleRNG(seed), (60, 90))[0] for seed in range(400)]
    assert 0.4 < np.mean(choices) < 0.6


# ----------------------------------------------------------------------------------------------------------- masks


def make_masks(seed: int, height: int = 60, width: int = 90) -> tuple[Tensor, Tensor]:
    """Return masks of ellipses, uint8 [N, H, W], and the boxes around them, float32 [N, 4], x0, y0, x1, y1."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    masks = []
    for _ in range(rng.randint(1, 6)):
        cy, cx, ry, rx = rng.rand(4) * [height, width, height / 3, width / 3] + [0, 0, 2, 2]
        masks.append((((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2) < 1)
    masks = np.stack([mask for mask in masks if mask.any()])
    return torch.from_numpy(masks.astype(np.uint8)), boxes_around(masks)


def boxes_around(masks: np.ndarray) -> Tensor:
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


CHAINS = {
    "training": lambda: detection_transforms("train", image_size=100),
    "small crops": lambda: Compose(
        [
            RandomHorizontalFlip(),
            RandomResize([40, 55, 70, 120]),
            RandomSizeCrop(30, 60),
            RandomSelect(RandomResize([20, 35]), RandomSizeCrop(10, 50)),
            RandomHorizontalFlip(),
        ]
    ),
    "evaluation": lambda: detection_transforms("val", image_size=37),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("seed", range(15))
def test_masks_and_boxes_stay_together(chain: str, seed: int) -> None:
    """Same objects in the same order, and each mask inside its box, for tensors as for PIL images."""
    masks, boxes = make_masks(seed)
    target = {
        "boxes": boxes,
        "labels": torch.arange(len(boxes)),
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "masks": masks,
    }
    image, transforms = make_image(), CHAINS[chain]()
    moved, result = transforms(to_tensor(image), target, SampleRNG(seed))
    plain, other = transforms(image, target, SampleRNG(seed))
    height, width = moved.shape[1:]
    assert all(torch.equal(result[key], other[key]) for key in result)

    found = result["masks"]
    assert found.dtype == torch.uint8
    assert (
        found.shape
        == (len(result["boxes"]), height, width)
        == (len(result["labels"]), height, width)
    )
    assert set(found.unique().tolist()) <= {0, 1}
    scaled = result["boxes"]
    if chain != "small crops":  # `ToSample` normalizes them
        scaled = box_cxcywh_to_xyxy(scaled) * torch.tensor([width, height, width, height])
    for mask, box, label in zip(found.numpy(), scaled, result["labels"].tolist(), strict=True):
        if mask.any():
            around = boxes_around(mask[None])[0]
            assert (around[:2] >= box[:2] - 2).all(), label
            assert (around[2:] <= box[2:] + 2).all(), label
    if chain == "evaluation":
        assert result["labels"].tolist() == list(range(len(boxes)))
        assert (boxes_around(found.numpy()) - scaled).abs().max() <= 2, "no mask is shifted"


def test_masks_are_resized_as_published() -> None:
    """`interpolate(masks.float(), mode="nearest") > 0.5`, in all directions."""
    masks, boxes = make_masks(3)
    for size in ((20, 31), (111, 80), (60, 133), (1, 2), (60, 90)):
        _, target = resize(make_image(), {"boxes": boxes, "masks": masks}, size)
        expected = torch.nn.functional.interpolate(masks[:, None].float(), size, mode="nearest")
        assert torch.equal(target["masks"].bool(), expected[:, 0] > 0.5)
    empty = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 60, 90, dtype=torch.uint8)}
    assert resize(make_image(), empty, (20, 30))[1]["masks"].shape == (0, 20, 30)


def test_boxes_decide_which_masks_a_crop_keeps() -> None:
    """Also where a box still has area and its mask does not, as published."""
    masks = torch.zeros(3, 60, 90, dtype=torch.uint8)
    masks[0, 5:10, 5:10] = masks[1, 50:55, 70:80] = masks[2, 40:60, 60:90] = 1
    boxes = torch.tensor([[5.0, 5, 45, 35], [70, 50, 80, 55], [60, 40, 90, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([4, 5, 6]), "masks": masks}
    _, cropped = crop(make_image(), target, (20, 20, 30, 45))
    assert cropped["labels"].tolist() == [4, 6]
    assert cropped["masks"].shape == (2, 30, 45)
    assert [int(mask.sum()) for mask in cropped["masks"]] == [0, 10 * 5]
