"""Dataset of Siamese DETR (Chen et al., CVPR 2023): two overlapping views of an image, and regions that both show.

Units are pixels: sizes (height, width), crops (top, left, height, width), boxes (x0, y0, x1, y1).
Shapes: N boxes or regions, M boxes per view of a sample, S patch size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.colors import VIEW_COLORS, augment_image, encode_colors
from datasets.images.image_folder import ImageFiles, UnlabelledDataset
from datasets.images.unlabelled import build_unlabelled_images
from datasets.pretext.patches import draw_patches
from datasets.pretext.random_query_patch import MIN_IMAGE_SIDE, QUERY_LABEL
from datasets.proposals import Proposals, build_proposals, pad_with_jittered_boxes
from datasets.sample import BadImageError, Target, TooFewProposalsError
from datasets.transforms import (
    ColorAugmentation,
    Compose,
    ImageLike,
    PatchAugmentation,
    RandomHorizontalFlip,
    Size,
    crop,
    resize,
    siamese_resize,
)
from util.box_ops import box_xyxy_to_cxcywh
from util.random_state import SampleRNG
from util.settings import Settings

Crop = tuple[float, float, float, float]

# The outer crop is drawn as in torchvision's RandomResizedCrop.
OUTER_CROP_SCALE = (0.5, 1.0)  # fraction of the image area
OUTER_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
OUTER_CROP_ATTEMPTS = 10

MIN_REGION_AREA = 0.05  # of a region, as a fraction of the overlap
MAX_ASPECT_RATIO = 8.0  # of a random region, long side / short side
NUM_RANDOM_BOXES = 100  # drawn per pair of views; those that are too small or too thin are dropped
MAX_VIEW_ATTEMPTS = 8  # pairs of views drawn until they have a region in common
EPS = 1e-10  # avoids a division by zero


@dataclass(frozen=True)
class Views:
    """Geometry of two views of an image.

    first, second: crops of the image, not rounded to whole pixels.
    overlap_xyxy_abs: float64 [4], the part of the image that both views show.
    size: (H, W) to which both crops are resized.
    """

    first: Crop
    second: Crop
    overlap_xyxy_abs: Tensor
    size: Size

    def image_to_view(self, boxes_xyxy_abs: Tensor, view: Crop) -> Tensor:
        """Map boxes [..., 4] from the image to a view."""
        top, left, height, width = view
        offset = boxes_xyxy_abs.new_tensor([left, top, left, top])
        scale = boxes_xyxy_abs.new_tensor([self.size[1] / width, self.size[0] / height] * 2)
        return (boxes_xyxy_abs - offset) * scale

    def map_between_views(self, boxes_xyxy_abs: Tensor, source: Crop, target: Crop) -> Tensor:
        """Map boxes [..., 4] from one view to the other."""
        top, left, height, width = source
        offset = boxes_xyxy_abs.new_tensor([left, top, left, top])
        scale = boxes_xyxy_abs.new_tensor([width / self.size[1], height / self.size[0]] * 2)
        return self.image_to_view(boxes_xyxy_abs * scale + offset, target)

    def is_inside(self, boxes_xyxy_abs: Tensor) -> Tensor:
        """Return which boxes [..., 4] are inside a view: bool [...]. Its far edge is excluded, as published."""
        end = boxes_xyxy_abs.new_tensor([self.size[1], self.size[0]] * 2)
        return ((boxes_xyxy_abs >= 0) & (boxes_xyxy_abs < end)).all(-1)


def overlap_scale(iou: float) -> float:
    """Return the side of the overlap, as a fraction of the outer crop's side, that gives two views this IoU.

    With fraction s each view covers ((1 + s) / 2)^2 of the outer crop and the overlap covers s^2. This solves
    iou = s^2 / (2 ((1 + s) / 2)^2 - s^2) for s.
    """
    return (iou + math.sqrt(2 * iou * iou + 2 * iou)) / (iou + 2)


def draw_outer_crop(rng: SampleRNG, size: Size) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) of half to all of the image area.

    After ten draws that do not fit into the image, return the largest centered crop with an allowed aspect ratio.
    """
    height, width = size
    min_ratio, max_ratio = OUTER_CROP_RATIO
    for _ in range(OUTER_CROP_ATTEMPTS):
        area = height * width * rng.python.uniform(*OUTER_CROP_SCALE)
        # Uniform in the logarithm, so that a ratio and its inverse are equally likely.
        ratio = math.exp(rng.python.uniform(math.log(min_ratio), math.log(max_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = rng.python.randint(0, height - h)
            left = rng.python.randint(0, width - w)
            return top, left, h, w

    w = min(width, max(round(height * max_ratio), 1))
    h = min(height, max(round(width / min_ratio), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_views(rng: SampleRNG, size: Size, iou: float, shrink: bool) -> Views:
    """Draw two views of an image.

    The overlap is the center of an outer crop. The first view goes from the outer crop's top left corner to the
    overlap's bottom right corner, the second one from the overlap's top left corner to the outer crop's bottom right
    corner. They are swapped with probability 0.5.

    Args:
        iou: IoU of the two views; with `shrink` its lower limit.
        shrink: move the outer corner of each view towards the overlap by a random fraction of the way.
    """
    top, left, height, width = draw_outer_crop(rng, size)
    scale = overlap_scale(iou)
    # Margin between the outer crop and the overlap, on each side.
    slack_y = height * (1 - scale) / 2
    slack_x = width * (1 - scale) / 2
    inner_top, inner_left = top + slack_y, left + slack_x
    inner_bottom, inner_right = inner_top + height * scale, inner_left + width * scale

    # One fraction per view for both axes, so that the aspect ratio stays.
    first_shrink = rng.python.random() if shrink else 0.0
    second_shrink = rng.python.random() if shrink else 0.0
    start_y = top + first_shrink * slack_y
    start_x = left + first_shrink * slack_x
    end_y = inner_bottom + (1 - second_shrink) * slack_y
    end_x = inner_right + (1 - second_shrink) * slack_x

    first = (start_y, start_x, inner_bottom - start_y, inner_right - start_x)
    second = (inner_top, inner_left, end_y - inner_top, end_x - inner_left)
    if rng.python.random() >= 0.5:
        first, second = second, first

    overlap = torch.tensor([inner_left, inner_top, inner_right, inner_bottom], dtype=torch.float64)
    return Views(first, second, overlap, (height, width))


def crop_view(image: ImageLike, view: Crop, size: Size) -> ImageLike:
    """Crop a view, rounded to whole pixels, and resize it to (H, W)."""
    top, left, height, width = view
    y0, x0 = round(top), round(left)
    y1, x1 = round(top + height), round(left + width)
    cropped, _ = crop(image, {}, (y0, x0, max(y1 - y0, 1), max(x1 - x0, 1)))
    resized, _ = resize(cropped, {}, size)
    return resized


def common_regions(boxes_xyxy_abs: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """Clip boxes [N, 4] of the image to the overlap and drop those that are then too small.

    Returns (boxes in the first view, the same boxes in the second view), float64 [K, 4] each, K <= N.
    """
    # As published, the far edges are one pixel inside the overlap.
    low, high = views.overlap_xyxy_abs[:2], views.overlap_xyxy_abs[2:] - 1
    boxes = boxes_xyxy_abs.to(low.dtype)
    boxes = torch.cat([boxes[:, :2].maximum(low), boxes[:, 2:].minimum(high)], 1)
    # A box outside of the overlap has its corners swapped now.
    boxes = boxes[(boxes[:, 2:] >= boxes[:, :2]).all(1)]

    first = views.image_to_view(boxes, views.first)
    second = views.image_to_view(boxes, views.second)
    # As published, sizes are compared in the first view alone.
    min_area = MIN_REGION_AREA * _area(views.image_to_view(views.overlap_xyxy_abs, views.first))
    kept = (_area(first) >= min_area) & (first >= 0).all(1) & views.is_inside(second)
    return first[kept], second[kept]


def _area(boxes_xyxy_abs: Tensor) -> Tensor:
    """Areas of boxes: [..., 4] -> [...]"""
    return (boxes_xyxy_abs[..., 2:] - boxes_xyxy_abs[..., :2]).prod(-1)


def random_regions(
    rng: SampleRNG, views: Views, draws: int = NUM_RANDOM_BOXES
) -> tuple[Tensor, Tensor]:
    """Draw random boxes in the overlap.

    Keep those that are inside both views, have an aspect ratio of at most 8 : 1 in both, and cover at least 5 % of the
    overlap.

    The top left corner is at whole pixels of the first view. Returns boxes of both views as `common_regions`, K <=
    `draws`.
    """
    x0, y0, x1, y1 = views.image_to_view(views.overlap_xyxy_abs, views.first).tolist()
    min_area = MIN_REGION_AREA * (x1 - x0) * (y1 - y0)

    # The order of draws is the published one: y, x, height, width, each for all boxes at once.
    y = torch.from_numpy(rng.numpy.randint(int(y0), max(int(y1), int(y0) + 1), draws))
    x = torch.from_numpy(rng.numpy.randint(int(x0), max(int(x1), int(x0) + 1), draws))
    height = torch.from_numpy(rng.numpy.rand(draws)) * (y1 - y) + EPS
    min_width = min_area / height  # the box then has at least the minimum area
    width = min_width + torch.from_numpy(rng.numpy.rand(draws)) * (x1 - x - min_width)

    first = torch.stack([x, y, x + width, y + height], 1)  # [draws, 4]
    second = views.map_between_views(first, views.first, views.second)
    kept = (
        views.is_inside(first)
        & views.is_inside(second)
        # As published, the area in the second view is compared with that of the overlap in the first one.
        & (_area(second) >= min_area)
        & _has_valid_shape(first)
        & _has_valid_shape(second)
    )
    return first[kept], second[kept]


def _has_valid_shape(boxes_xyxy_abs: Tensor) -> Tensor:
    """Return which boxes [N, 4] have positive sides and an aspect ratio of at most 8 : 1, bool [N]."""
    width, height = (boxes_xyxy_abs[:, 2:] - boxes_xyxy_abs[:, :2]).unbind(1)
    is_positive = (width > 0) & (height > 0)
    is_thin = (width > MAX_ASPECT_RATIO * height) | (height > MAX_ASPECT_RATIO * width)
    return is_positive & ~is_thin


def select_regions(
    first: Tensor, second: Tensor, views: Views, count: int, rng: SampleRNG
) -> Tensor:
    """Return the overlap and the first `count` - 1 regions, in both views: [2, count, 4].

    If there are fewer regions, jittered copies of them inside the overlap fill up the rest; if there is none, jittered
    copies of the overlap.
    """
    overlap = torch.stack(
        [views.image_to_view(views.overlap_xyxy_abs, view) for view in (views.first, views.second)]
    )[:, None]  # [2, 1, 4]
    pairs = torch.stack([first, second])[:, : count - 1]  # [2, K, 4]

    missing = count - 1 - pairs.shape[1]
    if missing:
        sources = pairs[0] if pairs.shape[1] else overlap[0]
        copies = _jittered_copies(sources, missing, overlap[0, 0], rng)  # [missing, 4]
        # Jittered in the first view alone and mapped, so that both boxes still show the same region.
        mapped = views.map_between_views(copies, views.first, views.second)
        pairs = torch.cat([pairs, torch.stack([copies, mapped])], 1)  # [2, count - 1, 4]
    return torch.cat([overlap, pairs], 1)


def _jittered_copies(
    sources_xyxy_abs: Tensor, count: int, bounds_xyxy_abs: Tensor, rng: SampleRNG
) -> Tensor:
    """Return `count` jittered copies of boxes [N, 4] that stay inside the box `bounds_xyxy_abs` [4]: [count, 4]."""
    # `pad_with_jittered_boxes` clips to a size, so the bounds are moved to the origin and back.
    origin = bounds_xyxy_abs[:2].repeat(2)
    width, height = (bounds_xyxy_abs[2:] - bounds_xyxy_abs[:2]).tolist()
    num_sources = len(sources_xyxy_abs)
    padded = pad_with_jittered_boxes(
        sources_xyxy_abs - origin, num_sources + count, (height, width), rng
    )
    return padded[num_sources:] + origin


class SiameseDataset(UnlabelledDataset):
    """Samples of two views: image uint8 [2, 3, H, W], and a leading axis of 2 in every entry of the target.

    Box i of one view shows the same region as box i of the other view; box 0 is the whole overlap. `patches` uint8
    [2, M, 3, S, S] are crops of the views before the views' color augmentation.

    An image with a side of 16 pixels or less, or without proposals, is a bad image. Views without a common region are
    drawn again. If the eighth pair has none either, its boxes are jittered copies of the overlap.

    Args:
        proposals: None: random boxes inside the overlap.
        geometry: transforms of the image and its boxes before the views are cropped.
        colors: color augmentation, drawn for each view on its own.
        patch_transform: None: no `patches` (no region discrimination).
        num_boxes: M.
        iou, shrink: see `draw_views`.
    """

    def __init__(
        self,
        images: ImageFiles,
        proposals: Proposals | None,
        *,
        geometry: Compose,
        colors: ColorAugmentation,
        patch_transform: PatchAugmentation | None,
        num_boxes: int,
        iou: float = 0.5,
        shrink: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals = proposals
        self.geometry = geometry
        self.colors = colors
        self.patch_transform = patch_transform
        self.num_boxes = num_boxes
        self.iou = iou
        self.shrink = shrink

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        opened = self.images.open(index)
        height, width = opened.size
        if min(height, width) <= MIN_IMAGE_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels; both sides must exceed {MIN_IMAGE_SIDE}"
            )
        boxes = self._propose(opened.whole, index, rng)  # [N, 4]

        # Views and patches are cropped after the resize, so it alone decides how many pixels are needed.
        decoded = opened.decode(self.geometry.largest_resize(opened.size))
        image, transformed = self.geometry(decoded.image, {"boxes": boxes, **decoded.target}, rng)
        size = tuple(image.shape[-2:])
        views, regions = self._draw_views(transformed["boxes"], size, rng)  # regions [2, M, 4]
        pixels = [crop_view(image, view, views.size) for view in (views.first, views.second)]

        target = _build_target(regions, views.size, index, (height, width))
        if self.patch_transform:
            patches = [
                draw_patches(view, view_boxes, self.patch_transform, rng)
                for view, view_boxes in zip(pixels, regions, strict=True)
            ]
            # [2, M, 3, S, S]
            target.update({key: torch.stack([own[key] for own in patches]) for key in patches[0]})

        drawn = [self.colors.draw(rng, views.size) for _ in pixels]
        if self.colors.on_device:
            target[VIEW_COLORS] = encode_colors(drawn)[:, None]  # [2, 1, 10]
        else:
            pixels = [augment_image(view, own) for view, own in zip(pixels, drawn, strict=True)]
        return torch.stack(pixels), target  # [2, 3, H, W]

    def _propose(self, image: Tensor, index: int, rng: SampleRNG) -> Tensor:
        """Return proposals [N, 4], or [0, 4] if boxes are drawn in the overlap."""
        if self.proposals is None:
            return torch.zeros(0, 4)
        boxes = self.proposals(image, rng, self.images.name(index))
        if not len(boxes):
            raise TooFewProposalsError(0, 1)
        return boxes

    def _draw_views(self, boxes: Tensor, size: Size, rng: SampleRNG) -> tuple[Views, Tensor]:
        """Draw views until they have a region in common; return them and their regions [2, M, 4]."""
        for _ in range(MAX_VIEW_ATTEMPTS):
            views = draw_views(rng, size, self.iou, self.shrink)
            if self.proposals is None:
                first, second = random_regions(rng, views)
            else:
                first, second = common_regions(boxes, views)
            if len(first):
                break
        return views, select_regions(first, second, views, self.num_boxes, rng)


def _build_target(boxes_xyxy_abs: Tensor, size: Size, index: int, orig_size: Size) -> Target:
    """Build the target of two views of (H, W) `size` with boxes [2, M, 4]."""
    height, width = size
    scale = boxes_xyxy_abs.new_tensor([width, height, width, height])
    shared = {
        "image_id": torch.tensor([index]),
        "orig_size": torch.tensor(orig_size),
        "size": torch.tensor(size),
    }
    return {
        "boxes": (box_xyxy_to_cxcywh(boxes_xyxy_abs) / scale).float(),  # [2, M, 4]
        "labels": torch.full(boxes_xyxy_abs.shape[:2], QUERY_LABEL),  # [2, M]
        "area": _area(boxes_xyxy_abs).float(),
        "iscrowd": torch.zeros(boxes_xyxy_abs.shape[:2], dtype=torch.int64),
        # Equal for both views: [1] -> [2, 1], [2] -> [2, 2].
        **{name: value.expand(2, -1) for name, value in shared.items()},
    }


def build_siamese_dataset(image_set: str, settings: Settings) -> SiameseDataset:
    """Build the dataset from `build_unlabelled_images`; "val" is without color augmentation.

    Raises:
        UserError: no images, or proposals that do not fit them.
    """
    train = image_set == "train"
    images = build_unlabelled_images(image_set, settings)
    proposals = None
    if settings.proposals != "random":
        proposals = build_proposals(settings, images)
    resize_views = siamese_resize(settings.image_size, settings.max_size)
    patch_transform = None
    if settings.feature_loss_coef:
        patch_transform = PatchAugmentation(
            settings.patch_size, augment=train, on_device=settings.device_augment
        )

    return SiameseDataset(
        images,
        proposals,
        geometry=Compose([resize_views, RandomHorizontalFlip()]),
        colors=ColorAugmentation(train, on_device=settings.device_augment),
        patch_transform=patch_transform,
        num_boxes=settings.num_patches,
        iou=settings.view_iou,
        shrink=settings.view_shrink,
        seed=settings.seed,
    )
