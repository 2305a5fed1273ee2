"""Pretexts on every detector: invariants, state dicts, and transfer to fine-tuning; UP-DETR's in detail."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.pretext import Pretext
from models.pretext.random_query_patch import RandomQueryPatch
from tests.tiny import (
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
from util.errors import UserError
from util.settings import PRETRAIN, make_parser
from util.settings.registry import DETECTORS, PRETEXTS

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ALL_PAIRS = list(itertools.product(PRETEXTS, DETECTORS))
pairs = pytest.mark.parametrize(("pretext", "detector"), ALL_PAIRS)
# Three cells of the table that have every pretext and every detector; the other six are slow tests.
DIAGONAL = set(zip(PRETEXTS, DETECTORS, strict=True))
diagonal_of_pairs = pytest.mark.parametrize(
    ("pretext", "detector"),
    [pytest.param(*pair, marks=() if pair in DIAGONAL else pytest.mark.slow) for pair in ALL_PAIRS],
)
on_detectors = pytest.mark.parametrize("detector", DETECTORS)
PATCHES, QUERIES = 5, 20
OWN_FLAGS = {
    "random_query_patch": ["--feature_recon"],
    "region_prior": shlex.split(
        "--proposals random --max_prop 5 --object_embedding_loss --num_patches 10"
    ),
    "siamese": ["--proposals", "random"],
}


def build(
    detector: str, *flags: str, pretext: str = "random_query_patch", seed: int = 0
) -> tuple[Pretext, nn.Module]:
    torch.manual_seed(seed)
    own = OWN_FLAGS[pretext]
    model, criterion, _ = build_model(
        tiny_args(PRETRAIN, "--pretext", pretext, "--detector", detector, *own, *flags)
    )
    return model, criterion


def patch_targets(
    patches: int = PATCHES, images: int = 2, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Targets for images of 64 x 64. For a pretext with two views, the second half are the second views."""
    return [
        {**target, "size": torch.tensor([64, 64])}
        for target in make_targets([patches] * images, seed=seed, patches=patches)
    ]


# ---- any pretext ----


@pairs
def test_pretext_runs_on_every_detector(pretext: str, detector: str) -> None:
    model, criterion = build(detector, pretext=pretext)
    outputs = model(make_batch([(64, 96), (64, 64)] * 2), patch_targets(images=4))
    losses = criterion(outputs, patch_targets(images=4))
    assert set(criterion.weight_dict) <= set(losses)
    total = criterion.total_loss(losses)
    total.backward()
    assert torch.isfinite(total)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("detector.backbone."), name
            continue
        # DDP would wait for a parameter without gradient.
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pairs
def test_state_dict_is_flat_and_loads_both_ways(pretext: str, detector: str) -> None:
    model, _ = build(detector, pretext=pretext, seed=0)
    other, _ = build(detector, pretext=pretext, seed=1)
    state = model.state_dict()
    assert not any(key.startswith("detector.") for key in state)
    assert set(model.detector.state_dict()) < set(state)
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    # A plain dict, without PyTorch's metadata.
    other.load_state_dict({key: value.clone() for key, value in state.items()}, strict=True)
    assert list(state) == list(other.state_dict())
    del state["query_embed.weight"]
    with pytest.raises(RuntimeError, match="query_embed"):
        other.load_state_dict(state)


@pairs
def test_state_dict_inside_another_module(pretext: str, detector: str) -> None:
    """Inside another module, as under DDP, keys have that module's prefix and still no `detector.`."""
    model, _ = build(detector, pretext=pretext)
    wrapper = nn.ModuleDict({"module": model})
    state = wrapper.state_dict()
    assert set(state) == {f"module.{key}" for key in model.state_dict()}
    wrapper.load_state_dict(state, strict=True)


@diagonal_of_pairs
def test_loss_falls_on_a_fixed_batch(pretext: str, detector: str) -> None:
    """On four fixed images the loss falls to less than half in at most 60 steps."""
    flags = ["--dropout", "0", "--hidden_dim", "64", "--fre_cnn", "--backbone_norm", "frozen"]
    # Batch norm over two images per view gives -1 and 1: at full weight this noise hides the other losses.
    own = {
        "random_query_patch": ["--mask_ratio", "0"],
        "siamese": ["--box_disturbance", "0", "--global_loss_coef", "1"],
    }
    model, criterion = build(detector, *flags, *own.get(pretext, ()), pretext=pretext)
    samples, targets = make_batch(4), patch_targets(images=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    history = []
    for _ in range(60):
        total = criterion.total_loss(criterion(model(samples, targets), targets))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(float(total.detach()))
        if max(history[-5:]) < 0.5 * history[0]:
            break
    assert min(history[-5:]) < 0.5 * history[0], history[::10]


# ---- random query patch ----


@on_detectors
def test_shapes(detector: str) -> None:
    model, criterion = build(detector)
    outputs = model(make_batch(), patch_targets())
    layers = [*outputs["aux_outputs"], outputs]
    channels = sum(model.detector.backbone[0].num_channels)  # levels are pooled and concatenated
    assert channels == {"deformable_detr": 128 + 256 + 512}.get(detector, 512)
    assert len(layers) == 2
    for layer in layers:
        # Two classes and "no object", on every detector.
        assert layer["pred_logits"].shape == (2, QUERIES, 3)
        assert layer["pred_boxes"].shape == (2, QUERIES, 4)
        assert layer["pred_features"].shape == (2, QUERIES, channels)
    assert outputs["target_features"].shape == (2 * PATCHES, channels)
    assert criterion.weight_dict == {
        f"{name}{suffix}": weight
        for suffix in ("", "_0")
        for name, weight in (
            ("loss_ce", 1.0),
            ("loss_bbox", 5.0),
            ("loss_giou", 2.0),
            ("loss_feature", 1.0),
        )
    }


@on_detectors
def test_without_reconstruction(detector: str) -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(PRETRAIN, "--detector", detector))
    assert not any("feature_align" in key for key in model.state_dict())
    outputs = model(make_batch(), patch_targets())
    assert "pred_features" not in outputs
    assert "target_features" not in outputs
    assert not any(
        "loss_feature" in name
        for name in {**criterion(outputs, patch_targets()), **criterion.weight_dict}
    )


@on_detectors
@pytest.mark.parametrize("changed", [0, 3])
def test_groups_are_independent(detector: str, changed: int) -> None:
    """Replacing one patch leaves the outputs of all other groups unchanged."""
    model, _ = build(detector)
    model.eval()
    targets, other = patch_targets(), patch_targets()
    other[1]["patches"] = other[1]["patches"].clone()
    other[1]["patches"][changed] = torch.randn(3, 32, 32)
    before, after = model(make_batch(), targets), model(make_batch(), other)
    group = torch.arange(QUERIES) // (QUERIES // PATCHES) == changed
    for name in ("pred_logits", "pred_boxes", "pred_features"):
        torch.testing.assert_close(after[name][0], before[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            after[name][1, ~group], before[name][1, ~group], rtol=1e-5, atol=1e-6
        )
    difference = (after["pred_logits"][1, group] - before["pred_logits"][1, group]).abs()
    assert difference.amax(-1).min() > 1e-4


@on_detectors
def test_queries_of_one_patch_attend_to_each_other(detector: str) -> None:
    model, _ = build(detector)
    model.eval()
    before = model(make_batch(), patch_targets())["pred_logits"]
    with torch.no_grad():
        position = model.detector.query_embed.weight[4]  # the first query of group 1
        position += torch.randn_like(position)
    after = model(make_batch(), patch_targets())["pred_logits"]
    changed = (after - before).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [4 <= query < 8 for query in range(QUERIES)]


@on_detectors
@pytest.mark.parametrize("count", [1, 3])
def test_fewer_patches_at_evaluation_use_the_first_groups(detector: str, count: int) -> None:
    model, _ = build(detector)
    model.eval()
    targets = patch_targets()
    few = [{**target, "patches": target["patches"][:count]} for target in targets]
    whole, part = model(make_batch(), targets), model(make_batch(), few)
    queries = count * QUERIES // PATCHES
    assert part["pred_boxes"].shape[1] == queries
    for name in ("pred_logits", "pred_boxes", "pred_features"):
        torch.testing.assert_close(part[name], whole[name][:, :queries], rtol=1e-5, atol=1e-6)


def test_number_of_patches_must_be_equal_and_not_too_large() -> None:
    model, _ = build("detr")
    targets = [*patch_targets(3, images=1), *patch_targets(2, images=1)]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        model(make_batch(), targets)
    with pytest.raises(ValueError, match="at most 5"):
        model(make_batch(), patch_targets(6))


@on_detectors
def test_feature_loss_lies_between_0_and_4(detector: str) -> None:
    model, criterion = build(detector)
    targets = patch_targets()
    outputs = model(make_batch(), targets)
    loss = criterion(outputs, targets)["loss_feature"]
    assert 1 < loss.item() < 3  # about 2 for independent directions
    features = outputs["target_features"].view(2, PATCHES, -1)

    def with_prediction(features: Tensor) -> float:
        """Loss when each query predicts the feature of its group, and each patch is matched to its group."""
        perfect = {
            "pred_logits": torch.zeros(2, QUERIES, 3),
            "pred_features": features.repeat_interleave(QUERIES // PATCHES, dim=1),
            "pred_boxes": torch.stack([target["boxes"] for target in targets]).repeat_interleave(
                QUERIES // PATCHES, dim=1
            ),
            "target_features": outputs["target_features"],
        }
        return float(criterion(perfect, targets)["loss_feature"])

    assert with_prediction(features * 3.0) == pytest.approx(0, abs=1e-5)
    assert with_prediction(-features) == pytest.approx(4, abs=1e-5)


@on_detectors
@pytest.mark.parametrize("num_patches", [1, 2, 4, 5, 10, 20, 25, 50, 100])
def test_every_number_of_patches_that_divides_the_queries(detector: str, num_patches: int) -> None:
    """For some of these numbers the published mask has rows without any allowed key, which give NaN."""
    model, criterion = build(
        detector,
        "--num_queries",
        "100",
        "--num_patches",
        str(num_patches),
        "--backbone_norm",
        "frozen",
    )
    targets = patch_targets(num_patches, images=1)
    outputs = model(make_batch(1), targets)
    for layer in (*outputs["aux_outputs"], outputs):
        assert all(
            torch.isfinite(layer[name]).all()
            for name in ("pred_logits", "pred_boxes", "pred_features")
        )
    losses = criterion(outputs, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(losses.matches.pairs[0][0][0]) == num_patches


@on_detectors
def test_number_of_patches_must_divide_the_queries(detector: str) -> None:
    with pytest.raises(UserError, match="--num_patches 7 does not divide --num_queries 20"):
        build(detector, "--num_patches", "7")
    inner = build(detector)[0].detector
    with pytest.raises(UserError, match="--num_queries 21"):
        RandomQueryPatch(inner, 7)


@on_detectors
def test_reconstruction_target_is_detached(detector: str) -> None:
    """A backbone that trains gets gradients from queries and images, never through the target."""
    model, criterion = build(detector, "--dropout", "0")
    outputs = model(make_batch(), patch_targets())
    assert not outputs["target_features"].requires_grad
    assert outputs["pred_features"].requires_grad
    criterion.total_loss(criterion(outputs, patch_targets())).backward()
    backbone = [p for name, p in model.named_parameters() if "backbone" in name]
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in backbone)


def test_frozen_backbone() -> None:
    """`--fre_cnn`: the backbone has no gradients, and the patch features no graph."""
    model, criterion = build("detr", "--fre_cnn", "--backbone_norm", "frozen")
    features = model.patch_features(patch_targets()[0]["patches"])
    assert not features.requires_grad
    criterion.total_loss(
        criterion(model(make_batch(), patch_targets()), patch_targets())
    ).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is ("backbone" in name), name


@on_detectors
def test_patch_features_are_dropped_in_training_only(detector: str) -> None:
    model, _ = build(detector, "--mask_ratio", "0.5", "--dropout", "0")
    features = torch.randn(2 * PATCHES, model.patch2query.in_features)
    with torch.no_grad():
        learned = model.detector.learned_queries(2).position
        full = (
            model.patch2query(features)
            .view(2, PATCHES, -1)
            .repeat_interleave(QUERIES // PATCHES, dim=1)
        )
        model.eval()
        torch.testing.assert_close(
            model.patch_queries(features, 2, PATCHES).position, learned + full
        )
        model.train()
        drawn = model.patch_queries(features, 2, PATCHES).position
    dropped = (drawn - learned).abs().amax(-1) < 1e-6
    assert 5 < int(dropped.sum()) < 35  # of 40, each with probability 0.5
    torch.testing.assert_close(drawn[~dropped], (learned + full)[~dropped])
    assert not torch.equal(dropped[0], dropped[1])  # drawn per image


def test_mask_ratio_is_the_fraction_of_dropped_features() -> None:
    model, _ = build("detr", "--mask_ratio", "0.1")
    torch.manual_seed(0)
    keep = model.keep_mask(100, 100, torch.device("cpu"))
    assert keep.shape == (100, 100, 1)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert 0.88 < float(keep.mean()) < 0.92
    model.mask_ratio = 0.0
    assert model.keep_mask(10, 10, torch.device("cpu")).min() == 1


@on_detectors
def test_query_shuffle(detector: str) -> None:
    """Training assigns learned queries to patches in a new order per step, equal for all images; evaluation never."""
    model, _ = build(detector, "--query_shuffle", "--mask_ratio", "0")
    features = torch.randn(2 * PATCHES, model.patch2query.in_features)
    with torch.no_grad():
        learned = model.detector.learned_queries(1).position[0]
        content = model.detector.learned_queries(1).content
        full = (
            model.patch2query(features)
            .view(2, PATCHES, -1)
            .repeat_interleave(QUERIES // PATCHES, dim=1)
        )
        orders = []
        for _ in range(2):
            queries = model.train().patch_queries(features, 2, PATCHES)
            drawn = queries.position - full
            order = torch.cdist(drawn, learned.expand(2, -1, -1)).argmin(-1)
            torch.testing.assert_close(drawn, learned[order], rtol=1e-4, atol=1e-5)
            assert torch.equal(order[0], order[1])
            # The content of a query moves with its position.
            assert content is None or torch.equal(queries.content[0], content[0, order[0]])
            assert sorted(order[0].tolist()) == list(range(QUERIES))
            orders.append(order[0].tolist())
        assert orders[0] != orders[1]
        torch.testing.assert_close(
            model.eval().patch_queries(features, 2, PATCHES).position - full,
            learned.expand(2, -1, -1),
        )


def test_order_of_queries_and_patches() -> None:
    """Query n belongs to patch n // (Q / M)."""
    model, _ = build("detr")
    model.eval()
    features = torch.randn(PATCHES, 512)
    with torch.no_grad():
        position = (
            model.patch_queries(features, 1, PATCHES).position[0]
            - model.detector.query_embed.weight
        )
        for query in range(QUERIES):
            torch.testing.assert_close(
                position[query], model.patch2query(features[query // 4]), rtol=1e-4, atol=1e-5
            )


def test_patch_features_are_pooled_maps() -> None:
    model, _ = build("detr")
    model.eval()
    patches = patch_targets()[0]["patches"]
    expected = model.detector.backbone[0](patches)[-1].mean((2, 3))
    torch.testing.assert_close(model.patch_features(patches), expected)


@pytest.mark.parametrize(
    ("case", "flags"),
    [("updetr_r50", ["--pre_norm", "--feature_recon"]), ("updetr_r50_norecon_postnorm", [])],
)
def test_names_of_the_published_checkpoint(case: str, flags: list[str]) -> None:
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    args = make_parser(PRETRAIN).parse_args(
        ["--backbone_weights", "none", "--device", "cpu", *flags]
    )
    with torch.device("meta"):
        state = build_model(args)[0].state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: entry["shape"] for key, entry in golden["state_dict"].items()
    }


# ---- transfer ----

OWN_PARTS = tuple(part for entry in PRETEXTS.values() for part in entry.parameter_prefixes)


@diagonal_of_pairs
def test_transfer_to_fine_tuning(pretext: str, detector: str, tmp_path: Path) -> None:
    """Pre-train a few steps and fine-tune: which weights transfer, which start from scratch, and all train."""
    pre_train(
        "--pretext",
        pretext,
        "--detector",
        detector,
        *OWN_FLAGS[pretext],
        "--imagenet_path",
        write_images(tmp_path / "images"),
        "--output_dir",
        tmp_path / "pretrain",
        *shlex.split("--epochs 2 --lr 0.001"),
    )
    source = read_checkpoint(tmp_path / "pretrain" / "checkpoint.pth")["model"]
    first: dict[str, Tensor] = {}

    def keep_first_weights(module: nn.Module, inputs: tuple) -> None:
        if not first and module.training and hasattr(module, "encode"):
            first.update({key: value.clone() for key, value in module.state_dict().items()})

    hook = nn.modules.module.register_module_forward_pre_hook(keep_first_weights)
    try:
        with captured_log() as lines:
            fine_tune(
                "--coco_path",
                write_coco(tmp_path / "coco", train=2),
                "--pretrain",
                tmp_path / "pretrain" / "checkpoint.pth",
                "--output_dir",
                tmp_path / "finetune",
                *shlex.split("--epochs 1 --lr 0.001 --lr_backbone 0.001"),
            )
    finally:
        hook.remove()
    transferred = {
        key for key in source if not key.startswith(OWN_PARTS) and "class_embed" not in key
    }
    assert transferred == {key for key in first if "class_embed" not in key}
    has_head_lists = "bbox_embed.0.layers.2.weight" in source  # Deformable DETR
    classes = "class_embed.0" if has_head_lists else "class_embed"
    boxes = "bbox_embed.0" if has_head_lists else "bbox_embed"
    assert {
        "query_embed.weight",
        f"{boxes}.layers.2.weight",
        "backbone.0.body.conv1.weight",
    } <= transferred
    for key in transferred:
        assert torch.equal(first[key], source[key]), key
    assert first[f"{classes}.weight"].shape[0] in (91, 92)
    table = "\n".join(lines)
    assert "re-initialized" in table
    heads = len({key for key in first if key.startswith("class_embed.")})
    assert any(
        line.startswith("class_embed ") and f"{heads} (" in line for line in table.splitlines()
    )
    assert any(
        line.startswith(PRETEXTS[pretext].parameter_prefixes[0].rstrip("."))
        for line in table.splitlines()
    )
    trained = read_checkpoint(tmp_path / "finetune" / "checkpoint.pth")
    settings = read_checkpoint(tmp_path / "pretrain" / "checkpoint.pth")["args"]
    for flag in ("detector", "position_embedding", "pre_norm"):  # adopted from the checkpoint
        assert trained["args"][flag] == settings[flag], flag
    for key in (
        "query_embed.weight",
        f"{boxes}.layers.2.weight",
        f"{classes}.weight",
        "backbone.0.body.layer4.1.conv2.weight",
        "transformer.encoder.layers.0.linear1.weight",
        "transformer.decoder.layers.1.linear2.weight",
    ):
        assert not torch.equal(trained["model"][key], first[key]), key


def test_pre_training_changes_all_but_a_frozen_backbone(tmp_path: Path) -> None:
    """Pre-training leaves a frozen backbone bit-exact and changes everything else."""
    images = write_images(tmp_path / "images")
    flags = (
        "--imagenet_path",
        images,
        "--feature_recon",
        "--fre_cnn",
        "--backbone_norm",
        "frozen",
        "--epochs",
        1,
    )
    torch.manual_seed(42)
    pre_train(*flags, "--output_dir", tmp_path / "one")
    pre_train(*flags, "--output_dir", tmp_path / "two", "--lr", 1e-2)
    one, two = (
        read_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two")
    )
    for key in one:
        assert torch.equal(one[key], two[key]) is ("backbone" in key), key
