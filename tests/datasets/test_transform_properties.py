"""Properties of the transforms on any image, boxes and order: boxes stay inside, valid, and on their pixels.

Each box is painted into one color channel. After the transforms, the painted pixels tell where the box must be.

Shapes: N boxes, H x W image.
"""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis", reason="hypothesis is not installed (requirements-dev.txt)")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import transforms as T
from datasets.pretext.patches import cut_patches
from datasets.pretext.siamese import common_regions, crop_view, draw_views, select_regions
from datasets.transforms import NO_COLORS, PatchAugmentation
from util.box_ops import box_cxcywh_to_xyxy
from util.nested_tensor import as_nested_tensor
from util.random_state import SampleRNG

CHANNELS = 3
THIN = 4.0  # pixels; a thinner box may be lost in a resize
some = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def painted_images(draw, low=16, high=72):
    """Return an image uint8 [3, H, W] and a target: box i is painted into channel i."""
    height, width = draw(st.integers(low, high)), draw(st.integers(low, high))
    image = torch.zeros(CHANNELS, height, width, dtype=torch.uint8)
    boxes, masks = [], []
    for channel in range(draw(st.integers(0, CHANNELS))):
        w, h = draw(st.integers(1, width)), draw(st.integers(1, height))
        x, y = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
        image[channel, y : y + h, x : x + w] = 255
        boxes.append([x, y, x + w, y + h])
        masks.append(image[channel] > 0)
    count = len(boxes)
    return image, {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(count),
        "area": torch.ones(count),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "masks": torch.stack(masks).to(torch.uint8)
        if masks
        else torch.zeros(0, height, width, dtype=torch.uint8),
        "size": torch.tensor([height, width]),
    }


def check_valid(image, target):
    """Check that boxes are inside the image, have an area, and that all entries have a row per object."""
    height, width = T.size_hw(image)
    boxes = target["boxes"]
    assert boxes.shape == (len(target["labels"]), 4)
    assert torch.isfinite(boxes).all()
    assert (boxes >= -1e-3).all()
    assert (boxes[:, 2] <= width + 1e-3).all()
    assert (boxes[:, 3] <= height + 1e-3).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for name in ("area", "iscrowd", "masks"):
        assert len(target[name]) == len(boxes), name
    assert target["masks"].shape[1:] == (height, width)
    assert target["size"].tolist() == [height, width]


def painted_box(channel):
    """Return the box (x0, y0, x1, y1) around the painted pixels of a channel [H, W]; None if there are none."""
    rows, columns = np.nonzero(np.asarray(channel) > 127)
    if not len(rows):
        return None
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def check_aligned(image, target, tolerance, thin=frozenset()):
    """Check that each box, except those of the labels in `thin`, is where its pixels and its mask are."""
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()
    for box, label, mask in zip(
        target["boxes"], target["labels"].tolist(), target["masks"], strict=True
    ):
        if label in thin:
            continue
        for found in (painted_box(pixels[:, :, label]), painted_box(mask.numpy() * 255)):
            assert found is not None, (label, box)
            assert np.abs(np.array(found) - box.numpy()).max() <= tolerance, (label, found, box)


def thin_labels(target):
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    return {
        label
        for label, side in zip(target["labels"].tolist(), sides, strict=True)
        if side.min() < THIN
    }


def random_step(draw, size):
    """Return one transform as a function of image and target, and the factor by which it enlarges."""
    height, width = size
    kind = draw(st.sampled_from(["flip", "crop", "resize"]))
    if kind == "flip":
        return T.hflip, 1.0
    if kind == "crop":
        h, w = (
            draw(st.integers(max(height // 3, 1), height)),
            draw(st.integers(max(width // 3, 1), width)),
        )
        region = draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w
        return lambda image, target: T.crop(image, target, region), 1.0
    new = draw(st.integers(12, 90)), draw(st.integers(12, 90))
    factor = max(new[0] / height, new[1] / width)
    return lambda image, target: T.resize(image, target, new), factor


@some
@given(painted=painted_images(), data=st.data(), is_pil=st.booleans())
def test_any_order_of_flip_crop_resize_and_pad_keeps_boxes_on_their_pixels(painted, data, is_pil):
    image, target = painted
    if is_pil:
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    thin, tolerance = thin_labels(target), 0.0
    for _ in range(data.draw(st.integers(1, 5))):
        step, factor = random_step(data.draw, T.size_hw(image))
        image, target = step(image, target)
        check_valid(image, target)
        thin |= thin_labels(target)
        if step is not T.hflip:
            tolerance = tolerance * max(factor, 1.0) + 1.0  # an edge is rounded to a pixel
    check_aligned(image, target, tolerance, thin)

    # Padding comes last, in the batch: at the right and at the bottom, so that no box moves.
    tensor = T.ToSample()(image, target, SampleRNG(0))[0]
    other = torch.zeros(3, 100, 95, dtype=torch.uint8)
    samples = as_nested_tensor([tensor.float(), other.float()])
    height, width = tensor.shape[1:]
    padded = samples.tensors[0]
    assert torch.equal(padded[:, :height, :width], tensor.float())
    assert not padded[:, height:].any()
    assert not padded[:, :, width:].any()
    assert not samples.mask[0, :height, :width].any()
    assert samples.mask[0, height:].all()
    assert samples.mask[0, :, width:].all()


@some
@given(
    painted=painted_images(low=20),
    seed=st.integers(0, 10**6),
    image_size=st.integers(32, 96),
    build=st.sampled_from(
        [T.detection_transforms, T.region_prior_transforms, T.query_patch_transforms]
    ),
    image_set=st.sampled_from(["train", "val"]),
)
def test_pipelines_keep_boxes_on_their_pixels(painted, seed, image_size, build, image_set):
    image, target = painted
    pipeline = build(image_set, image_size)
    parameters = pipeline.draw(SampleRNG(seed), T.size_hw(image))
    expected_size = pipeline.output_size(T.size_hw(image), parameters)
    out, found = pipeline.apply(image, target, parameters)
    assert T.size_hw(out) == tuple(expected_size)
    boxes = found["boxes"]
    assert (boxes >= 0).all()
    assert (boxes <= 1 + 1e-5).all()
    height, width = T.size_hw(out)
    scale = torch.tensor([width, height, width, height])
    found = {**found, "boxes": box_cxcywh_to_xyxy(boxes) * scale}
    check_valid(out, found)

    # The original and all sizes on the way: a box may have been thin in between.
    factor = max(height, width) / min(*T.size_hw(image), 20)
    small = thin_labels(target) | thin_labels(found)
    if factor < 4:
        check_aligned(out, found, tolerance=2 + 2 * factor, thin=small)


@some
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(33, 120),
    width=st.integers(33, 120),
    shrink=st.booleans(),
)
def test_views_show_the_same_region_at_the_boxes(seed, height, width, shrink):
    """A gradient tells for each pixel where it was in the image."""
    rng = SampleRNG(seed)
    columns = torch.linspace(0, 255, width).expand(height, width)
    rows = torch.linspace(0, 255, height)[:, None].expand(height, width)
    image = torch.stack([columns, rows, torch.zeros(height, width)]).round().to(torch.uint8)
    views = draw_views(rng, (height, width), iou=0.5, shrink=shrink)
    x0, y0, x1, y1 = views.overlap_xyxy_abs.tolist()
    assert -1e-6 <= x0 < x1 <= width + 1e-6
    assert -1e-6 <= y0 < y1 <= height + 1e-6

    proposals = torch.rand(10, 4, generator=rng.torch) * torch.tensor(
        [width, height, width, height]
    )
    proposals[:, 2:] = proposals[:, 2:].maximum(proposals[:, :2] + 4)
    first, second = common_regions(proposals, views)
    regions = select_regions(first, second, views, 5, rng)
    assert regions.shape == (2, 5, 4)
    end = torch.tensor([views.size[1], views.size[0]] * 2, dtype=torch.float64)
    assert (regions >= -1e-6).all()
    assert (regions <= end + 1e-6).all()
    assert (regions[..., 2:] >= regions[..., :2]).all()

    pixels = [crop_view(image, view, views.size).float() for view in (views.first, views.second)]
    for box_first, box_second in zip(*regions, strict=True):
        means = []
        for shown, box in zip(pixels, (box_first, box_second), strict=True):
            left, top, right, bottom = box.round().int().tolist()
            part = shown[:2, top : max(bottom, top + 1), left : max(right, left + 1)]
            means.append(part.mean((1, 2)) if part.numel() else None)
        if None in [value if value is None else 0 for value in means]:
            continue
        # Three pixels of the image: crops and boxes are rounded to whole ones.
        limit = 3 * 255 / torch.tensor([width, height])
        assert (abs(means[0] - means[1]) <= limit).all(), (means, box_first, box_second)


@some
@given(painted=painted_images(low=20), size=st.integers(8, 40))
def test_patches_show_their_boxes(painted, size):
    image, target = painted
    boxes = target["boxes"]
    if not len(boxes):
        return
    augmentation = PatchAugmentation(size, augment=False)
    patches = cut_patches(image, boxes, augmentation, [NO_COLORS] * len(boxes))["patches"]
    assert patches.shape == (len(boxes), 3, size, size)
    for channel, patch in enumerate(patches):
        assert (patch[channel] == 255).all(), "a patch shows its box and nothing around it"
