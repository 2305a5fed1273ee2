"""DETReg's pretext: published values, object embeddings, samples, and runs of both entry scripts."""

import re
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datasets import build_dataset
from datasets.transforms import Compose
from models import build_model
from models.backbone import Backbone
from models.target_encoder import build_target_encoder, encode_crops
from tests import golden_models
from tests.tiny import (
    FROZEN,
    captured_log,
    fine_tune,
    make_batch,
    make_targets,
    one_detector_else_slow,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import UserError
from util.runs.model_summary import log_model_summary
from util.settings import PRETRAIN
from util.settings.registry import DETECTORS

# --num_patches 10 is the default: `tiny_args` gives 5, which this pretext refuses.
FLAGS = shlex.split(
    "--pretext region_prior --object_embedding_loss --proposals random --max_prop 10 "
    "--num_patches 10"
)


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden-dir"))


def target_weights(golden_dir: Path, part: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    meta, arrays = golden_models.load("detreg_target_embed", golden_dir)
    fill = golden_models.load_fill(golden_dir)
    weights = fill.fill_shapes(fill.float_entries(meta[part]), meta["seed"], [])
    return {
        name.removeprefix("body."): torch.from_numpy(value) for name, value in weights.items()
    }, arrays


def test_intermediate_embedding_equals_published(golden_dir: Path) -> None:
    weights, arrays = target_weights(golden_dir, "intermediate")
    backbone = Backbone("resnet50", stages=(2, 3, 4))
    backbone.body.load_state_dict(weights)
    encoder = build_target_encoder("intermediate", backbone, "none")
    assert not any("layer3" in name for name in encoder.state_dict())
    crops = torch.from_numpy(arrays["crops_q32"]).float() / 32
    torch.testing.assert_close(
        encode_crops(encoder, [crops[:1], crops[1:]]),
        torch.from_numpy(arrays["intermediate_embedding"]),
        rtol=0,
        atol=1e-5,
    )


def test_head_embedding_equals_published(golden_dir: Path) -> None:
    weights, arrays = target_weights(golden_dir, "head")
    encoder = build_target_encoder("head", Backbone("resnet50"), "none")
    encoder.load_state_dict(weights, strict=False)  # lacks only batch counters, which are not read
    crops = torch.from_numpy(arrays["crops_q32"]).float() / 32
    torch.testing.assert_close(
        encode_crops(encoder, [crops[:1], crops[1:]]),
        torch.from_numpy(arrays["head_embedding_eval"]),
        rtol=0,
        atol=1e-5,
    )
    published = encode_crops(encoder, [crops], published_batch_norm=True)
    torch.testing.assert_close(
        published, torch.from_numpy(arrays["head_embedding_train_bn"]), rtol=0, atol=1e-4
    )


def test_head_embedding_needs_resnet50() -> None:
    with pytest.raises(UserError, match="resnet50; --backbone is resnet18"):
        build_model(tiny_args(PRETRAIN, *FLAGS, "--obj_embedding_head", "head"))


def test_weights_without_a_projection_head_are_refused(tmp_path: Path) -> None:
    torch.save(Backbone("resnet50").body.state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(
        UserError,
        match="--obj_embedding_head head needs a file with SwAV's projection head: .*intermediate",
    ):
        build_model(
            tiny_args(
                PRETRAIN,
                *FLAGS,
                *shlex.split("--backbone resnet50 --obj_embedding_head head"),
                "--backbone_weights",
                str(tmp_path / "resnet50.pth"),
            )
        )


def test_random_target_encoder_is_logged() -> None:
    model, _, args = build()
    with captured_log() as lines:
        log_model_summary(model, args)
    assert any("those of a random network" in line for line in lines)


def build(*flags: str) -> tuple:
    args = tiny_args(PRETRAIN, *FLAGS, "--backbone_norm", "frozen", *flags)
    return *build_model(args)[:2], args


def targets_with_patches(counts: list[int], label: int = 1) -> list[dict[str, Tensor]]:
    targets = make_targets(counts)
    for target in targets:
        target["labels"] = torch.full_like(target["labels"], label)
        target["patches"] = torch.randn(len(target["boxes"]), 3, 32, 32)
    return targets


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_reach_detector_and_embedding_but_not_the_encoder(detector: str) -> None:
    model, criterion, _ = build("--detector", detector)
    targets = targets_with_patches([3, 2])
    losses = criterion(model(make_batch(), targets), targets)
    criterion.total_loss(losses).backward()
    assert "loss_object_embedding" in criterion.weight_dict
    assert "loss_object_embedding_0" not in criterion.weight_dict, "last layer only"
    assert float(model.feature_embed.layers[-1].weight.grad.abs().sum()) > 0
    assert not any(
        "target_encoder" in name for name in [*model.state_dict(), *dict(model.named_parameters())]
    )
    assert all(p.grad is None for p in model.target_encoder.parameters())
    kinds = {
        "detr": ("softmax", 92),
        "conditional_detr": ("focal", 91),
        "deformable_detr": ("focal", 91),
    }
    assert (model.classification.kind, model.classification.num_outputs) == kinds[detector]


def test_without_any_target_the_loss_is_zero_and_connected() -> None:
    """The published code raises an error."""
    model, criterion, _ = build()
    targets = targets_with_patches([0, 0])
    losses = criterion(model(make_batch(), targets), targets)
    assert losses["loss_object_embedding"].item() == 0
    criterion.total_loss(losses).backward()
    assert model.feature_embed.layers[0].weight.grad is not None


def test_embeddings_are_of_the_matched_proposals() -> None:
    """The loss is the mean distance of each matched query's prediction and its proposal's embedding."""
    model, criterion, _ = build()
    targets = targets_with_patches([3, 2])
    outputs = model(make_batch(), targets)
    losses = criterion(outputs, targets)
    expected = []
    for image, (query, target) in enumerate(losses.matches.pairs[-1]):
        crops = encode_crops(model.target_encoder, [targets[image]["patches"]])
        predicted = outputs["pred_features"][image][torch.as_tensor(query)]
        expected.append((predicted - crops[torch.as_tensor(target)]).abs())
    torch.testing.assert_close(losses["loss_object_embedding"], torch.cat(expected).mean())


@pytest.mark.parametrize(
    "flags", [("--two_stage",), ("--two_stage", "--with_box_refine", "--num_classes", "1")]
)
def test_two_stage_learns_embeddings_in_the_decoder_only(flags: tuple) -> None:
    model, criterion, args = build("--detector", "deformable_detr", *flags)
    targets = targets_with_patches([3, 2], label=min(args.num_classes - 1, 1))
    losses = criterion(model(make_batch(), targets), targets)
    criterion.total_loss(losses).backward()
    assert {name for name in losses if "embedding" in name} == {"loss_object_embedding"}
    assert "loss_ce_enc" in losses
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), (
        "DDP waits for every gradient"
    )


def test_objectness_alone() -> None:
    model, *_, args = build("--num_classes", "1", "--detector", "conditional_detr")
    assert model.classification.num_outputs == 1
    assert args.num_classes == 1


def make_dataset(tmp_path: Path, *flags: str):
    folder = tmp_path / "images"
    if not folder.exists():
        write_images(folder)
    return build_dataset(
        "train", tiny_args(PRETRAIN, *FLAGS, "--imagenet_path", str(folder), *flags)
    )


def test_samples_are_proposals_with_their_crops(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    for epoch in range(6):
        image, target = dataset[(epoch, 1)]
        count = len(target["boxes"])
        assert 2 <= count <= 10
        assert target["patches"].shape == (count, 3, 32, 32)
        assert target["labels"].tolist() == [1] * count
        assert target["boxes"].min() >= 0
        assert target["boxes"].max() <= 1
        assert tuple(target["size"].tolist()) == tuple(image.shape[1:])
    again = make_dataset(tmp_path)[(5, 1)]
    assert torch.equal(image, again[0])
    assert torch.equal(target["patches"], again[1]["patches"])
    assert make_dataset(tmp_path, "--num_classes", "1")[(0, 1)][1]["labels"].unique().tolist() == [
        0
    ]


def test_patch_and_box_show_the_same_pixels(tmp_path: Path) -> None:
    """After any flip, crop and resize of the image, its box i has the colors of patch i."""
    dataset = make_dataset(tmp_path, "--image_size", "96")
    dataset.patch_transform.augment = False
    dataset.proposals = lambda image, rng, name: torch.tensor(
        [
            [x, y, x + 12, y + 12]
            for x in range(0, image.shape[2] - 11, 12)
            for y in range(0, image.shape[1] - 11, 12)
        ],
        dtype=torch.float32,
    )
    colors = torch.randint(
        0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    squares = colors.repeat_interleave(12, 1).repeat_interleave(12, 2)
    for index in range(len(dataset)):
        height, width = dataset[(0, index)][1]["orig_size"].tolist()
        Image.fromarray(squares[:, :height, :width].permute(1, 2, 0).numpy()).save(
            dataset.path(index)
        )
    lost = 0
    for epoch in range(20):
        image, target = dataset[(epoch, epoch % len(dataset))]
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * size
        height, width = target["orig_size"].tolist()
        lost += len(boxes) < (height // 12) * (width // 12)
        # In the middle of a box of this size all pixels have one color.
        whole = ((boxes[:, 2:] - boxes[:, :2]) > 8).all(1)
        middle = (boxes[:, :2] + boxes[:, 2:]).div(2).long()
        shown = torch.stack([image[:, y, x] for x, y in middle[whole].tolist()]).float()
        mean = target["patches"][whole].float().mean((2, 3))
        assert whole.sum() >= 2
        assert (shown - mean).abs().max() < 6
    assert lost, "no crop lost a box in twenty draws"


def test_transform_that_drops_all_boxes_falls_back_to_the_whole_image(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)

    class LoseAll(Compose):
        def __call__(self, image, target, rng):
            return image, {**target, "boxes": target["boxes"][:0], "patches": target["patches"][:0]}

    dataset.transforms = LoseAll([])
    _, target = dataset[(0, 0)]
    assert len(target["boxes"]) == 10
    assert "problems" not in target


def test_too_few_proposals_count_as_a_problem(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    dataset.proposals = lambda image, rng, name: torch.zeros(0, 4)
    with pytest.raises(UserError, match=r"too few proposals \(0, the pretext needs 1\); use other"):
        dataset[(0, 0)]


def test_an_image_with_one_proposal_is_used_unless_published_behaviour_is_reproduced(
    tmp_path: Path,
) -> None:
    def one_box(image, rng, name):
        return torch.tensor([[5.0, 5.0, 45.0, 45.0]])

    dataset = make_dataset(tmp_path)
    dataset.proposals = one_box
    for epoch in range(6):
        _, target = dataset[(epoch, 0)]
        assert "problems" not in target
        assert len(target["boxes"]) == len(target["patches"]) == 1

    published = make_dataset(tmp_path, "--reproduce_published")
    published.proposals = one_box
    with pytest.raises(UserError, match=r"too few proposals \(1, the pretext needs 2\)"):
        published[(0, 0)]


def test_an_image_too_small_for_random_boxes_counts_as_a_problem(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    Image.new("RGB", (40, 15)).save(dataset.path(0))
    _, target = dataset[(0, 0)]
    assert target["problems"] == [
        (dataset.path(0), "40 x 15 pixels; random boxes need 16 on each side")
    ]


@one_detector_else_slow
def test_pre_train_resume_and_fine_tune(detector: str, tmp_path: Path) -> None:
    images, coco = write_images(tmp_path / "images"), write_coco(tmp_path / "coco")
    flags = [
        *FLAGS,
        "--detector",
        detector,
        "--imagenet_path",
        images,
        "--batch_size",
        "2",
        *FROZEN,
    ]
    pre_train(*flags, "--output_dir", tmp_path / "a", "--epochs", "2")
    whole = read_checkpoint(tmp_path / "a" / "checkpoint.pth")
    pre_train(*flags, "--output_dir", tmp_path / "b", "--epochs", "1")
    first = read_checkpoint(tmp_path / "b" / "checkpoint.pth")
    pre_train(*flags, "--output_dir", tmp_path / "b", "--epochs", "2", "--resume", "auto")
    resumed = read_checkpoint(tmp_path / "b" / "checkpoint.pth")
    for name, value in whole["frozen"]["target_encoder"].items():
        assert torch.equal(value, first["frozen"]["target_encoder"][name])
        assert torch.equal(value, resumed["frozen"]["target_encoder"][name])
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert (
        read_log(tmp_path / "a")[1]["train_loss_object_embedding"]
        == read_log(tmp_path / "b")[1]["train_loss_object_embedding"]
    )

    fine_tune(
        "--detector",
        detector,
        "--coco_path",
        coco,
        "--pretrain",
        tmp_path / "a" / "checkpoint.pth",
        "--output_dir",
        tmp_path / "c",
        "--epochs",
        "1",
    )
    tuned = read_checkpoint(tmp_path / "c" / "checkpoint.pth")
    assert not any(name.startswith("feature_embed") for name in tuned["model"])
    assert tuned["args"]["position_embedding"] == "sine_shifted"


def test_frozen_backbone_of_a_published_checkpoint_restores_the_encoder() -> None:
    model, *_ = build("--lr_backbone", "0")
    other = {
        name: torch.randn_like(value)
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
    }
    model.load_state_dict({**model.state_dict(), **other})
    model.load_frozen({}, "file.pth")
    weight = model.target_encoder.backbone.body.conv1.weight
    assert torch.equal(weight, other["backbone.0.body.conv1.weight"])
    trained, *_ = build("--lr_backbone", "1e-5")
    with pytest.raises(UserError, match="file.pth lacks the target encoder"):
        trained.load_frozen({}, "file.pth")


def test_published_run_resumes(tmp_path: Path) -> None:
    """DETReg's checkpoint of Deformable DETR lacks encoder and pretext name.

    It has `feature_embed` before `bbox_embed`.
    """
    images = write_images(tmp_path / "images")
    flags = [
        *FLAGS,
        "--model",
        "deformable_detr",
        "--imagenet_path",
        images,
        *shlex.split("--batch_size 2 --dropout 0"),
        *FROZEN,
    ]
    pre_train(*flags, "--output_dir", tmp_path / "a", "--epochs", "1")
    file = read_checkpoint(tmp_path / "a" / "checkpoint.pth")
    names = list(file["model"])
    at = next(i for i, name in enumerate(names) if name.startswith("bbox_embed"))
    order = sorted(
        names, key=lambda name: at - 0.5 if name.startswith("feature_embed") else names.index(name)
    )

    def counted(each: list[str]) -> list[str]:
        """Names of the first parameter group: no backbone, no projections with their own rate, no aliases of a head."""
        others = re.compile(
            r"backbone\.|.*(reference_points|sampling_offsets)|(class|bbox)_embed\.[1-9]"
        )
        return [name for name in each if not others.match(name)]

    numbers = dict(zip(counted(names), file["optimizer"]["param_groups"][0]["params"], strict=True))
    state = {
        k: file["optimizer"]["state"][numbers[name]]
        for k, name in zip(numbers.values(), counted(order), strict=True)
    }
    torch.save(
        {
            "model": {name: file["model"][name] for name in order},
            "epoch": 0,
            "lr_scheduler": file["lr_scheduler"],
            "optimizer": {**file["optimizer"], "state": {**file["optimizer"]["state"], **state}},
            "args": Namespace(
                model="deformable_detr",
                dataset="imagenet",
                strategy="topk",
                object_embedding_loss=True,
                nheads=4,
                seed=42,
            ),
        },
        tmp_path / "published.pth",
    )
    # The file tells its pretext, for which one of the flags that `pre_train` adds means nothing.
    with pytest.raises(UserError, match="--num_patches has no effect with --pretext region_prior"):
        pre_train("--imagenet_path", images, "--resume", tmp_path / "published.pth")
    pre_train(
        *flags,
        "--output_dir",
        tmp_path / "b",
        "--epochs",
        "2",
        "--resume",
        tmp_path / "published.pth",
    )
    pre_train(*flags, "--output_dir", tmp_path / "a", "--epochs", "2", "--resume", "auto")
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ba")
    assert all(torch.equal(value, ours["model"][name]) for name, value in theirs["model"].items())


def test_encoder_follows_the_model_to_its_dtype() -> None:
    model, *_ = build()
    model.double()
    assert {p.dtype for p in model.target_encoder.parameters()} == {torch.float64}
    assert isinstance(model.target_encoder, nn.Module)
