"""The dataset of Siamese DETR: geometry of the two views, common regions, samples and batches.

test_golden.py compares with the published values.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import build_dataset
from datasets.collate import collate, to_device
from datasets.pretext import siamese as siamese_module
from datasets.pretext.siamese import (
    MIN_REGION_AREA,
    Views,
    common_regions,
    draw_outer_crop,
    draw_views,
    overlap_scale,
    random_regions,
    select_regions,
)
from datasets.transforms import siamese_resize
from tests.tiny import assert_same, tiny_args, write_images
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.random_state import SampleRNG
from util.settings import PRETRAIN
from visualization import samples_to_rows

FLAGS = ("--pretext", "siamese", "--proposals", "random")
SIZE = (240, 320)


def to_box(view: tuple) -> Tensor:
    top, left, height, width = view
    return torch.tensor([[left, top, left + width, top + height]], dtype=torch.float64)


def iou_of(views: Views) -> float:
    return float(box_iou(to_box(views.first), to_box(views.second))[0])


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_iou_of_the_views_is_view_iou_or_more(iou: float) -> None:
    exact = [draw_views(SampleRNG(seed), SIZE, iou, shrink=False) for seed in range(10)]
    assert [iou_of(views) for views in exact] == pytest.approx([iou] * 10)
    shrunk = [iou_of(draw_views(SampleRNG(seed), SIZE, iou, shrink=True)) for seed in range(50)]
    assert min(shrunk) >= iou - 1e-9
    assert max(shrunk) > iou + 0.2


def test_overlap_scale_equals_the_published_values() -> None:
    assert [round(overlap_scale(iou), 4) for iou in (0.3, 0.5, 0.7)] == [0.5144, 0.6899, 0.8306]


def test_views_are_swapped_half_of_the_time_and_stay_inside() -> None:
    swapped = 0
    for seed in range(60):
        views = draw_views(SampleRNG(seed), SIZE, 0.5, shrink=True)
        swapped += views.first[0] > views.second[0]
        for box in (to_box(views.first)[0], to_box(views.second)[0]):
            assert box.min() >= 0
            assert box[2] <= SIZE[1] + 1e-9
            assert box[3] <= SIZE[0] + 1e-9
    assert 15 < swapped < 45


def test_outer_crop_of_a_long_image_is_centered() -> None:
    assert draw_outer_crop(SampleRNG(0), (20, 2000)) == (0, 986, 20, 27)
    assert draw_outer_crop(SampleRNG(0), (2000, 20)) == (986, 0, 27, 20)


def test_mapping_between_views_and_back_is_the_identity() -> None:
    views = draw_views(SampleRNG(3), SIZE, 0.5, shrink=True)
    boxes = torch.rand(20, 4, dtype=torch.float64) * 100
    mapped = views.map_between_views(boxes, views.first, views.second)
    torch.testing.assert_close(views.map_between_views(mapped, views.second, views.first), boxes)
    assert not torch.allclose(mapped, boxes)


def test_regions_are_inside_both_views_and_large_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([280.0, 200.0])
    boxes = torch.cat([corners, corners + 5 + torch.rand(200, 2, generator=generator) * 80], 1)
    for seed in range(5):
        views = draw_views(SampleRNG(seed), SIZE, 0.5, shrink=True)
        overlap = [
            views.image_to_view(views.overlap_xyxy_abs, view)
            for view in (views.first, views.second)
        ]
        smallest = MIN_REGION_AREA * float((overlap[0][2:] - overlap[0][:2]).prod())
        for pair, measured in (
            (common_regions(boxes, views), 0),
            (random_regions(SampleRNG(seed), views), 1),
        ):
            assert (pair[measured][:, 2:] - pair[measured][:, :2]).prod(1).min() >= smallest
            assert 3 < len(pair[0]) == len(pair[1])
            for side, regions in enumerate(pair):
                assert (regions >= -1e-9).all()
                assert (regions[:, 2:] < torch.tensor([views.size[1], views.size[0]])).all()
                assert (regions[:, :2] >= overlap[side][:2].floor() - 1e-6).all()
            torch.testing.assert_close(
                views.map_between_views(pair[0], views.first, views.second), pair[1]
            )


@pytest.mark.parametrize("kept", [0, 2, 20])
def test_box_0_is_the_overlap_and_missing_boxes_are_jittered_copies(kept: int) -> None:
    views = draw_views(SampleRNG(1), SIZE, 0.5, shrink=True)
    first, second = (regions[:kept] for regions in random_regions(SampleRNG(1), views, 400))
    assert len(first) == kept
    picked = select_regions(first, second, views, 10, SampleRNG(2))
    assert picked.shape == (2, 10, 4)
    overlap = torch.stack(
        [views.image_to_view(views.overlap_xyxy_abs, view) for view in (views.first, views.second)]
    )
    torch.testing.assert_close(picked[:, 0], overlap)
    torch.testing.assert_close(
        views.map_between_views(picked[0], views.first, views.second), picked[1]
    )
    assert torch.equal(picked[0, 1 : 1 + min(kept, 9)], first[:9])
    assert (picked[0, :, :2] >= overlap[0, :2] - 1).all()
    assert (picked[0, :, 2:] <= overlap[0, 2:] + 1e-9).all()
    sources = first if kept else overlap[:1]
    for i in range(kept, 9):
        source, copy = sources[i % len(sources)], picked[0, 1 + i]
        moved = (copy - source).abs() / (source[2:] - source[:2]).repeat(2)
        assert 0 < moved.max() <= 0.1 + 1e-9


def make_dataset(tmp_path: Path, *flags: str):
    folder = tmp_path / "images"
    if not folder.exists():
        write_images(folder)
    return build_dataset(
        "train", tiny_args(PRETRAIN, *FLAGS, "--imagenet_path", str(folder), *flags)
    )


def test_samples_are_siamese_module_with_their_regions(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    assert len(dataset) == 4
    for epoch in range(3):
        images, target = dataset[(epoch, 1)]
        height, width = images.shape[2:]
        assert images.shape == (2, 3, height, width)
        assert images.dtype == torch.uint8
        assert {name: tuple(x.shape) for name, x in target.items()} == {
            "boxes": (2, 5, 4),
            "labels": (2, 5),
            "area": (2, 5),
            "iscrowd": (2, 5),
            "image_id": (2, 1),
            "orig_size": (2, 2),
            "size": (2, 2),
            "patches": (2, 5, 3, 32, 32),
        }
        assert target["labels"].unique().tolist() == [1]
        assert target["size"].tolist() == [[height, width]] * 2
        corners = box_cxcywh_to_xyxy(target["boxes"])
        assert corners.min() >= -1e-6
        assert corners.max() <= 1 + 1e-6
    again = make_dataset(tmp_path)[(2, 1)]
    assert torch.equal(images, again[0])
    assert_same(dict(target), dict(again[1]))
    assert "patches" not in make_dataset(tmp_path, "--feature_loss_coef", "0")[0][1]


def test_regions_come_from_the_proposal_method(tmp_path: Path) -> None:
    """A box in the middle is in every overlap: it is box 1 of both views, and the other boxes are copies of it."""
    dataset = make_dataset(tmp_path)
    dataset.proposals = lambda image, rng, name: torch.tensor(
        [[30.0, 25.0, 50.0, 40.0], [0.0, 0.0, 2.0, 2.0]]
    )
    dataset.shrink = False
    seen = 0
    for epoch in range(6):
        images, target = dataset[(epoch, 0)]
        box = target["boxes"][:, 1]
        # Without shrink both views have the same scale.
        torch.testing.assert_close(box[0, 2:], box[1, 2:], rtol=1e-4, atol=1e-4)
        seen += int((box[0, :2] - box[1, :2]).abs().min() > 0.05)
    assert seen > 3


def test_views_without_a_common_region_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box in a corner is soon in both views.

    A box that is too small for any overlap leaves copies of the overlap, and the image is not a bad one.
    """
    drawn = []
    monkeypatch.setattr(
        siamese_module,
        "draw_views",
        lambda *args, **kwargs: drawn.append(1) or draw_views(*args, **kwargs),
    )
    dataset = make_dataset(tmp_path)
    for box, low, high in (
        ([0.0, 0.0, 24.0, 20.0], 9, 8 * siamese_module.MAX_VIEW_ATTEMPTS - 1),
        ([0.0, 0.0, 2.0, 2.0], 8 * siamese_module.MAX_VIEW_ATTEMPTS, None),
    ):
        dataset.proposals = lambda image, rng, name, box=box: torch.tensor([box])
        drawn.clear()
        targets = [dataset[(epoch, 0)][1] for epoch in range(8)]
        assert low <= len(drawn) <= (high or low)
        assert not any("problems" in target for target in targets)
        for target in targets:
            corners = box_cxcywh_to_xyxy(target["boxes"])
            assert corners.min() >= -1e-6
            assert corners.max() <= 1 + 1e-6
            assert target["boxes"][..., 2:].min() > 0
    copies = targets[0]["boxes"][0, 1:, 2:] / targets[0]["boxes"][0, 0, 2:]
    assert 0.8 <= copies.min() < copies.max() <= 1, "nearly the overlap"


def test_thin_gray_and_tiny_images(tmp_path: Path) -> None:
    """Thin images have fewer pixels in height than the blur reaches. An image of 16 pixels is replaced."""
    folder, pixels = tmp_path / "odd", np.random.RandomState(0)
    folder.mkdir()
    for name, shape in (
        ("a", (17, 1500)),
        ("b", (1500, 17, 3)),
        ("c", (40, 50)),
        ("d", (16, 300, 3)),
    ):
        Image.fromarray(pixels.randint(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    dataset = build_dataset("train", tiny_args(PRETRAIN, *FLAGS, "--imagenet_path", str(folder)))
    for epoch in range(8):
        for index in range(3):
            images, target = dataset[(epoch, index)]
            assert "problems" not in target
            assert target["size"].tolist() == [list(images.shape[2:])] * 2
            assert target["boxes"].isfinite().all()
            assert target["boxes"][..., 2:].min() > 0
    assert torch.equal(images, images[:, :1].expand_as(images)), "gray stays gray"
    assert dataset[(0, 3)][1]["problems"] == [
        (dataset.path(3), "300 x 16 pixels; both sides must exceed 16")
    ]


def test_image_without_proposals_is_replaced(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    dataset.proposals = lambda image, rng, name: torch.tensor(
        [[9.0, 9.0, 60.0, 60.0]] * int(image.shape[1] != 66)
    ).reshape(-1, 4)
    _, target = dataset[(0, 0)]
    assert target["problems"] == [(dataset.path(0), "too few proposals (0, the pretext needs 1)")]
    _, packed = collate([(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), target), dataset[(0, 1)]])
    assert packed.problems == [(dataset.path(0), "too few proposals (0, the pretext needs 1)")], (
        "once, not once per view"
    )


def test_published_sizes_for_imagenet_and_coco() -> None:
    imagenet, coco = siamese_resize(480), siamese_resize(800)
    assert (min(imagenet.sizes), max(imagenet.sizes), imagenet.max_size) == (320, 480, 600)
    assert (min(coco.sizes), max(coco.sizes), len(coco.sizes), coco.max_size) == (
        480,
        800,
        11,
        1333,
    )


def test_batches_have_view_1_of_all_images_then_view_2(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    samples = [dataset[(0, i)] for i in (0, 3)]
    batch, packed = collate(samples)
    sizes = [tuple(images.shape[2:]) for images, _ in samples]
    assert batch.tensors.shape == (4, 3, *(max(side) for side in zip(*sizes, strict=True)))
    for position, (sample, view) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        height, width = sizes[sample]
        assert torch.equal(batch.tensors[position, :, :height, :width], samples[sample][0][view])
        assert not batch.mask[position, :height, :width].any()
    inputs, targets = to_device(batch, packed, torch.device("cpu"), [0.5] * 3, [0.5] * 3)
    assert [int(target["image_id"]) for target in targets] == [0, 3, 0, 3]
    for position, (sample, view) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        assert torch.equal(targets[position]["boxes"], samples[sample][1]["boxes"][view])
    assert targets[0]["patches"].dtype == torch.float32


def test_views_of_an_image_are_adjacent_on_the_page(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    samples = [dataset[(0, i)] for i in (0, 3)]
    rows = samples_to_rows(samples, [0.5] * 3, [0.5] * 3)
    assert [row["title"].split(":")[0] for row in rows] == [
        f"image {image}, view {view}" for image in (0, 3) for view in (1, 2)
    ]
    for i, row in enumerate(rows):
        view = samples[i // 2][0][i % 2]
        assert torch.equal(
            torch.from_numpy(row["image"]).permute(2, 0, 1)[:, : view.shape[1], : view.shape[2]],
            view,
        )
