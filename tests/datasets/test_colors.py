"""Colors of patches and views: against torchvision's functions, in a worker and in a batch on the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets import build_dataset
from datasets.collate import collate, to_device
from datasets.colors import (
    JITTER,
    ColorParameters,
    augment_batch,
    augment_image,
    blur_reach,
    encode_colors,
)
from datasets.transforms import ColorAugmentation
from util.random_state import SampleRNG
from util.settings import settings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    """Random colors in blocks of 4 pixels: flat parts and edges."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width]


def torchvision_colors(image: Tensor, parameters: ColorParameters) -> Tensor:
    """The plain form: one function of torchvision after the other."""
    for name, factor in parameters.jitter:
        image = getattr(F, f"adjust_{name}")(image, factor)
    if parameters.grayscale:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if parameters.radius is not None:
        kernel_size = 2 * blur_reach(parameters.radius, image.shape[-2:]) + 1
        image = F.gaussian_blur(image, [kernel_size] * 2, [parameters.radius] * 2)
    return image


def assert_close(image: Tensor, expected: Tensor, rare: float = 0.005) -> None:
    """At most one gray level, and that rarely."""
    assert image.dtype == expected.dtype == torch.uint8
    assert image.shape == expected.shape
    difference = (image.int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < rare


STEPS = [
    *[
        ColorParameters([(name, factor)], False, None)
        for name in JITTER[:3]
        for factor in (0.6, 1.37)
    ],
    *[ColorParameters([("hue", factor)], False, None) for factor in (-0.5, -0.1, 0.0, 0.061, 0.5)],
    ColorParameters([], True, None),
    *[ColorParameters([], False, radius) for radius in (0.1, 1.0, 2.0)],
]


@pytest.mark.parametrize("parameters", STEPS, ids=str)
def test_each_step_equals_torchvision(parameters: ColorParameters) -> None:
    """On random colors, and on all colors of six levels per channel: all ties, grays, black and white."""
    levels = torch.arange(0, 256, 51, dtype=torch.uint8)
    all_colors = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).flatten(2)
    # Rounding of exact halves: a sixth of the hue circle maps these colors onto each other.
    for image, rare in ((random_image(60, 90), 0.005), (all_colors, 0.2)):
        before = image.clone()
        assert_close(augment_image(image, parameters), torchvision_colors(image, parameters), rare)
        assert torch.equal(image, before)


def test_whole_augmentation_equals_torchvision() -> None:
    """A step that is off by one moves what follows, so single pixels may differ more after all steps."""
    augmentation = ColorAugmentation(augment=True)
    for seed in range(12):
        image = random_image(40, 56, seed).contiguous(memory_format=torch.contiguous_format)
        parameters = augmentation.draw(SampleRNG(seed), (40, 56))
        expected = torchvision_colors(image, parameters)
        difference = (augment_image(image, parameters).int() - expected.int()).abs()
        assert int(difference.max()) <= 4
        assert float(difference.float().mean()) < 0.01


def test_parameters_survive_their_encoding() -> None:
    augmentation = ColorAugmentation(augment=True)
    drawn = [augmentation.draw(SampleRNG(seed), (9, 9)) for seed in range(30)]
    codes = encode_colors(drawn)
    assert codes.shape == (30, 10)
    assert [ColorParameters.decode(code) for code in codes.tolist()] == drawn
    assert encode_colors([]).shape == (0, 10)


def test_batch_equals_single_images() -> None:
    """Also with padding, whose pixels must not leak into contrast and blur, and in images smaller than the blur."""
    augmentation = ColorAugmentation(augment=True)
    sizes = [(40, 50), (33, 50), (40, 20), (3, 7), (1, 50), (20, 1)] * 5
    drawn = [augmentation.draw(SampleRNG(seed), (40, 50)) for seed in range(len(sizes))]
    images = [random_image(*size, seed=i) for i, size in enumerate(sizes)]
    batch, _ = collate([(image, {"boxes": torch.zeros(0, 4)}) for image in images])
    batch.tensors[batch.mask[:, None].expand_as(batch.tensors)] = 255  # must not be read

    before = batch.tensors.clone()
    augmented = augment_batch(batch.tensors, encode_colors(drawn), sizes)
    assert torch.equal(batch.tensors, before)
    for own, image, parameters, (h, w) in zip(augmented, images, drawn, sizes, strict=True):
        expected = augment_image(image, parameters)
        difference = (own[:, :h, :w].int() - expected.int()).abs()
        assert int(difference.max()) <= 2
        assert float(difference.float().mean()) < 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate([(60, 80), (90, 64), (70, 70)]):
        pixels = random_image(height, width, seed=i).permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(root / f"{i}.png")
    return root


@pytest.mark.parametrize("pretext", ["random_query_patch", "region_prior", "siamese"])
def test_device_augment_gives_the_same_batches(pretext: str, folder: Path) -> None:
    flags = {"imagenet_path": str(folder), "proposals": "random", "image_size": 64, "seed": 3}
    extra = {"object_embedding_loss": True} if pretext == "region_prior" else {"patch_size": 24}
    keys = [(epoch, index) for epoch in range(2) for index in range(3)]
    batches = []
    for device_augment in (False, True):
        own = settings(pretext=pretext, device_augment=device_augment, **flags, **extra)
        dataset = build_dataset("train", own)
        samples, packed = collate([dataset[key] for key in keys])
        assert ("patch_colors" in packed.tensors) == device_augment
        batches.append(to_device(samples, packed, torch.device("cpu"), MEAN, STD))

    (plain, plain_targets), (fast, fast_targets) = batches
    assert set(fast_targets.tensors) == set(plain_targets.tensors)
    assert torch.equal(fast.mask, plain.mask)
    for key in set(plain_targets.tensors) - {"patches"}:
        assert torch.equal(fast_targets.tensors[key], plain_targets.tensors[key]), key
    for own, expected in (
        (fast.tensors, plain.tensors),
        (fast_targets.tensors["patches"], plain_targets.tensors["patches"]),
    ):
        levels = (own - expected).abs() * torch.tensor(STD)[:, None, None] * 255
        assert float(levels.max()) < 3
        assert float(levels.mean()) < 0.01
