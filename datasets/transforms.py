"""Augmentation. Each transform splits the random draw (`draw`) from its application (`apply`).

`draw(rng, size)` returns plain parameters and never reads a pixel. A draw may depend on the image size (a crop after a
resize), so `output_size` gives the size that a transform produces. `apply(image, target, parameters)` is deterministic.

Images are uint8 tensors [3, H, W] (fast) or PIL images (bit-exact with the published pipelines). Pixels, boxes and
masks go through torchvision.transforms.v2. Inside a pipeline `target["boxes"]` is float32 [N, 4], (x0, y0, x1, y1) in
pixels; `ToSample` converts it at the end.

Draws come in the order of DETR and UP-DETR: choices and sizes from Python's `random`, crop positions and colors from
torch, one transform after the other as listed.

Shapes: N boxes; a size is (H, W) in pixels; a region is (top, left, height, width) in pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.colors import NO_COLORS, ColorParameters, augment_image
from util.box_ops import box_xyxy_to_cxcywh
from util.moved_names import moved_from
from util.random_state import SampleRNG

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("datasets.transforms")

ImageLike = Tensor | Image.Image
Size = tuple[int, int]
Region = tuple[int, int, int, int]
Target = dict[str, Any]

# Optional key of a target: the (H, W) that its boxes and all draws refer to, where the image was decoded at a reduced
# size (`datasets.images.reduced_decode`). The first resize brings both together.
FULL_SIZE = "full_size"


def size_hw(image: ImageLike) -> Size:
    """Return (height, width) in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def full_size(image: ImageLike, target: Target) -> Size:
    """Return the (height, width) that the boxes of a target refer to."""
    return target.get(FULL_SIZE) or size_hw(image)


def resized_size(size: Size, short_side: int, max_size: int | None = None) -> Size:
    """Return (H, W) after resizing the short side to `short_side`, with DETR's rounding.

    If the long side would exceed `max_size`, the short side is lowered first and rounded half to even. The long side is
    computed from the rounded short side and truncated, so it can end a few pixels above or below `max_size`.
    """
    height, width = size
    low, high = min(size), max(size)
    if max_size is not None and high / low * short_side > max_size:
        short_side = round(max_size * low / high)
        if short_side == 0:
            # Thinner than one pixel, where the published code fails: keep one pixel.
            return (1, max_size) if height < width else (max_size, 1)
    if low == short_side:
        return size

    long_side = int(short_side * high / low)
    return (short_side, long_side) if height < width else (long_side, short_side)


def _as_tv_boxes(target: Target, size: Size) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)


def _as_plain_tensor(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _with_size(target: Target, size: Size) -> Target:
    """Return a shallow copy of the target with a new `size`; the caller's target stays unchanged."""
    return {**target, "size": torch.tensor(size)}


def hflip(image: ImageLike, target: Target) -> tuple[ImageLike, Target]:
    """Flip an image and its target horizontally."""
    target = dict(target)
    if "boxes" in target:
        boxes = F.horizontal_flip(_as_tv_boxes(target, full_size(image, target)))
        target["boxes"] = _as_plain_tensor(boxes)
    if "masks" in target:
        target["masks"] = F.horizontal_flip(target["masks"])
    return F.horizontal_flip(image), target


def resize(image: ImageLike, target: Target, size: Size) -> tuple[ImageLike, Target]:
    """Resize to exactly (H, W): bilinear with antialiasing, masks with nearest neighbor.

    Boxes and area scale with the actual ratios of the sides, which rounding makes slightly different in x and y.
    """
    old_size = full_size(image, target)
    target = _with_size(target, size)
    target.pop(FULL_SIZE, None)
    if old_size == tuple(size):
        return image, target

    if "boxes" in target:
        target["boxes"] = _as_plain_tensor(F.resize(_as_tv_boxes(target, old_size), list(size)))
    if "area" in target:
        target["area"] = target["area"] * (size[1] / old_size[1] * (size[0] / old_size[0]))
    if "masks" in target:
        target["masks"] = resize_masks(target["masks"], size)
    image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return image, target


def resize_masks(masks: Tensor, size: Size) -> Tensor:
    """Resize masks [N, h, w] to (H, W) with nearest neighbor, exactly as `interpolate(masks, size, mode="nearest")`."""
    rows, columns = (
        interpolate(torch.arange(old, dtype=torch.float32)[None, None], new, mode="nearest")
        for old, new in zip(masks.shape[1:], size, strict=True)
    )  # [1, 1, H], [1, 1, W]
    # NumPy's `take` copies the pixels three to four times as fast as `interpolate` does.
    taken = masks.numpy().take(columns.flatten().long(), axis=2)  # [N, h, W]
    return torch.from_numpy(taken.take(rows.flatten().long(), axis=1))  # [N, H, W]


def crop(image: ImageLike, target: Target, region: Region) -> tuple[ImageLike, Target]:
    """Crop an image and its target to (top, left, height, width).

    Boxes are clipped. Objects whose clipped box has no area are dropped from every per-object key.
    """
    top, left, height, width = region
    target = _with_size(target, (height, width))
    kept: Tensor | None = None  # bool [N]
    if "masks" in target:
        target["masks"] = F.crop(target["masks"], top, left, height, width)  # [N, height, width]
        kept = target["masks"].flatten(1).any(1)
    if "boxes" in target:
        boxes = F.crop(_as_tv_boxes(target, size_hw(image)), top, left, height, width)
        boxes = _as_plain_tensor(boxes)  # [N, 4]
        target["boxes"] = boxes
        # DETR replaces the annotated area (of the segmentation) by the box's area here.
        target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        # As in DETR, boxes decide if there are both boxes and masks.
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)

    if kept is not None:
        for key in ("boxes", "labels", "area", "iscrowd", "masks", "patches"):
            if key in target:
                target[key] = target[key][kept]
    return F.crop(image, top, left, height, width), target


class Transform:
    """Base class: draw parameters from random numbers and the image size, then apply them."""

    def draw(self, rng: SampleRNG, size: Size) -> Any:
        """Draw the parameters for an image of (H, W). None: nothing is random."""

    def output_size(self, size: Size, parameters: Any) -> Size:
        """Return the (H, W) that `apply` produces from an image of (H, W)."""
        return size

    def largest_resize(self, size: Size) -> Size | None:
        """Return the largest (H, W) that an image of (H, W) may be resized to. None: it is not resized."""
        return None

    def apply(self, image: ImageLike, target: Target, parameters: Any) -> tuple[ImageLike, Target]:
        """Transform an image and its target. The inputs are not modified."""
        raise NotImplementedError

    def __call__(
        self, image: ImageLike, target: Target, rng: SampleRNG
    ) -> tuple[ImageLike, Target]:
        return self.apply(image, target, self.draw(rng, full_size(image, target)))


class Compose(Transform):
    """Apply transforms one after the other. All draws come before the first `apply`."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, rng: SampleRNG, size: Size) -> list[Any]:
        parameters = []
        for transform in self.transforms:
            drawn = transform.draw(rng, size)
            size = transform.output_size(size, drawn)  # the next draw may depend on it
            parameters.append(drawn)
        return parameters

    def output_size(self, size: Size, parameters: list[Any]) -> Size:
        for transform, drawn in zip(self.transforms, parameters, strict=True):
            size = transform.output_size(size, drawn)
        return size

    def largest_resize(self, size: Size) -> Size | None:
        """Return the size of the first transform that resizes: the others get what it leaves."""
        found = (transform.largest_resize(size) for transform in self.transforms)
        return next((resized for resized in found if resized), None)

    def apply(
        self, image: ImageLike, target: Target, parameters: list[Any]
    ) -> tuple[ImageLike, Target]:
        for transform, drawn in zip(self.transforms, parameters, strict=True):
            image, target = transform.apply(image, target, drawn)
        return image, target


class RandomSelect(Transform):
    """Choose one of two transforms with equal probability."""

    def __init__(self, first: Transform, second: Transform) -> None:
        self.choices = (first, second)

    def draw(self, rng: SampleRNG, size: Size) -> tuple[int, Any]:
        choice = int(rng.python.random() >= 0.5)
        # Only the chosen transform draws, as published; drawing for both would shift all later draws.
        return choice, self.choices[choice].draw(rng, size)

    def output_size(self, size: Size, parameters: tuple[int, Any]) -> Size:
        choice, drawn = parameters
        return self.choices[choice].output_size(size, drawn)

    def largest_resize(self, size: Size) -> Size | None:
        sizes = [choice.largest_resize(size) for choice in self.choices]
        return max((resized for resized in sizes if resized), default=None)

    def apply(
        self, image: ImageLike, target: Target, parameters: tuple[int, Any]
    ) -> tuple[ImageLike, Target]:
        choice, drawn = parameters
        return self.choices[choice].apply(image, target, drawn)


class RandomHorizontalFlip(Transform):
    """Flip horizontally with probability 0.5."""

    def draw(self, rng: SampleRNG, size: Size) -> bool:
        return rng.python.random() < 0.5

    def apply(self, image: ImageLike, target: Target, parameters: bool) -> tuple[ImageLike, Target]:
        return hflip(image, target) if parameters else (image, target)


class RandomResize(Transform):
    """Resize the short side to one of `sizes` and the long side to at most about `max_size` (see `resized_size`)."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        self.sizes = list(sizes)
        self.max_size = max_size

    def draw(self, rng: SampleRNG, size: Size) -> int:
        return rng.python.choice(self.sizes)

    def output_size(self, size: Size, parameters: int) -> Size:
        return resized_size(size, parameters, self.max_size)

    def largest_resize(self, size: Size) -> Size | None:
        return resized_size(size, max(self.sizes), self.max_size)

    def apply(self, image: ImageLike, target: Target, parameters: int) -> tuple[ImageLike, Target]:
        return resize(image, target, self.output_size(full_size(image, target), parameters))


class RandomSizeCrop(Transform):
    """Crop a region whose width and height are drawn from [min_size, max_size] pixels.

    Both limits are lowered to the side of the image where it is shorter.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def draw(self, rng: SampleRNG, size: Size) -> Region:
        height, width = size
        # Width before height, and top before left: the published order of draws.
        crop_width = self._draw_side(rng, width)
        crop_height = self._draw_side(rng, height)
        if (crop_height, crop_width) == size:
            # No position to draw: the published crop draws none here either.
            return 0, 0, height, width
        top = int(torch.randint(0, height - crop_height + 1, (1,), generator=rng.torch))
        left = int(torch.randint(0, width - crop_width + 1, (1,), generator=rng.torch))
        return top, left, crop_height, crop_width

    def _draw_side(self, rng: SampleRNG, side: int) -> int:
        return rng.python.randint(min(self.min_size, side), min(self.max_size, side))

    def output_size(self, size: Size, parameters: Region) -> Size:
        _, _, height, width = parameters
        return height, width

    def largest_resize(self, size: Size) -> Size | None:
        return size  # its limits are in pixels of this image

    def apply(
        self, image: ImageLike, target: Target, parameters: Region
    ) -> tuple[ImageLike, Target]:
        return crop(image, target, parameters)


class ToSample(Transform):
    """Last transform of a pipeline: the image as uint8 tensor [3, H, W], boxes as normalized (cx, cy, w, h)."""

    def apply(self, image: ImageLike, target: Target, parameters: None) -> tuple[Tensor, Target]:
        height, width = size_hw(image)
        target = dict(target)
        if "boxes" in target:
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / scale
        if isinstance(image, Image.Image):
            image = F.pil_to_tensor(image)  # [3, H, W]
        return image, target


class ColorAugmentation(Transform):
    """Color jitter (probability 0.8), grayscale (0.2) and Gaussian blur (0.5), as in UP-DETR and Siamese DETR.

    Without `augment` the image stays unchanged. With `on_device` the colors are only drawn, and the dataset sends them
    with the sample: `datasets.collate.to_device` applies them.
    """

    # torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1).
    JITTER = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-0.1, 0.1),
    }

    def __init__(self, augment: bool, *, on_device: bool = False) -> None:
        self.augment = augment
        self.on_device = on_device

    def draw(self, rng: SampleRNG, size: Size) -> ColorParameters:
        if not self.augment:
            return NO_COLORS
        jitter = self._draw_jitter(rng) if self._chance(rng, 0.8) else []
        grayscale = self._chance(rng, 0.2)
        radius = rng.python.uniform(0.1, 2.0) if self._chance(rng, 0.5) else None
        return ColorParameters(jitter, grayscale, radius)

    @staticmethod
    def _chance(rng: SampleRNG, probability: float) -> bool:
        return float(torch.rand(1, generator=rng.torch)) <= probability

    def _draw_jitter(self, rng: SampleRNG) -> list[tuple[str, float]]:
        # The order first, then all four factors: ColorJitter's own order of draws.
        order = torch.randperm(len(self.JITTER), generator=rng.torch).tolist()
        factors = [
            (name, float(torch.empty(1).uniform_(low, high, generator=rng.torch)))
            for name, (low, high) in self.JITTER.items()
        ]
        return [factors[i] for i in order]

    def apply(
        self, image: ImageLike, target: Target, parameters: ColorParameters
    ) -> tuple[ImageLike, Target]:
        if isinstance(image, Tensor):
            return augment_image(image, parameters), target
        jitter, grayscale, radius = parameters
        for name, factor in jitter:
            image = getattr(F, f"adjust_{name}")(image, factor)
        if grayscale:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if radius is not None:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return image, target


class PatchAugmentation(ColorAugmentation):
    """UP-DETR's augmentation of a query patch: resize to S x S, then the colors. Without `augment` only the resize."""

    def __init__(self, patch_size: int, augment: bool, *, on_device: bool = False) -> None:
        super().__init__(augment, on_device=on_device)
        self.patch_size = patch_size

    def output_size(self, size: Size, parameters: ColorParameters) -> Size:
        return self.patch_size, self.patch_size

    def apply(
        self, image: ImageLike, target: Target, parameters: ColorParameters
    ) -> tuple[ImageLike, Target]:
        image = F.resize(image, [self.patch_size, self.patch_size], antialias=True)  # [3, S, S]
        return super().apply(image, target, parameters)


def _scale_sizes(sizes: Sequence[int], image_size: int, published: int) -> list[int]:
    """Scale published sizes by image_size / published, rounded half to even, to at least one pixel."""
    return [max(round(size * image_size / published), 1) for size in sizes]


def _scale_max_size(max_size: int | None, default: int, image_size: int, published: int) -> int:
    """Return `max_size` if it is given, else the published default, scaled."""
    if max_size is not None:
        return max_size
    return _scale_sizes([default], image_size, published)[0]


def _flip_and_crop(sizes: RandomResize, image_size: int, published: int) -> Compose:
    """DETR's training pipeline around a resize: flip, then the resize alone or a resize, a crop and the resize."""
    before_crop = RandomResize(_scale_sizes([400, 500, 600], image_size, published))
    random_crop = RandomSizeCrop(*_scale_sizes([384, 600], image_size, published))
    cropped = Compose([before_crop, random_crop, sizes])
    return Compose([RandomHorizontalFlip(), RandomSelect(sizes, cropped), ToSample()])


def detection_transforms(
    image_set: str, image_size: int = 800, max_size: int | None = None
) -> Compose:
    """DETR's augmentation for "train", a plain resize for "val".

    Published for a short side of 800: short sides 480, 512, ..., 800, long side up to 1333, crops of 384 to 600 after a
    resize to 400, 500 or 600. For another `image_size` all of these are multiplied by image_size / 800 and rounded half
    to even. `max_size` None scales 1333 in the same way.
    """
    max_size = _scale_max_size(max_size, 1333, image_size, published=800)
    if image_set != "train":
        return Compose([RandomResize([image_size], max_size), ToSample()])
    sizes = RandomResize(_scale_sizes(range(480, 801, 32), image_size, 800), max_size)
    return _flip_and_crop(sizes, image_size, published=800)


def query_patch_transforms(
    image_set: str, image_size: int = 480, max_size: int | None = None
) -> Compose:
    """UP-DETR's resize, without flip and crop.

    Published for 480: ten short sides from 320 to 480, long side up to 600. For another `image_size` they scale as in
    `detection_transforms`.
    """
    return Compose([_pretext_resize(image_set, image_size, max_size), ToSample()])


def _pretext_resize(image_set: str, image_size: int, max_size: int | None) -> RandomResize:
    """UP-DETR's sizes, which DETReg and Siamese DETR (on ImageNet) use too."""
    max_size = _scale_max_size(max_size, 600, image_size, published=480)
    if image_set == "train":
        # Steps of 16; the published list lacks 384.
        sizes = [size for size in range(320, 481, 16) if size != 384]
    else:
        sizes = [480]
    return RandomResize(_scale_sizes(sizes, image_size, 480), max_size)


def region_prior_transforms(
    image_set: str, image_size: int = 480, max_size: int | None = None
) -> Compose:
    """DETReg's augmentation for "train": DETR's flips and crops with UP-DETR's sizes. A plain resize for "val".

    Published for 480: crops of 384 to 600 after a resize to 400, 500 or 600. For another `image_size` all sizes scale.
    """
    sizes = _pretext_resize(image_set, image_size, max_size)
    if image_set != "train":
        return Compose([sizes, ToSample()])
    # DETReg keeps DETR's crop sizes although its images are smaller, so they count as published for 480 here.
    return _flip_and_crop(sizes, image_size, published=480)


def siamese_resize(image_size: int = 480, max_size: int | None = None) -> RandomResize:
    """Siamese DETR's resize before the views are cropped.

    Published for 480 (ImageNet, UP-DETR's sizes) and for 800 (COCO, DETR's sizes). Other sizes scale the nearer one.
    """
    if image_size <= 640:  # halfway between 480 and 800
        return _pretext_resize("train", image_size, max_size)
    max_size = _scale_max_size(max_size, 1333, image_size, published=800)
    return RandomResize(_scale_sizes(range(480, 801, 32), image_size, 800), max_size)
