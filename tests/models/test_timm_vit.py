"""Vision transformers of timm: sizes, padding, levels, weights, frozen parts, pretexts, and whole runs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import build_model
from models.activation_checkpoint import checkpoint_activations
from models.backbone import Backbone
from models.timm_vit import TimmViT
from models.trainable import TrainableModel
from tests.tiny import (
    assert_same,
    captured_log,
    fine_tune,
    make_batch,
    make_targets,
    pre_train,
    read_checkpoint,
    tiny_args,
    write_coco,
    write_images,
)
from tools.exports.check import OTHER_SHAPES, TOLERANCE, check
from tools.exports.formats import run_onnx, to_onnx
from tools.exports.graph import Graph, record
from util.checkpoints.backbone_weights import load_backbone_weights
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

timm = pytest.importorskip("timm", reason="timm is an extra")

# 6 blocks of 64 channels, patches of 16 pixels, 160 x 160 pixels; timm has it for tests.
NAME = "test_vit"
FLAGS = ("--backbone", f"timm:{NAME}")
PATCH = 16


def full_network(seed: int = 1, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, pretrained=False, **kwargs).eval()


def vit(stages: tuple[int, ...] = (4,), **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(f"timm:{NAME}", stages=stages, **kwargs).eval()


def patch_tokens(network: torch.nn.Module, images: Tensor) -> Tensor:
    """Return timm's own output without the class token, [B, C, h, w]."""
    tokens = network.forward_features(images)[:, network.num_prefix_tokens :]  # [B, h * w, C]
    height, width = (side // PATCH for side in images.shape[-2:])
    return tokens.transpose(1, 2).unflatten(2, (height, width))


@torch.no_grad()
def test_the_map_is_timms_output_at_the_native_size(tmp_path: Path) -> None:
    """With the weights of a file, and at other sizes with the position embedding that timm resamples."""
    network = full_network()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    backbone = vit()
    load_backbone_weights(backbone.body, backbone.name, str(tmp_path / "vit.pth"))
    images = torch.randn(2, 3, 160, 160)
    assert (backbone.strides, backbone.num_channels) == ([PATCH], [64])
    assert_same(backbone(images)[0], patch_tokens(network, images))

    images = torch.randn(1, 3, 96, 192)
    resampled = full_network(img_size=(96, 192))  # another grid of position embeddings
    state = network.state_dict()
    state.pop("pos_embed")
    resampled.load_state_dict(state, strict=False)
    from timm.layers import resample_abs_pos_embed

    resampled.pos_embed.copy_(
        resample_abs_pos_embed(network.pos_embed, (6, 12), (10, 10), num_prefix_tokens=1)
    )
    torch.testing.assert_close(backbone(images)[0], patch_tokens(resampled, images))


@torch.no_grad()
def test_an_image_does_not_depend_on_the_padding_of_its_batch() -> None:
    backbone, sizes_hw = vit(), [(64, 64), (90, 61), (64, 50)]
    batch = make_batch(sizes_hw)
    (maps,) = backbone(batch.tensors, batch.mask)
    assert maps.shape == (3, 64, 6, 4)
    for i, (height, width) in enumerate(sizes_hw):
        (alone,) = backbone(batch.tensors[i : i + 1, :, :height, :width])
        down, across = alone.shape[-2:]
        assert (down, across) == (-(-height // PATCH), -(-width // PATCH))
        torch.testing.assert_close(maps[i, :, :down, :across], alone[0])
        assert not maps[i, :, down:].any()
        assert not maps[i, :, :, across:].any()


@pytest.mark.parametrize("detector", ["detr", "conditional_detr"])
@torch.no_grad()
def test_detections_do_not_depend_on_the_batch(detector: str) -> None:
    """The padding mask and the positions are those of the patches."""
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, "--detector", detector, *FLAGS))[0].eval()
    sizes_hw = [(64, 64), (90, 61)]
    batch = make_batch(sizes_hw)
    together = model(batch)
    for i, (height, width) in enumerate(sizes_hw):
        alone = model(batch.tensors[i : i + 1, :, :height, :width])
        for name in ("pred_boxes", "pred_logits"):
            torch.testing.assert_close(together[name][i], alone[name][0], rtol=0, atol=1e-5)


def test_patches_of_14_pixels() -> None:
    backbone = Backbone("timm:eva02_tiny_patch14_224", stages=(2, 3, 4))
    assert (backbone.strides, backbone.num_channels) == ([14], [192])
    (maps,) = backbone(torch.randn(1, 3, 64, 43))
    assert maps.shape == (1, 192, 5, 4)
    maps.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters()), "DDP waits for every gradient"


def test_stages_are_depths() -> None:
    """Several stages are the last one; stage 2 ends at half depth, and is normalized, too."""
    whole, half = vit((2, 3, 4)), vit((2,))
    assert isinstance(half.body, TimmViT)
    assert len(whole.body.model.blocks) == 6
    assert len(half.body.model.blocks) == 3
    assert set(half.body.state_dict()) < set(whole.body.state_dict())
    half.body.load_state_dict({k: whole.body.state_dict()[k] for k in half.body.state_dict()})
    images = torch.randn(1, 3, 64, 64)
    expected = whole.body.model.forward_intermediates(
        images, indices=[2], norm=True, intermediates_only=True
    )
    assert_same(half(images)[0], expected[0])


@pytest.mark.parametrize(
    ("levels", "shapes"),
    [
        (1, [(6, 4)]),
        (2, [(6, 4), (3, 2)]),
        (3, [(12, 8), (6, 4), (3, 2)]),
        (4, [(12, 8), (6, 4), (3, 2), (2, 1)]),
    ],
)
def test_levels_of_deformable_detr(levels: int, shapes: list[tuple[int, int]]) -> None:
    """With three levels or more, strides 8, 16, 32, ... as on a ResNet; every projection trains."""
    torch.manual_seed(0)
    flags = ("--detector", "deformable_detr", "--num_feature_levels", str(levels))
    model, criterion, _ = build_model(tiny_args(FINETUNE, *flags, *FLAGS))
    memory = model.encode(make_batch([(64, 64), (90, 61)]))
    assert memory.shapes == shapes
    assert memory.shapes[memory.last_level] == (6, 4)
    assert memory.last_map().shape == (2, 32, 6, 4)
    assert memory.padding_mask is not None
    masks = memory.padding_mask.split([h * w for h, w in shapes], 1)
    for mask, (height, width) in zip(masks, shapes, strict=True):
        rows = ~mask.unflatten(1, (height, width))[0, :, 0]  # of the image with 64 of 96 rows
        assert rows.sum() == -(-height * 2 // 3)
    criterion.total_loss(
        criterion(model(make_batch([(64, 64), (90, 61)])), make_targets([1, 2]))
    ).backward()
    assert all(p.grad is not None for p in model.input_proj.parameters())


def pretext_model(pretext: str, *flags: str) -> tuple[TrainableModel, Tensor]:
    """Return a pretext after a training step, and its loss."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(PRETRAIN, "--pretext", pretext, *FLAGS, *flags))
    views = 2 if pretext == "siamese" else 1
    batch = make_batch([(64, 64), (90, 61)] * views)
    targets = make_targets([5] * len(batch), patches=5)
    for target in targets:
        target["size"] = torch.tensor([64, 61])
    loss = criterion.total_loss(criterion(model(batch, targets), targets))
    loss.backward()
    return model, loss


EMBEDDING = ("--proposals", "random", "--object_embedding_loss")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("pretext", "flags"),
    [("random_query_patch", ("--feature_recon",)), ("siamese", ()), ("region_prior", EMBEDDING)],
)
def test_pretexts(pretext: str, flags: tuple[str, ...], frozen: bool, monkeypatch) -> None:
    if pretext == "region_prior":
        monkeypatch.setattr("tests.tiny.PRETEXT_FLAGS", [])
    lr = "0" if frozen else "1e-4"
    model, loss = pretext_model(pretext, *flags, "--lr_backbone", lr)
    assert torch.isfinite(loss)
    backbone = model.base_detector().backbone
    assert backbone[0].frozen == frozen
    assert any(p.grad is not None for p in backbone.parameters()) != frozen
    if pretext == "region_prior":
        encoder = model.frozen_parts()["target_encoder"]
        assert len(encoder.backbone.body.model.blocks) == 3
        for key, value in encoder.backbone.body.state_dict().items():
            assert_same(value, backbone[0].body.state_dict()[key])


def test_global_discrimination_pools_the_backbones_own_level() -> None:
    """Not the level that Deformable DETR upsamples before it."""
    model, _ = pretext_model("siamese", "--detector", "deformable_detr")
    memory = model.base_detector().encode(make_batch(2))
    own = memory.last_map().flatten(2).mean(2)
    torch.testing.assert_close(model.pooled_memory(memory), own)


def test_learning_rates_and_activation_checkpoint() -> None:
    """All of it trains with --lr_backbone, the upsampling convolution with --lr."""
    from util.runs.optimizer import parameter_groups

    torch.manual_seed(0)
    args = tiny_args(FINETUNE, "--detector", "deformable_detr", "--lr_backbone", "1e-5", *FLAGS)
    model, criterion, _ = build_model(args)
    model.eval()  # without dropout
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, args.lr, args.lr_backbone, args.lr_backbone_names)
    slow = {names[id(p)] for group in groups if group["lr"] == 1e-5 for p in group["params"]}
    assert slow == {name for name in names.values() if name.startswith("backbone.0.body.")}
    assert all(p.requires_grad for p in model.backbone.parameters())

    batch, targets = make_batch([(64, 64), (90, 61)]), make_targets([1, 2])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        criterion.total_loss(criterion(model(batch), targets)).backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
        checkpoint_activations(model)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert checkpoint_activations(model) == 1 + 6  # encoder layer and blocks


# ---- weights ----


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as DINO's files have them: a teacher below prefixes, at another image size."""
    state = {**state, "pos_embed": state["pos_embed"][:, : 1 + 64]}  # 8 x 8 patches
    return {f"module.backbone.{key}": value for key, value in state.items()}


def test_weights_of_another_image_size_and_prefix(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    state = full_network(num_classes=0).state_dict()
    torch.save({"teacher": official(state), "epoch": 3}, tmp_path / "dino.pth")
    body = vit().body
    with captured_log() as lines:
        load_backbone_weights(body, f"timm:{NAME}", str(tmp_path / "dino.pth"))
    assert "none missing" in "\n".join(lines)
    loaded = body.model.state_dict()
    small = state["pos_embed"][:, : 1 + 64]
    expected = resample_abs_pos_embed(small, (10, 10), (8, 8), num_prefix_tokens=1)
    assert_same(loaded["pos_embed"], expected)
    assert_same(loaded["blocks.5.mlp.fc1.weight"], state["blocks.5.mlp.fc1.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"other.pth contains no weights of timm:{NAME}"):
        load_backbone_weights(vit().body, f"timm:{NAME}", str(tmp_path / "other.pth"))


# ---- what does not work ----


def test_dilation_is_refused() -> None:
    with pytest.raises(UserError, match="--dilation changes the stride of a convolutional"):
        Backbone(f"timm:{NAME}", dilation=True)


def test_masks_are_refused() -> None:
    with pytest.raises(UserError, match="--masks reads maps of four strides"):
        build_model(tiny_args(FINETUNE, "--masks", *FLAGS))


def test_a_transformer_of_one_size_is_refused() -> None:
    with pytest.raises(UserError, match="can't read images of any size"):
        Backbone("timm:test_vit_relpos")


# ---- runs and exports ----

DEFORMABLE = ("--detector", "deformable_detr", *FLAGS)


@pytest.mark.slow
def test_pre_training_fine_tuning_and_resuming(tmp_path: Path) -> None:
    """With a backbone that trains: it arrives in fine-tuning, and a resumed run equals one without a stop."""
    write_images(tmp_path / "images", count=4)
    coco = write_coco(tmp_path / "coco")
    schedule = ("--lr", "1e-3", "--lr_backbone", "1e-3", "--batch_size", "2")
    with captured_log() as lines:
        pre_train(
            *("--imagenet_path", tmp_path / "images", "--output_dir", tmp_path / "pre"),
            *("--epochs", "1", "--feature_recon", *schedule, *DEFORMABLE),
        )
    assert any(line.startswith("memory: about") for line in lines)
    trained = read_checkpoint(tmp_path / "pre" / "checkpoint.pth")["model"]
    initial = build_model(tiny_args(FINETUNE, *DEFORMABLE))[0].state_dict()
    key = "backbone.0.body.model.blocks.0.attn.qkv.weight"
    assert not torch.equal(trained[key], initial[key])

    labelled = ("--coco_path", coco, *schedule, "--seed", "1")
    pretrain = ("--pretrain", tmp_path / "pre" / "checkpoint.pth", *DEFORMABLE)
    with captured_log() as lines:
        fine_tune(*labelled, *pretrain, "--epochs", "2", "--output_dir", tmp_path / "whole")
    assert not any("backbone.0" in line and "missing" in line for line in lines)
    fine_tune(*labelled, *pretrain, "--epochs", "1", "--output_dir", tmp_path / "parts")
    part = tmp_path / "parts" / "checkpoint.pth"
    resumed = ("--resume", part, *DEFORMABLE, "--epochs", "2")
    fine_tune(*labelled, *resumed, "--output_dir", tmp_path / "parts")
    whole, parts = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts")
    )
    assert_same(whole["model"], parts["model"])
    assert_same(whole["optimizer"], parts["optimizer"])


@pytest.mark.slow
def test_the_onnx_file_equals_the_model() -> None:
    """At any image size; position embeddings are resampled in the graph."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, *FLAGS), 5)[0].eval()
    graph = Graph(model).eval()
    run = run_onnx(to_onnx(record(graph), {}))
    assert check(graph, run, OTHER_SHAPES, "the ONNX file") < TOLERANCE
