"""Siamese DETR: two views, the pretext on every detector, its batch norm, and its way through both scripts.

Published numbers are checked by test_golden.py, two processes by test_distributed.py, fine-tuning by test_pretext.py.
"""
import math
from pathlib import Path

import pytest
import torch
from tiny import (
    FROZEN,
    assert_same,
    make_batch,
    make_targets,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_images,
)
from torch import Tensor, nn

from datasets import build_dataset
from datasets.collate import collate, to_device
from datasets.transforms import view_resize
from datasets.two_views import (
    MIN_AREA,
    Views,
    common_regions,
    draw_outer_crop,
    draw_views,
    overlap_scale,
    pick_regions,
    random_regions,
)
from models import build_model
from models.pretext.siamese import partner
from models.synced_batch_norm import SyncedBatchNorm
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.flags import PRETRAIN
from util.logger import UserError
from util.nested_tensor import NestedTensor
from util.random_state import SampleRandom
from util.registry import DETECTORS

FLAGS = ("--pretext", "siamese", "--proposals", "random")
SIZE = (240, 320)


# ---------------------------------------------------------------------------------------------------------------- views


def as_box(view: tuple) -> Tensor:
    top, left, height, width = view
    return torch.tensor([[left, top, left + width, top + height]], dtype=torch.float64)


def iou_of(views: Views) -> float:
    return float(box_iou(as_box(views.first), as_box(views.second))[0])


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_views_overlap_by_view_iou_or_more(iou: float) -> None:
    exact = [draw_views(SampleRandom(seed), SIZE, iou, shrink=False) for seed in range(10)]
    assert [iou_of(views) for views in exact] == pytest.approx([iou] * 10)
    shrunk = [iou_of(draw_views(SampleRandom(seed), SIZE, iou, shrink=True)) for seed in range(50)]
    assert min(shrunk) >= iou - 1e-9
    assert max(shrunk) > iou + 0.2


def test_overlap_scale_is_the_published_one() -> None:
    assert [round(overlap_scale(iou), 4) for iou in (0.3, 0.5, 0.7)] == [0.5144, 0.6899, 0.8306]


def test_views_are_swapped_half_of_the_time_and_stay_inside() -> None:
    swapped = 0
    for seed in range(60):
        views = draw_views(SampleRandom(seed), SIZE, 0.5, shrink=True)
        swapped += views.first[0] > views.second[0]
        for box in (as_box(views.first)[0], as_box(views.second)[0]):
            assert box.min() >= 0
            assert box[2] <= SIZE[1] + 1e-9
            assert box[3] <= SIZE[0] + 1e-9
    assert 15 < swapped < 45


def test_outer_crop_of_a_long_image_is_its_middle() -> None:
    assert draw_outer_crop(SampleRandom(0), (20, 2000)) == (0, 986, 20, 27)
    assert draw_outer_crop(SampleRandom(0), (2000, 20)) == (986, 0, 27, 20)


def test_mapping_there_and_back_is_the_identity() -> None:
    views = draw_views(SampleRandom(3), SIZE, 0.5, shrink=True)
    boxes = torch.rand(20, 4, dtype=torch.float64) * 100
    there = views.between(boxes, views.first, views.second)
    torch.testing.assert_close(views.between(there, views.second, views.first), boxes)
    assert not torch.allclose(there, boxes)


def test_regions_lie_in_both_views_and_are_large_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([280.0, 200.0])
    boxes = torch.cat([corners, corners + 5 + torch.rand(200, 2, generator=generator) * 80], 1)
    for seed in range(5):
        views = draw_views(SampleRandom(seed), SIZE, 0.5, shrink=True)
        overlap = [views.map_boxes(views.overlap_xyxy_abs, view) for view in (views.first, views.second)]
        smallest = MIN_AREA * float((overlap[0][2:] - overlap[0][:2]).prod())
        for pair, measured in ((common_regions(boxes, views), 0), (random_regions(SampleRandom(seed), views), 1)):
            assert (pair[measured][:, 2:] - pair[measured][:, :2]).prod(1).min() >= smallest
            assert 3 < len(pair[0]) == len(pair[1])
            for side, regions in enumerate(pair):
                assert (regions >= -1e-9).all()
                assert (regions[:, 2:] < torch.tensor([views.size[1], views.size[0]])).all()
                assert (regions[:, :2] >= overlap[side][:2].floor() - 1e-6).all()
            torch.testing.assert_close(views.between(pair[0], views.first, views.second), pair[1])


@pytest.mark.parametrize("kept", [0, 2, 20])
def test_the_overlap_is_box_0_and_missing_boxes_are_jittered_copies(kept: int) -> None:
    views = draw_views(SampleRandom(1), SIZE, 0.5, shrink=True)
    first, second = (regions[:kept] for regions in random_regions(SampleRandom(1), views, 400))
    assert len(first) == kept
    picked = pick_regions(first, second, views, 10, SampleRandom(2))
    assert picked.shape == (2, 10, 4)
    overlap = torch.stack([views.map_boxes(views.overlap_xyxy_abs, view) for view in (views.first, views.second)])
    torch.testing.assert_close(picked[:, 0], overlap)
    torch.testing.assert_close(views.between(picked[0], views.first, views.second), picked[1])
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
    return build_dataset("train", tiny_args(PRETRAIN, *FLAGS, "--imagenet_path", str(folder), *flags))


def test_samples_are_two_views_with_their_regions(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    assert len(dataset) == 4
    for epoch in range(3):
        images, target = dataset[(epoch, 1)]
        height, width = images.shape[2:]
        assert images.shape == (2, 3, height, width)
        assert images.dtype == torch.uint8
        assert {name: tuple(x.shape) for name, x in target.items()} == {
            "boxes": (2, 5, 4), "labels": (2, 5), "area": (2, 5), "iscrowd": (2, 5), "image_id": (2, 1), "orig_size": (2, 2),
            "size": (2, 2), "patches": (2, 5, 3, 32, 32),
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


def test_regions_come_from_the_proposals_that_are_asked_for(tmp_path: Path) -> None:
    """A box in the middle is in every overlap: it is box 1 of both views; the others are copies of it."""
    dataset = make_dataset(tmp_path)
    dataset.proposals = lambda image, rng, name: torch.tensor([[30.0, 25.0, 50.0, 40.0], [0.0, 0.0, 2.0, 2.0]])
    dataset.shrink = False
    seen = 0
    for epoch in range(6):
        images, target = dataset[(epoch, 0)]
        box = target["boxes"][:, 1]
        torch.testing.assert_close(box[0, 2:], box[1, 2:], rtol=1e-4, atol=1e-4)  # both views have one scale without shrink
        seen += int((box[0, :2] - box[1, :2]).abs().min() > 0.05)
    assert seen > 3


def test_an_image_without_proposals_is_replaced(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    dataset.proposals = lambda image, rng, name: torch.tensor([[9.0, 9.0, 60.0, 60.0]] * int(image.shape[1] != 66)).reshape(-1, 4)
    _, target = dataset[(0, 0)]
    assert target["problems"] == [(dataset.path(0), "no proposals")]
    _, packed = collate([(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), target), dataset[(0, 1)]])
    assert packed.problems == [(dataset.path(0), "no proposals")], "once, not once a view"


def test_sizes_are_those_of_imagenet_or_coco() -> None:
    imagenet, coco = view_resize(480), view_resize(800)
    assert (min(imagenet.sizes), max(imagenet.sizes), imagenet.max_size) == (320, 480, 600)
    assert (min(coco.sizes), max(coco.sizes), len(coco.sizes), coco.max_size) == (480, 800, 11, 1333)


def test_batches_hold_view_1_of_all_then_view_2(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    samples = [dataset[(0, i)] for i in (0, 3)]
    batch, packed = collate(samples)
    sizes = [tuple(images.shape[2:]) for images, _ in samples]
    assert batch.tensors.shape == (4, 3, *(max(side) for side in zip(*sizes, strict=True)))
    for place, (sample, view) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        height, width = sizes[sample]
        assert torch.equal(batch.tensors[place, :, :height, :width], samples[sample][0][view])
        assert not batch.mask[place, :height, :width].any()
    inputs, targets = to_device(batch, packed, torch.device("cpu"), [0.5] * 3, [0.5] * 3)
    assert [int(target["image_id"]) for target in targets] == [0, 3, 0, 3]
    for place, (sample, view) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        assert torch.equal(targets[place]["boxes"], samples[sample][1]["boxes"][view])
    assert targets[0]["patches"].dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- pretext


def build(*flags: str) -> tuple:
    torch.manual_seed(0)
    return build_model(tiny_args(PRETRAIN, *FLAGS, "--backbone_norm", "frozen", "--dropout", "0", *flags))[:2]


def view_targets(views: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{**target, "size": torch.tensor([64, 64])} for target in make_targets([5] * views, seed=seed, patches=5)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_and_gradients(detector: str) -> None:
    model, criterion = build("--detector", detector)
    targets = view_targets(6)
    losses = criterion.train()(model.train()(make_batch(6), targets), targets)
    for name, value in losses.items():
        assert bool(value.isfinite()), name
    assert 0 <= losses["loss_enc_global_contra"] <= 4
    assert 0 <= losses["loss_feature"] <= 4
    assert 0.5 < losses["projection_std"] * math.sqrt(32) <= 1.0001
    weights = criterion.weight_dict
    assert (weights["loss_ce"], weights["loss_bbox"], weights["loss_giou"], weights["loss_feature"]) == (1, 5, 2, 3)
    assert (weights["loss_feature_0"], weights["loss_enc_global_contra"]) == (3, 10)
    assert not {"loss_enc_global_contra_0", "projection_std"} & set(weights)
    criterion.total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("backbone" not in name), name
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in ("patch2query.weight", "feature_align.layers.1.weight"))
    head = model.classes
    assert (head.kind, head.num_outputs, model.detector.backbone[1].shift) == ("softmax", 3, 0.0)


def test_targets_give_no_gradient() -> None:
    """Of global discrimination only the predictions are learnt from, of regions only the prediction of the crop's feature."""
    model, criterion = build()
    outputs = model.train()(make_batch(4), view_targets(4))
    assert not outputs["target_features"].requires_grad
    projections = outputs["projections"].detach().requires_grad_()
    predictions = outputs["predictions"].detach().requires_grad_()
    targets = view_targets(4)
    losses = criterion({**outputs, "projections": projections, "predictions": predictions}, targets)
    losses["loss_enc_global_contra"].backward()
    assert projections.grad is None
    assert predictions.grad.abs().sum() > 0


def test_global_loss_compares_the_views_of_one_image() -> None:
    model, criterion = build()
    targets = view_targets(4)
    outputs = model(make_batch(4), targets)
    directions = torch.eye(32)[:2]
    same = torch.cat([directions, directions])
    swapped = torch.cat([directions, directions.flip(0)])
    for first, expected in ((same, 0.0), (swapped, 2.0)):
        losses = criterion({**outputs, "projections": first, "predictions": first}, targets)
        assert float(losses["loss_enc_global_contra"]) == pytest.approx(expected, abs=1e-6)
    collapsed = torch.ones(4, 32)
    assert criterion({**outputs, "projections": collapsed, "predictions": same}, targets)["projection_std"] < 1e-3


@pytest.mark.parametrize("detector", DETECTORS)
def test_queries_of_one_view_decode_the_other(detector: str) -> None:
    """Other pixels in view 1 of image 0 change the outputs of both its views and of nothing else; other boxes in view 1 only those of
    view 2, since the queries come from there. Each image has queries of its own."""
    model, _ = build("--detector", detector, "--box_disturbance", "0")
    model.eval()
    batch, targets = make_batch(4), view_targets(4)
    changed = batch.tensors.clone()
    changed[0] = changed[0].flip(-1) * 2
    moved = [dict(target) for target in targets]
    moved[0]["boxes"] = view_targets(1, seed=9)[0]["boxes"]
    with torch.no_grad():
        before = model(batch, targets)["pred_logits"]
        pixels = model(NestedTensor(changed, batch.mask, False), targets)["pred_logits"]
        boxes = model(batch, moved)["pred_logits"]
    assert differs(before, pixels) == [True, False, True, False]
    assert differs(before, boxes) == [False, False, True, False]


def differs(a: Tensor, b: Tensor) -> list[bool]:
    return [not torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True)]


def test_published_deformable_queries_are_those_of_the_first_image() -> None:
    features = torch.randn(6, 5, 512)
    for detector in ("deformable_detr", "detr"):
        model, _ = build("--detector", detector, "--num_feature_levels", "1", "--reproduce_published") if detector != "detr" else build(
            "--reproduce_published")
        position = model.region_queries(features).position
        shared = torch.equal(position[0], position[1])
        assert shared == (detector == "deformable_detr")
        assert not torch.equal(position[0], position[3])
    mended, _ = build("--detector", "deformable_detr", "--num_feature_levels", "1")
    assert not torch.equal(mended.region_queries(features).position[0], mended.region_queries(features).position[1])


@pytest.mark.parametrize("levels", [1, 4])
def test_padding_is_not_in_the_pooled_memory(levels: int) -> None:
    model, _ = build("--detector", "deformable_detr", "--num_feature_levels", str(levels))
    memory = model.detector.encode(make_batch([(64, 64), (64, 128), (64, 64), (64, 128)]))
    pooled = model.pooled_memory(memory)
    memory.tokens = memory.tokens.masked_fill(memory.padding_mask[..., None], 7.0)
    torch.testing.assert_close(model.pooled_memory(memory), pooled)
    assert pooled.shape == (4, 32 * min(levels, 3))
    model.reproduce_published = True
    assert differs(model.pooled_memory(memory), pooled) == [True, False, True, False]


def test_queries_are_the_features_at_the_boxes() -> None:
    """A region that is one cell of the map has that cell's feature, in pixels of the un-padded view."""
    model, _ = build("--box_disturbance", "0")
    memory = model.detector.encode(make_batch([(128, 128), (128, 192)]))
    boxes = torch.tensor([[[33.0, 65.0, 34.0, 66.0]], [[160.0, 96.0, 160.0, 96.0]]])
    maps = memory.features[-1].tensor
    found = model.region_features(memory, boxes)
    scale = maps.abs().max()
    point = nn.functional.grid_sample(maps[:1], torch.tensor([[[[33 / 32 + 0.5, 65 / 32 + 0.5]]]]) / 3 * 2 - 1, align_corners=True)
    assert found.shape == (2, 1, 512)
    assert (found[0, 0] - maps[0, :, 2:4, 1:3].mean((1, 2))).abs().max() < scale
    assert point.shape == (1, 512, 1, 1)


def test_disturbed_boxes_move_by_a_tenth_at_most_and_stay_inside() -> None:
    model, _ = build()
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.2], [0.1, 0.9, 0.2, 0.2]]]).repeat(200, 1, 1)
    sizes = torch.tensor([[100, 200]]).repeat(200, 1)
    moved = model.disturb(boxes, sizes)
    exact = box_cxcywh_to_xyxy(boxes) * torch.tensor([200.0, 100.0, 200.0, 100.0])
    share = (moved - exact).abs() / torch.tensor([[[80.0, 20.0] * 2, [40.0, 20.0] * 2]])
    assert share.max() <= 0.1 + 1e-4
    assert share[:, 0].mean() > 0.02
    assert moved.min() >= 0
    assert moved[..., 3].max() <= 100
    assert (moved[:, 1, 3] == 100).any()


def test_ablations_leave_their_parts_out() -> None:
    model, criterion = build("--global_loss_coef", "0", "--feature_loss_coef", "0")
    assert not [name for name in model.state_dict() if name.startswith(("enc_head", "feature_align"))]
    targets = [{name: x for name, x in target.items() if name != "patches"} for target in view_targets(2)]
    losses = criterion(model.train()(make_batch(2), targets), targets)
    assert {name for name in losses if "_0" not in name} == {"loss_ce", "class_error", "cardinality_error", "loss_bbox", "loss_giou"}


@pytest.mark.parametrize(("flags", "said"), [
    (("--view_iou", "1"), "--view_iou 1"),
    (("--box_disturbance", "0.5"), "--box_disturbance 0.5"),
    (("--num_queries", "21"), "--num_patches 5 does not divide --num_queries 21"),
    (("--detector", "deformable_detr", "--two_stage", "--with_box_refine"), "--two_stage"),
    (("--batch_size", "1"), "--global_loss_coef 0"),
    (("--mask_ratio", "0.2"), "--mask_ratio means nothing to --pretext siamese"),
    (("--max_iters", "10"), "--max_iters and --lr_drop_iters"),
    (("--max_iters", "10", "--lr_drop_iters", "5", "--start_epoch", "3"), "--start_epoch counts epochs"),
])
def test_flags_that_make_no_sense(flags: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(*flags)


def test_the_last_flag_decides_what_a_schedule_counts() -> None:
    steps, epochs = ("--max_iters", "10", "--lr_drop_iters", "5"), ("--epochs", "3", "--lr_drop", "2")
    args = tiny_args(PRETRAIN, *FLAGS, *steps, *epochs)
    assert (args.max_iters, args.lr_drop_iters, args.epochs, args.lr_drop) == (None, None, 3, 2)
    args = tiny_args(PRETRAIN, *FLAGS, *epochs, *steps)
    assert (args.max_iters, args.lr_drop_iters, args.epochs) == (10, 5, 60)


def test_views_that_do_not_fit_are_an_error() -> None:
    model, _ = build()
    with pytest.raises(ValueError, match=r"3 views with \[5\]"):
        model(make_batch(3), view_targets(3))


def test_partner_exchanges_the_halves() -> None:
    assert partner(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]


def test_batch_norm_is_pytorchs_in_one_process() -> None:
    ours, theirs = SyncedBatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(5, 4)
    assert torch.equal(ours(x), theirs(x))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("detector", DETECTORS)
def test_pre_train_and_resume(detector: str, tmp_path: Path) -> None:
    """In iterations: five steps at two an epoch, resumed after two; the rate drops after three, in mid-epoch."""
    images = write_images(tmp_path / "images")
    flags = [*FLAGS, "--detector", detector, "--imagenet_path", images, "--lr_drop_iters", "3", *FROZEN]
    pre_train(*flags, "--output_dir", tmp_path / "a", "--max_iters", "5")
    pre_train(*flags, "--output_dir", tmp_path / "b", "--max_iters", "2")
    assert read_checkpoint(tmp_path / "b" / "checkpoint.pth")["lr_scheduler"]["last_epoch"] == 2
    pre_train("--output_dir", tmp_path / "b", "--max_iters", "5", "--resume", "auto")
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same(resumed["model"], whole["model"])
    assert_same(resumed["optimizer"], whole["optimizer"])
    assert whole["lr_scheduler"]["last_epoch"] == 5
    log = read_log(tmp_path / "a")
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert [line["train_lr"] for line in log] == pytest.approx([1e-4, 5.5e-5, 1e-5])
    assert whole["optimizer"]["state"][0]["step"] == 5
    assert log[0]["train_projection_std_unscaled"] > 0.01
    assert whole["args"]["position_embedding"] == "sine", "on every detector; fine-tuning takes it over"


def test_a_schedule_of_epochs_is_not_resumed_by_iterations(tmp_path: Path) -> None:
    flags = [*FLAGS, "--imagenet_path", write_images(tmp_path / "images"), "--output_dir", tmp_path / "a", *FROZEN]
    pre_train(*flags, "--epochs", "1", "--lr_drop", "1")
    with pytest.raises(UserError, match="counts epochs"):
        pre_train(*flags, "--max_iters", "9", "--lr_drop_iters", "5", "--resume", "auto")
