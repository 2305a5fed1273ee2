"""Siamese DETR: the pretext on every detector, its batch norm, and runs of the pre-training script.

Published values are tested in tests/test_golden.py, views in tests/datasets/pretext/test_siamese.py, two ranks in
tests/test_distributed.py, and fine-tuning in test_random_query_patch.py.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.pretext.siamese import swap_views
from models.synced_batch_norm import SyncedBatchNorm
from tests.published_files import SMALL, siamese, siamese_file
from tests.tiny import (
    FROZEN,
    assert_same,
    make_batch,
    make_targets,
    one_detector_else_slow,
    pre_train,
    read_checkpoint,
    read_log,
    stop_after,
    tiny_args,
    write_images,
)
from util.box_ops import box_cxcywh_to_xyxy
from util.checkpoints.checkpoint import parse_checkpoint
from util.checkpoints.loading import load_strict
from util.errors import StopRequested, UserError
from util.nested_tensor import NestedTensor
from util.settings import PRETRAIN
from util.settings.registry import DETECTORS

FLAGS = ("--pretext", "siamese", "--proposals", "random")


# ---- pretext ----


def build(*flags: str) -> tuple:
    torch.manual_seed(0)
    return build_model(
        tiny_args(PRETRAIN, *FLAGS, "--backbone_norm", "frozen", "--dropout", "0", *flags)
    )[:2]


def view_targets(views: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [
        {**target, "size": torch.tensor([64, 64])}
        for target in make_targets([5] * views, seed=seed, patches=5)
    ]


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
    assert (
        weights["loss_ce"],
        weights["loss_bbox"],
        weights["loss_giou"],
        weights["loss_feature"],
    ) == (1, 5, 2, 3)
    assert (weights["loss_feature_0"], weights["loss_enc_global_contra"]) == (3, 10)
    assert not {"loss_enc_global_contra_0", "projection_std"} & set(weights)
    criterion.total_loss(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("backbone" not in name), name
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert all(
        model.get_parameter(name).grad.abs().sum() > 0
        for name in ("patch2query.weight", "feature_align.layers.1.weight")
    )
    head = model.classification
    assert (head.kind, head.num_outputs, model.detector.backbone[1].shift) == ("softmax", 3, 0.0)


def test_targets_give_no_gradient() -> None:
    """Gradients reach the predictions, never the projections or crop features that they predict."""
    model, criterion = build()
    outputs = model.train()(make_batch(4), view_targets(4))
    assert not outputs["target_features"].requires_grad
    projections = outputs["projections"].detach().requires_grad_()
    predictions = outputs["predictions"].detach().requires_grad_()
    targets = view_targets(4)
    outputs.update(projections=projections, predictions=predictions)
    losses = criterion(outputs, targets)
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
        outputs.update(projections=first, predictions=first)
        losses = criterion(outputs, targets)
        assert float(losses["loss_enc_global_contra"]) == pytest.approx(expected, abs=1e-6)
    collapsed = torch.ones(4, 32)
    outputs.update(projections=collapsed, predictions=same)
    assert criterion(outputs, targets)["projection_std"] < 1e-3


@pytest.mark.parametrize("detector", DETECTORS)
def test_queries_of_one_view_decode_the_other(detector: str) -> None:
    """Other pixels in view 1 of image 0 change the outputs of both views of that image only.

    Other boxes in view 1 change only the outputs of view 2, whose queries come from them.
    """
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
    assert differs_per_view(before, pixels) == [True, False, True, False]
    assert differs_per_view(before, boxes) == [False, False, True, False]


def differs_per_view(a: Tensor, b: Tensor) -> list[bool]:
    return [not torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True)]


def test_published_deformable_queries_are_those_of_the_first_image() -> None:
    features = torch.randn(6, 5, 512)
    for detector in ("deformable_detr", "detr"):
        flags = ["--detector", detector, "--reproduce_published"]
        if detector == "deformable_detr":
            flags += ["--num_feature_levels", "1"]
        model, _ = build(*flags)
        position = model.region_queries(features).position
        shared = torch.equal(position[0], position[1])
        assert shared == (detector == "deformable_detr")
        assert not torch.equal(position[0], position[3])
    fixed, _ = build("--detector", "deformable_detr", "--num_feature_levels", "1")
    position = fixed.region_queries(features).position
    assert not torch.equal(position[0], position[1])


@pytest.mark.parametrize("levels", [1, 4])
def test_padding_is_not_in_the_pooled_memory(levels: int) -> None:
    model, _ = build("--detector", "deformable_detr", "--num_feature_levels", str(levels))
    memory = model.detector.encode(make_batch([(64, 64), (64, 128), (64, 64), (64, 128)]))
    pooled = model.pooled_memory(memory)
    memory.tokens = memory.tokens.masked_fill(memory.padding_mask[..., None], 7.0)
    torch.testing.assert_close(model.pooled_memory(memory), pooled)
    assert pooled.shape == (4, 32 * min(levels, 3))
    model.reproduce_published = True
    assert differs_per_view(model.pooled_memory(memory), pooled) == [True, False, True, False]


@pytest.mark.parametrize("levels", [1, 4])
def test_region_features_are_read_at_the_boxes(levels: int) -> None:
    """On maps with the column or row as values, the feature of a region is its center, in cells.

    Boxes are in pixels of the view without its padding. A region smaller than a cell is read as one cell.
    """
    model, _ = build("--detector", "deformable_detr", "--num_feature_levels", str(levels))
    memory = model.detector.encode(make_batch([(256, 256), (256, 320)]))
    for feature in memory.features:
        height, width = feature.tensor.shape[2:]
        feature.tensor = torch.zeros_like(feature.tensor)
        feature.tensor[:, 0] = torch.arange(width).float()
        feature.tensor[:, 1] = torch.arange(height).float()[:, None]
    boxes = torch.tensor(
        [
            [[64.0, 32.0, 160.0, 192.0], [96.0, 96.0, 96.0, 96.0]],
            [[160.0, 96.0, 256.0, 128.0], [0.0, 64.0, 128.0, 96.0]],
        ]
    )
    found = model.region_features(memory, boxes).split(
        [feature.tensor.shape[1] for feature in memory.features], -1
    )
    for part, stride in zip(found, (8, 16, 32)[-len(found) :], strict=True):
        corner = boxes[..., :2] / stride
        sides = ((boxes[..., 2:] - boxes[..., :2]) / stride).clamp(min=1)
        torch.testing.assert_close(part[..., :2], corner + sides / 2)
    assert len(found) == min(levels, 3)


def test_disturbed_boxes_move_by_at_most_a_tenth_and_stay_inside() -> None:
    model, _ = build()
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.2], [0.1, 0.9, 0.2, 0.2]]]).repeat(200, 1, 1)
    sizes = torch.tensor([[100, 200]]).repeat(200, 1)
    moved = model.disturb_boxes(boxes, sizes)
    exact = box_cxcywh_to_xyxy(boxes) * torch.tensor([200.0, 100.0, 200.0, 100.0])
    shift = (moved - exact).abs() / torch.tensor([[[80.0, 20.0] * 2, [40.0, 20.0] * 2]])
    assert shift.max() <= 0.1 + 1e-4
    assert shift[:, 0].mean() > 0.02
    assert moved.min() >= 0
    assert moved[..., 3].max() <= 100
    assert (moved[:, 1, 3] == 100).any()


def test_parts_with_weight_0_are_not_built() -> None:
    model, criterion = build("--global_loss_coef", "0", "--feature_loss_coef", "0")
    assert not [
        name for name in model.state_dict() if name.startswith(("enc_head", "feature_align"))
    ]
    targets = [
        {name: x for name, x in target.items() if name != "patches"} for target in view_targets(2)
    ]
    losses = criterion(model.train()(make_batch(2), targets), targets)
    assert {name for name in losses if "_0" not in name} == {
        "loss_ce",
        "class_error",
        "cardinality_error",
        "loss_bbox",
        "loss_giou",
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--view_iou", "1"), "--view_iou 1"),
        (("--box_disturbance", "0.5"), "--box_disturbance 0.5"),
        (("--num_queries", "21"), "--num_patches 5 does not divide --num_queries 21"),
        (("--detector", "deformable_detr", "--two_stage", "--with_box_refine"), "--two_stage"),
        (("--batch_size", "1"), "--global_loss_coef 0"),
        (("--mask_ratio", "0.2"), "--mask_ratio has no effect with --pretext siamese"),
        (("--max_iters", "10"), "--max_iters and --lr_drop_iters"),
        (
            ("--max_iters", "10", "--lr_drop_iters", "5", "--start_epoch", "3"),
            "--start_epoch counts epochs",
        ),
    ],
)
def test_conflicting_flags(flags: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(*flags)


def test_last_flag_decides_between_epochs_and_iterations() -> None:
    steps = ("--max_iters", "10", "--lr_drop_iters", "5")
    epochs = ("--epochs", "3", "--lr_drop", "2")
    args = tiny_args(PRETRAIN, *FLAGS, *steps, *epochs)
    assert (args.max_iters, args.lr_drop_iters, args.epochs, args.lr_drop) == (None, None, 3, 2)
    args = tiny_args(PRETRAIN, *FLAGS, *epochs, *steps)
    assert (args.max_iters, args.lr_drop_iters, args.epochs) == (10, 5, 60)


@pytest.mark.parametrize(
    ("detector", "levels"),
    [("detr", 0), ("conditional_detr", 0), ("deformable_detr", 1), ("deformable_detr", 4)],
)
def test_published_checkpoint_has_the_whole_model(detector: str, levels: int) -> None:
    """It has all heads and batch norm statistics, so published pre-training can be resumed."""
    own = ("--num_feature_levels", str(levels)) if levels else ()
    file = siamese_file(siamese(detector, *SMALL, *own, channels=896 if levels > 1 else 512))
    model, _ = build("--detector", detector, *own)
    load_strict(model, parse_checkpoint(file, "iter_300000.pth"))
    for name in (
        "patch2query.weight",
        "enc_head.0.projector.mlp.0.weight",
        "enc_head.0.predictor.mlp.1.running_var",
    ):
        assert torch.equal(model.state_dict()[name], file["state_dict"][name]), name


def test_odd_number_of_views_raises() -> None:
    model, _ = build()
    with pytest.raises(ValueError, match=r"3 views with \[5\]"):
        model(make_batch(3), view_targets(3))


def test_swap_views_exchanges_the_halves() -> None:
    assert swap_views(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]


def test_batch_norm_equals_pytorch_in_one_process() -> None:
    ours, theirs = SyncedBatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(5, 4)
    assert torch.equal(ours(x), theirs(x))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


# ---- scripts ----


@one_detector_else_slow
def test_pre_train_and_resume(
    detector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five iterations at two per epoch; the learning rate drops after three, in mid-epoch.

    Resumed from a run of two iterations, or from one that stopped after three.
    """
    images = write_images(tmp_path / "images")
    flags = [
        *FLAGS,
        "--detector",
        detector,
        "--imagenet_path",
        images,
        "--lr_drop_iters",
        "3",
        *FROZEN,
    ]
    pre_train(*flags, "--output_dir", tmp_path / "a", "--max_iters", "5")
    if detector == "detr":
        pre_train(*flags, "--output_dir", tmp_path / "b", "--max_iters", "2")
    else:
        stop_after(monkeypatch, 3)
        with pytest.raises(StopRequested):
            pre_train(*flags, "--output_dir", tmp_path / "b", "--max_iters", "5")
    assert read_checkpoint(tmp_path / "b" / "checkpoint.pth")["lr_scheduler"]["last_epoch"] == (
        2 if detector == "detr" else 3
    )
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
    assert whole["args"]["position_embedding"] == "sine", "on every detector; fine-tuning adopts it"


def test_epoch_schedule_cannot_resume_by_iterations(tmp_path: Path) -> None:
    flags = [
        *FLAGS,
        "--imagenet_path",
        write_images(tmp_path / "images"),
        "--output_dir",
        tmp_path / "a",
        *FROZEN,
    ]
    pre_train(*flags, "--epochs", "1", "--lr_drop", "1")
    with pytest.raises(UserError, match="counts epochs"):
        pre_train(*flags, "--max_iters", "9", "--lr_drop_iters", "5", "--resume", "auto")
