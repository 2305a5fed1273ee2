"""What Siamese DETR sees (Chen et al., CVPR 2023): two overlapping views of an image, and regions that are in both.

Sizes are (height, width), crops (top, left, height, width), boxes (x0, y0, x1, y1), all in pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images.image_folder import ImageFiles, UnlabelledDataset, crop_box
from datasets.images.unlabelled import build_unlabelled_images
from datasets.pretext.random_query_patch import MIN_IMAGE_SIDE, QUERY_LABEL
from datasets.proposals import Proposals, build_proposals, pad_with_jittered_boxes
from datasets.sample import BadImageError, Target
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
OUTER_CROP_SCALE, OUTER_CROP_RATIO = (
    (0.5, 1.0),
    (3 / 4, 4 / 3),
)  # area of the outer crop, and its width / height
MIN_REGION_AREA = 0.05  # of a region, as a share of the overlap
MAX_ASPECT_RATIO = 8.0  # of random regions
NUM_RANDOM_BOXES = 100
MAX_VIEW_ATTEMPTS = 8  # pairs of views, until one has a region
EPS = 1e-10


@dataclass(frozen=True)
class Views:
    """first, second: crops of the image, in fractions of pixels. overlap_xyxy_abs: what both show, in the image.
    size: that both are resized to."""

    first: Crop
    second: Crop
    overlap_xyxy_abs: Tensor
    size: Size

    def image_to_view(self, boxes_xyxy_abs: Tensor, view: Crop) -> Tensor:
        """From pixels of the image to those of a view: [..., 4] -> [..., 4]"""
        top, left, height, width = view
        offset = boxes_xyxy_abs.new_tensor([left, top, left, top])
        return (boxes_xyxy_abs - offset) * boxes_xyxy_abs.new_tensor(
            [self.size[1] / width, self.size[0] / height] * 2
        )

    def map_between_views(self, boxes_xyxy_abs: Tensor, source: Crop, target: Crop) -> Tensor:
        """From pixels of one view to those of another: [..., 4] -> [..., 4]"""
        top, left, height, width = source
        scale = boxes_xyxy_abs.new_tensor([width / self.size[1], height / self.size[0]] * 2)
        return self.image_to_view(
            boxes_xyxy_abs * scale + boxes_xyxy_abs.new_tensor([left, top, left, top]), target
        )

    def is_inside(self, boxes_xyxy_abs: Tensor) -> Tensor:
        """Which boxes lie in a view, its last edge excluded as published: [..., 4] -> bool [...]"""
        end = boxes_xyxy_abs.new_tensor([self.size[1], self.size[0]] * 2)
        return ((boxes_xyxy_abs >= 0) & (boxes_xyxy_abs < end)).all(-1)


def overlap_scale(iou: float) -> float:
    """Side of the overlap as a share of the outer crop's, for which views from opposite corners have this IoU.

    With share s each view covers ((1 + s) / 2)^2 of the outer crop and the overlap s^2.
    """
    return (iou + math.sqrt(2 * iou * iou + 2 * iou)) / (iou + 2)


def draw_outer_crop(rng: SampleRNG, size: Size) -> tuple[int, int, int, int]:
    """A crop of half to all of the area, inside the image; after ten tries that do not fit the largest one in the
    middle.
    """
    height, width = size
    for _ in range(10):
        area = height * width * rng.python.uniform(*OUTER_CROP_SCALE)
        ratio = math.exp(
            rng.python.uniform(math.log(OUTER_CROP_RATIO[0]), math.log(OUTER_CROP_RATIO[1]))
        )
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = rng.python.randint(0, height - h)
            return top, rng.python.randint(0, width - w), h, w
    w = min(width, max(round(height * OUTER_CROP_RATIO[1]), 1))
    h = min(height, max(round(width / OUTER_CROP_RATIO[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_views(rng: SampleRNG, size: Size, iou: float, shrink: bool) -> Views:
    """Two views of an image: an outer crop whose centre is the overlap, each view from one of its corners to the
    overlap's far corner.

    shrink: the outer corner of each view moves towards the overlap by a random share of the way, so that IoU becomes
    `iou` or more.
    """
    top, left, height, width = draw_outer_crop(rng, size)
    scale = overlap_scale(iou)
    slack_y, slack_x = height * (1 - scale) / 2, width * (1 - scale) / 2
    inner_top, inner_left = top + slack_y, left + slack_x
    inner_bottom, inner_right = inner_top + height * scale, inner_left + width * scale
    shares = (rng.python.random(), rng.python.random()) if shrink else (0.0, 0.0)
    start_y, start_x = top + shares[0] * slack_y, left + shares[0] * slack_x
    end_y, end_x = inner_bottom + (1 - shares[1]) * slack_y, inner_right + (1 - shares[1]) * slack_x
    first = (start_y, start_x, inner_bottom - start_y, inner_right - start_x)
    second = (inner_top, inner_left, end_y - inner_top, end_x - inner_left)
    if rng.python.random() >= 0.5:
        first, second = second, first
    overlap = torch.tensor([inner_left, inner_top, inner_right, inner_bottom], dtype=torch.float64)
    return Views(first, second, overlap, (height, width))


def crop_view(image: ImageLike, view: Crop, size: Size) -> ImageLike:
    """The pixels of a view, at whole pixels, resized to (H, W)."""
    top, left, height, width = view
    y0, x0 = round(top), round(left)
    region = (y0, x0, max(round(top + height) - y0, 1), max(round(left + width) - x0, 1))
    return resize(crop(image, {}, region)[0], {}, size)[0]


def common_regions(boxes_xyxy_abs: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """Boxes of the image, cut to the overlap, that are still large enough: in pixels of each view, [N, 4] twice, in the
    same order.
    """
    low, high = views.overlap_xyxy_abs[:2], views.overlap_xyxy_abs[2:] - 1
    boxes = boxes_xyxy_abs.to(low.dtype)
    boxes = torch.cat([boxes[:, :2].maximum(low), boxes[:, 2:].minimum(high)], 1)
    boxes = boxes[(boxes[:, 2:] >= boxes[:, :2]).all(1)]
    first, second = (
        views.image_to_view(boxes, views.first),
        views.image_to_view(boxes, views.second),
    )
    smallest = MIN_REGION_AREA * _area(views.image_to_view(views.overlap_xyxy_abs, views.first))
    kept = (_area(first) >= smallest) & (first >= 0).all(1) & views.is_inside(second)
    return first[kept], second[kept]


def _area(boxes_xyxy_abs: Tensor) -> Tensor:
    return (boxes_xyxy_abs[..., 2:] - boxes_xyxy_abs[..., :2]).prod(-1)


def random_regions(
    rng: SampleRNG, views: Views, draws: int = NUM_RANDOM_BOXES
) -> tuple[Tensor, Tensor]:
    """As `common_regions`, of `draws` random boxes with a whole-pixel corner in the overlap; only those of up to 8 : 1
    in both views.

    As published, the area in the second view is compared with the overlap's in the first.
    """
    x0, y0, x1, y1 = views.image_to_view(views.overlap_xyxy_abs, views.first).tolist()
    smallest = MIN_REGION_AREA * (x1 - x0) * (y1 - y0)
    y = torch.from_numpy(rng.numpy.randint(int(y0), max(int(y1), int(y0) + 1), draws))
    x = torch.from_numpy(rng.numpy.randint(int(x0), max(int(x1), int(x0) + 1), draws))
    height = torch.from_numpy(rng.numpy.rand(draws)) * (y1 - y) + EPS
    least = smallest / height
    width = least + torch.from_numpy(rng.numpy.rand(draws)) * (x1 - x - least)
    first = torch.stack([x, y, x + width, y + height], 1)
    second = views.map_between_views(first, views.first, views.second)
    kept = (
        views.is_inside(first)
        & views.is_inside(second)
        & (_area(second) >= smallest)
        & _has_valid_shape(first)
        & _has_valid_shape(second)
    )
    return first[kept], second[kept]


def _has_valid_shape(boxes_xyxy_abs: Tensor) -> Tensor:
    width, height = (boxes_xyxy_abs[:, 2:] - boxes_xyxy_abs[:, :2]).unbind(1)
    return (
        (width > 0)
        & (height > 0)
        & (width <= MAX_ASPECT_RATIO * height)
        & (height <= MAX_ASPECT_RATIO * width)
    )


def select_regions(
    first: Tensor, second: Tensor, views: Views, count: int, rng: SampleRNG
) -> Tensor:
    """The overlap itself and the first `count` - 1 regions, in each view: [2, count, 4].

    Where there are fewer, jittered copies of them inside the overlap, or of the overlap where there is none.
    """
    overlap = torch.stack(
        [views.image_to_view(views.overlap_xyxy_abs, view) for view in (views.first, views.second)]
    )[:, None]
    pairs = torch.stack([first, second])[:, : count - 1]
    missing = count - 1 - pairs.shape[1]
    if missing:
        sources = pairs[0] if pairs.shape[1] else overlap[0]
        origin = overlap[0, 0, :2].repeat(2)
        height, width = (overlap[0, 0, 2:] - overlap[0, 0, :2]).flip(0).tolist()
        copies = (
            pad_with_jittered_boxes(sources - origin, len(sources) + missing, (height, width), rng)[
                len(sources) :
            ]
            + origin
        )
        pairs = torch.cat(
            [
                pairs,
                torch.stack([copies, views.map_between_views(copies, views.first, views.second)]),
            ],
            1,
        )
    return torch.cat([overlap, pairs], 1)


class SiameseDataset(UnlabelledDataset):
    """Samples of two views: image uint8 [2, 3, H, W], and in the target one more leading axis of 2 for everything. Box
    i of a view shows the region of box i of the other one; box 0 is the whole overlap.

    `patches` uint8 [2, M, 3, S, S] are crops of the views before their colours are changed. An image with a side of 16
    pixels or less, or without any proposal, counts as bad. Views that have no region in common are drawn again, the
    last time without regions.

    Args:
        proposals: None: random boxes inside of the overlap.
        patch_transform: None: no `patches` (regions are not discriminated).
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
        self.proposals, self.geometry, self.colors = proposals, geometry, colors
        self.patch_transform, self.num_boxes, self.iou, self.shrink = (
            patch_transform,
            num_boxes,
            iou,
            shrink,
        )

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        original = self.read(index)
        height, width = original.shape[-2:]
        if min(height, width) <= MIN_IMAGE_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels; both sides must exceed {MIN_IMAGE_SIDE}"
            )
        boxes = torch.zeros(0, 4)
        if self.proposals is not None:
            boxes = self.proposals(original, rng, self.images.name(index))
            if not len(boxes):
                raise BadImageError("no proposals")
        image, moved = self.geometry(original, {"boxes": boxes}, rng)
        views, regions = self._draw(moved["boxes"], tuple(image.shape[-2:]), rng)
        pixels = [crop_view(image, view, views.size) for view in (views.first, views.second)]
        target = _target(regions, views.size, index, (height, width))
        if self.patch_transform:
            target["patches"] = torch.stack(
                [self._crops(view, boxes, rng) for view, boxes in zip(pixels, regions, strict=True)]
            )
        return torch.stack([self.colors(view, {}, rng)[0] for view in pixels]), target

    def _draw(self, boxes: Tensor, size: Size, rng: SampleRNG) -> tuple[Views, Tensor]:
        for _ in range(MAX_VIEW_ATTEMPTS):
            views = draw_views(rng, size, self.iou, self.shrink)
            pair = (
                random_regions(rng, views)
                if self.proposals is None
                else common_regions(boxes, views)
            )
            if len(pair[0]):
                break
        return views, select_regions(*pair, views, self.num_boxes, rng)

    def _crops(self, view: Tensor, boxes_xyxy_abs: Tensor, rng: SampleRNG) -> Tensor:
        return torch.stack(
            [self.patch_transform(crop_box(view, box), {}, rng)[0] for box in boxes_xyxy_abs]
        )


def _target(boxes_xyxy_abs: Tensor, size: Size, index: int, original: Size) -> Target:
    """The target of two views with boxes [2, M, 4]."""
    scale = boxes_xyxy_abs.new_tensor([size[1], size[0]] * 2)
    numbers = {
        "image_id": torch.tensor([index]),
        "orig_size": torch.tensor(original),
        "size": torch.tensor(size),
    }
    return {
        "boxes": (box_xyxy_to_cxcywh(boxes_xyxy_abs) / scale).float(),
        "labels": torch.full(boxes_xyxy_abs.shape[:2], QUERY_LABEL),
        "area": _area(boxes_xyxy_abs).float(),
        "iscrowd": torch.zeros(boxes_xyxy_abs.shape[:2], dtype=torch.int64),
        **{name: value.expand(2, -1) for name, value in numbers.items()},
    }


def build_siamese_dataset(image_set: str, settings: Settings) -> SiameseDataset:
    """What `build_unlabelled_images` gives; "val" leaves the colours as they are.

    Raises:
        UserError: no images.
    """
    train = image_set == "train"
    images = build_unlabelled_images(image_set, settings)
    return SiameseDataset(
        images,
        None if settings.proposals == "random" else build_proposals(settings, images),
        geometry=Compose(
            [siamese_resize(settings.image_size, settings.max_size), RandomHorizontalFlip()]
        ),
        colors=ColorAugmentation(train),
        patch_transform=PatchAugmentation(settings.patch_size, augment=train)
        if settings.feature_loss_coef
        else None,
        num_boxes=settings.num_patches,
        iou=settings.view_iou,
        shrink=settings.view_shrink,
        seed=settings.seed,
    )
