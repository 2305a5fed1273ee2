"""Augmentation: what is drawn (`draw`) apart from what is done (`apply`), in the published order of draws.

`draw(rng, size_hw)` returns plain parameters and asks no pixel; since a draw may depend on the image size (a crop after
a resize), `output_size` says what a transform makes of it. `apply(image, target, parameters)` is deterministic. Images
are uint8 tensors [3, H, W] (fast) or PIL images (bit-exact with the published numbers); pixels, boxes and
masks go through torchvision.transforms.v2. While transforms run, `target["boxes"]` is float32 [N, 4], (x0, y0, x1, y1)
in pixels.

The order of draws is that of DETR and UP-DETR: Python's `random` for choices, torch for the place of a crop and the
colours, one after the other as the transforms are listed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.hue import shift_hue
from util.box_ops import box_xyxy_to_cxcywh
from util.random_state import SampleRandom

Picture = Tensor | Image.Image
Size = tuple[int, int]
Target = dict[str, Any]


def size_hw(image: Picture) -> Size:
    """(height, width) in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def resized_size(size: Size, short_side: int, max_size: int | None = None) -> Size:
    """(H, W) after resizing the short side, with the published rounding.

    The long side is truncated. Where it would exceed `max_size` the short side is lowered first, rounded half to even,
    so the long side can still end a few pixels above or below the maximum.
    """
    low, high = min(size), max(size)
    if max_size is not None and high / low * short_side > max_size:
        short_side = round(max_size * low / high)
        if short_side == 0:  # thinner than a pixel: one is kept, where the published code stops
            return (1, max_size) if size[0] < size[1] else (max_size, 1)
    if low == short_side:
        return size
    long_side = int(short_side * high / low)
    return (short_side, long_side) if size[0] < size[1] else (long_side, short_side)


def _boxes(target: Target, size: Size) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _with_size(target: Target, size: Size) -> Target:
    return {**target, "size": torch.tensor(size)}


def hflip(image: Picture, target: Target) -> tuple[Picture, Target]:
    """Mirrors left and right."""
    target = dict(target)
    if "boxes" in target:
        target["boxes"] = _plain(F.horizontal_flip(_boxes(target, size_hw(image))))
    if "masks" in target:
        target["masks"] = F.horizontal_flip(target["masks"])
    return F.horizontal_flip(image), target


def resize(image: Picture, target: Target, size: Size) -> tuple[Picture, Target]:
    """Resizes to exactly (H, W): bilinear with antialiasing, masks nearest; boxes and area by the realised ratios."""
    old = size_hw(image)
    target = _with_size(target, size)
    if old == tuple(size):
        return image, target
    if "boxes" in target:
        target["boxes"] = _plain(F.resize(_boxes(target, old), list(size)))
    if "area" in target:
        target["area"] = target["area"] * (size[1] / old[1] * (size[0] / old[0]))
    if "masks" in target:
        target["masks"] = _plain(F.resize(tv_tensors.Mask(target["masks"]), list(size)))
    return F.resize(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True
    ), target


def crop(
    image: Picture, target: Target, region: tuple[int, int, int, int]
) -> tuple[Picture, Target]:
    """Cuts (top, left, height, width) out; objects whose clipped box has no area are dropped from every key."""
    top, left, height, width = region
    target = _with_size(target, (height, width))
    kept: Tensor | None = None
    if "masks" in target:
        target["masks"] = F.crop(target["masks"], top, left, height, width)
        kept = target["masks"].flatten(1).any(1)
    if "boxes" in target:
        boxes = _plain(F.crop(_boxes(target, size_hw(image)), top, left, height, width))
        target["boxes"] = boxes
        target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if kept is not None:
        for key in ("boxes", "labels", "area", "iscrowd", "masks", "patches"):
            if key in target:
                target[key] = target[key][kept]
    return F.crop(image, top, left, height, width), target


class Transform:
    """Draws parameters from random numbers and the image size, then applies them."""

    def draw(self, rng: SampleRandom, size: Size) -> Any:
        """Parameters for an image of (H, W); None where nothing is random."""

    def output_size(self, size: Size, parameters: Any) -> Size:
        """(H, W) that `apply` turns (H, W) into."""
        return size

    def apply(self, image: Picture, target: Target, parameters: Any) -> tuple[Picture, Target]:
        raise NotImplementedError

    def __call__(self, image: Picture, target: Target, rng: SampleRandom) -> tuple[Picture, Target]:
        return self.apply(image, target, self.draw(rng, size_hw(image)))


class Compose(Transform):
    """One after the other; draws too."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, rng: SampleRandom, size: Size) -> list[Any]:
        parameters = []
        for transform in self.transforms:
            parameters.append(transform.draw(rng, size))
            size = transform.output_size(size, parameters[-1])
        return parameters

    def output_size(self, size: Size, parameters: list[Any]) -> Size:
        for transform, drawn in zip(self.transforms, parameters, strict=True):
            size = transform.output_size(size, drawn)
        return size

    def apply(
        self, image: Picture, target: Target, parameters: list[Any]
    ) -> tuple[Picture, Target]:
        for transform, drawn in zip(self.transforms, parameters, strict=True):
            image, target = transform.apply(image, target, drawn)
        return image, target


class RandomSelect(Transform):
    """The first transform with probability one half, else the second."""

    def __init__(self, first: Transform, second: Transform) -> None:
        self.choices = (first, second)

    def draw(self, rng: SampleRandom, size: Size) -> tuple[int, Any]:
        choice = int(rng.python.random() >= 0.5)
        return choice, self.choices[choice].draw(rng, size)

    def output_size(self, size: Size, parameters: tuple[int, Any]) -> Size:
        return self.choices[parameters[0]].output_size(size, parameters[1])

    def apply(
        self, image: Picture, target: Target, parameters: tuple[int, Any]
    ) -> tuple[Picture, Target]:
        return self.choices[parameters[0]].apply(image, target, parameters[1])


class RandomHorizontalFlip(Transform):
    """Mirrors with probability one half."""

    def draw(self, rng: SampleRandom, size: Size) -> bool:
        return rng.python.random() < 0.5

    def apply(self, image: Picture, target: Target, parameters: bool) -> tuple[Picture, Target]:
        return hflip(image, target) if parameters else (image, target)


class RandomResize(Transform):
    """Resizes the short side to one of `sizes`, the long side to about `max_size` at most (`resized_size`)."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        self.sizes, self.max_size = list(sizes), max_size

    def draw(self, rng: SampleRandom, size: Size) -> int:
        return rng.python.choice(self.sizes)

    def output_size(self, size: Size, parameters: int) -> Size:
        return resized_size(size, parameters, self.max_size)

    def apply(self, image: Picture, target: Target, parameters: int) -> tuple[Picture, Target]:
        return resize(image, target, self.output_size(size_hw(image), parameters))


class RandomSizeCrop(Transform):
    """Cuts a region whose width and height are drawn from [min_size, max_size] (or the image's side where smaller)."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size, self.max_size = min_size, max_size

    def draw(self, rng: SampleRandom, size: Size) -> tuple[int, int, int, int]:
        height, width = size
        crop_width = self._side(rng, width)
        crop_height = self._side(rng, height)
        if (crop_height, crop_width) == size:
            return 0, 0, height, width
        top = int(torch.randint(0, height - crop_height + 1, (1,), generator=rng.torch))
        left = int(torch.randint(0, width - crop_width + 1, (1,), generator=rng.torch))
        return top, left, crop_height, crop_width

    def _side(self, rng: SampleRandom, side: int) -> int:
        return rng.python.randint(min(self.min_size, side), min(self.max_size, side))

    def output_size(self, size: Size, parameters: tuple[int, int, int, int]) -> Size:
        return parameters[2], parameters[3]

    def apply(
        self, image: Picture, target: Target, parameters: tuple[int, int, int, int]
    ) -> tuple[Picture, Target]:
        return crop(image, target, parameters)


class ToSample(Transform):
    """The end of a pipeline: a uint8 tensor [3, H, W], boxes as normalised (cx, cy, w, h)."""

    def apply(self, image: Picture, target: Target, parameters: None) -> tuple[Tensor, Target]:
        height, width = size_hw(image)
        target = dict(target)
        if "boxes" in target:
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / scale
        return F.pil_to_tensor(image) if isinstance(image, Image.Image) else image, target


class ColorAugmentation(Transform):
    """Each with its probability: colour jitter, greyscale, blur (UP-DETR and Siamese DETR). Targets pass through
    unchanged.

    Without `augment` nothing.
    """

    JITTER = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-0.1, 0.1),
    }

    def __init__(self, augment: bool) -> None:
        self.augment = augment

    def draw(
        self, rng: SampleRandom, size: Size
    ) -> tuple[list[tuple[str, float]], bool, float | None]:
        """([(colour function, factor) in the order to apply], greyscale?, blur radius in pixels or None)."""
        if not self.augment:
            return [], False, None
        jitter = self._draw_jitter(rng) if self._chance(rng, 0.8) else []
        grey = self._chance(rng, 0.2)
        radius = rng.python.uniform(0.1, 2.0) if self._chance(rng, 0.5) else None
        return jitter, grey, radius

    @staticmethod
    def _chance(rng: SampleRandom, probability: float) -> bool:
        return float(torch.rand(1, generator=rng.torch)) <= probability

    def _draw_jitter(self, rng: SampleRandom) -> list[tuple[str, float]]:
        order = torch.randperm(len(self.JITTER), generator=rng.torch).tolist()
        factors = [
            (name, float(torch.empty(1).uniform_(low, high, generator=rng.torch)))
            for name, (low, high) in self.JITTER.items()
        ]
        return [factors[i] for i in order]

    def apply(
        self,
        image: Picture,
        target: Target,
        parameters: tuple[list[tuple[str, float]], bool, float | None],
    ) -> tuple[Picture, Target]:
        jitter, grey, radius = parameters
        if isinstance(image, Tensor):
            image = image.contiguous()  # colour functions work plane by plane
        for name, factor in jitter:
            fast = name == "hue" and isinstance(image, Tensor)
            image = (shift_hue if fast else getattr(F, f"adjust_{name}"))(image, factor)
        if grey:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if radius is not None:
            image = _blur(image, radius)
        return image, target


class PatchAugmentation(ColorAugmentation):
    """UP-DETR's augmentation of a query patch: S x S, then the colours. Without `augment` only the resize
    (evaluation).
    """

    def __init__(self, patch_size: int, augment: bool) -> None:
        super().__init__(augment)
        self.patch_size = patch_size

    def output_size(self, size: Size, parameters: Any) -> Size:
        return self.patch_size, self.patch_size

    def apply(
        self,
        image: Picture,
        target: Target,
        parameters: tuple[list[tuple[str, float]], bool, float | None],
    ) -> tuple[Picture, Target]:
        image = F.resize(image, [self.patch_size, self.patch_size], antialias=True)
        return super().apply(image, target, parameters)


def _blur(image: Picture, radius: float) -> Picture:
    """Gaussian blur with a standard deviation of `radius` pixels."""
    if isinstance(image, Image.Image):
        return image.filter(ImageFilter.GaussianBlur(radius))
    reach = min(
        math.ceil(2.5 * radius), min(size_hw(image)) - 1
    )  # the border is mirrored, which needs as many pixels
    return F.gaussian_blur(image, [2 * reach + 1] * 2, [radius, radius])


def _scaled(sizes: Sequence[int], image_size: int, published: int) -> list[int]:
    return [max(round(size * image_size / published), 1) for size in sizes]


def detection_transforms(
    image_set: str, image_size: int = 800, max_size: int | None = None
) -> Compose:
    """DETR's augmentation for "train", the plain resize for "val".

    Published for a short side of 800: sizes 480, 512, ... 800 (long side 1333), crops of 384 to 600 after resizing to
    400, 500 or 600. For another `image_size` each of these is multiplied by image_size / 800 and rounded half to even;
    `max_size` None scales 1333 in the same way.
    """
    if max_size is None:
        (max_size,) = _scaled([1333], image_size, 800)
    if image_set != "train":
        return Compose([RandomResize([image_size], max_size), ToSample()])
    sizes = RandomResize(_scaled(range(480, 801, 32), image_size, 800), max_size)
    before_crop = RandomResize(_scaled([400, 500, 600], image_size, 800))
    cropped = Compose([before_crop, RandomSizeCrop(*_scaled([384, 600], image_size, 800)), sizes])
    return Compose([RandomHorizontalFlip(), RandomSelect(sizes, cropped), ToSample()])


def pretext_transforms(
    image_set: str, image_size: int = 480, max_size: int | None = None
) -> Compose:
    """UP-DETR's resize: no flip and no crop.

    Published for 480: ten short sides from 320 to 480 (the list of steps of 16 lacks 384), long side 600. For another
    `image_size` they scale as in `detection_transforms`.
    """
    return Compose([_pretext_resize(image_set, image_size, max_size), ToSample()])


def _pretext_resize(image_set: str, image_size: int, max_size: int | None) -> RandomResize:
    if max_size is None:
        (max_size,) = _scaled([600], image_size, 480)
    published = (
        [480] if image_set != "train" else [size for size in range(320, 481, 16) if size != 384]
    )
    return RandomResize(_scaled(published, image_size, 480), max_size)


def region_transforms(
    image_set: str, image_size: int = 480, max_size: int | None = None
) -> Compose:
    """DETReg's augmentation for "train": DETR's flips and crops, with UP-DETR's sizes; the plain resize for "val".

    Published for 480: crops of 384 to 600 after resizing to 400, 500 or 600; for another `image_size` all sizes scale.
    """
    sizes = _pretext_resize(image_set, image_size, max_size)
    if image_set != "train":
        return Compose([sizes, ToSample()])
    before_crop = RandomResize(_scaled([400, 500, 600], image_size, 480))
    cropped = Compose([before_crop, RandomSizeCrop(*_scaled([384, 600], image_size, 480)), sizes])
    return Compose([RandomHorizontalFlip(), RandomSelect(sizes, cropped), ToSample()])


def view_resize(image_size: int = 480, max_size: int | None = None) -> RandomResize:
    """Siamese DETR's resize before the views are cut.

    Published for 480 (ImageNet), as UP-DETR's, and for 800 (COCO), as DETR's; the nearer one is scaled to other sizes.
    """
    if image_size <= 640:
        return _pretext_resize("train", image_size, max_size)
    if max_size is None:
        (max_size,) = _scaled([1333], image_size, 800)
    return RandomResize(_scaled(range(480, 801, 32), image_size, 800), max_size)
