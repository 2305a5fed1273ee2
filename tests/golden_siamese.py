"""Checks of a Siamese DETR case: our model, with the golden weights, against published values."""

import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.pretext.siamese import (
    common_regions,
    crop_view,
    draw_views,
    random_regions,
    select_regions,
)
from models import build_model
from models.criterion import Losses
from models.pretext.siamese import jitter_boxes
from tests.golden_models import Case, assert_close, load, load_fill
from tests.tiny import without_initialization
from util.box_ops import box_xyxy_to_cxcywh
from util.checkpoints.architecture import infer_detector
from util.checkpoints.published_layouts import to_detr_names
from util.nested_tensor import NestedTensor
from util.random_state import SampleRNG
from util.runs.optimizer import build_optimizer
from util.settings import PRETRAIN, make_parser, resolve


def our_args(meta: dict) -> Namespace:
    """Translate the published configuration of a case to settings."""
    published = meta["model_config"]
    args = make_parser(PRETRAIN).parse_args(
        shlex.split("--pretext siamese --backbone_weights none --device cpu --num_workers 0")
    )
    args.detector = infer_detector(meta["state_dict"])
    args.backbone_norm, args.reproduce_published = "frozen", True
    args.num_queries, args.num_patches = published["num_queries"], published["num_patches"]
    args.box_disturbance, args.dropout = published["box_disturbance"], meta["dropout"]
    args.feature_loss_coef = float(published["weight_dict"]["loss_feature"])
    args.global_loss_coef = float(published["weight_dict"]["loss_enc_global_contra"])
    args.num_feature_levels = published["transformer"].get("num_feature_levels")
    return resolve(args)


def build(name: str, folder: Path) -> Case:
    meta, arrays = load(name, folder)
    args = our_args(meta)
    with without_initialization():
        model, criterion, postprocessors = build_model(args)
    fill = load_fill(folder)
    weights = fill.fill_shapes(fill.float_entries(meta), meta["seed"], meta["tied_groups"])
    state = to_detr_names({key: torch.from_numpy(value) for key, value in weights.items()})
    counters = {
        key: value
        for key, value in model.state_dict().items()
        if key.endswith("num_batches_tracked")
    }
    model.load_state_dict({**state, **counters}, strict=True)
    noise = torch.from_numpy(arrays["disturb_normals"])
    model.sample_noise = lambda boxes: by_view(noise.unflatten(0, (-1, 2))).to(boxes.dtype)
    return Case(meta, arrays, model, criterion, postprocessors["bbox"], args)


def by_view(pairs: Tensor) -> Tensor:
    """[B, 2, ...] -> [2B, ...], view 1 of all images, then view 2."""
    return pairs.transpose(0, 1).flatten(0, 1)


def inputs(case: Case, dtype: torch.dtype) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    sizes = case.meta["view_sizes"]
    mask = by_view(torch.from_numpy(case.arrays["mask"]))
    batch, targets = torch.zeros(len(mask), 3, *mask.shape[1:], dtype=dtype), []
    for view in range(2):
        for i, (height, width) in enumerate(sizes):
            batch[len(targets), :, :height, :width] = (
                torch.from_numpy(case.arrays[f"view{view + 1}_{i}_q32"]).to(dtype) / 32
            )
            boxes = torch.from_numpy(case.arrays[f"boxes{i}_xyxy"][view]).to(dtype)
            targets.append(
                {
                    "boxes": box_xyxy_to_cxcywh(boxes) / torch.tensor([width, height] * 2),
                    "labels": torch.ones(len(boxes), dtype=torch.int64),
                    "patches": torch.from_numpy(case.arrays[f"crops{i}_v{view + 1}_q32"]).to(dtype)
                    / 32,
                    "size": torch.tensor([height, width]),
                }
            )
    return NestedTensor(batch, mask), targets


def check_direction(
    case: Case, outputs: dict, losses: Losses, targets: list[dict], direction: int
) -> None:
    """`direction` 1: queries of view 1, outputs of view 2."""
    half = len(targets) // 2
    mine = slice(half, None) if direction == 1 else slice(half)
    arrays, prefix = case.arrays, f"out_v{direction}/"
    chosen = arrays[f"{prefix}aux_query_idx"]
    for name, layer in [
        ("", outputs),
        *((f"aux{i}/", aux) for i, aux in enumerate(outputs["aux_outputs"])),
    ]:
        assert_close(
            layer["pred_logits"][mine][:, chosen if name else slice(None)],
            arrays[f"{prefix}{name}pred_logits"],
            atol=1e-4,
        )
        assert_close(layer["pred_boxes"][mine], arrays[f"{prefix}{name}pred_boxes"], atol=1e-5)
    features = arrays[f"{prefix}pred_feature"]
    ours = outputs["pred_features"][mine][..., : features.shape[-1]]
    assert_close(
        ours if features.shape[1] == ours.shape[1] else ours[:, chosen], features, atol=1e-4
    )
    target = arrays[f"{prefix}gt_feature"]
    assert_close(
        outputs["target_features"].chunk(2)[1 if direction == 1 else 0][:, : target.shape[1]],
        target,
        atol=2e-4,
    )
    for i, target in enumerate(targets[mine]):
        assert_close(target["boxes"], arrays[f"targets_v{direction}/boxes{i}"], atol=1e-6)
    layers = [f"aux{layer}" for layer in range(len(outputs["aux_outputs"]))] + ["last"]
    for name, per_image in zip(layers, losses.matches.pairs, strict=True):
        for i, (query, target) in enumerate(per_image[mine]):
            assert np.array_equal(
                np.stack([query, target]), arrays[f"match_v{direction}/{name}/img{i}"]
            ), (
                direction,
                name,
                i,
            )


def gradient_norms(case: Case) -> dict[str, float]:
    """Return gradient norms by published names.

    These split Deformable DETR's query table in two, and list heads that all layers share once.
    """
    norms = {}
    for name, p in case.model.named_parameters():
        if p.requires_grad:
            name, gradient = name.removeprefix("detector."), p.grad.double()
            for part in ("class_embed.", "bbox_embed.", "feature_align."):
                if name.startswith(part):
                    name = f"pred_head.{part}{name.removeprefix(part).removeprefix('0.')}"
            if (
                name == "query_embed.weight"
                and "transformer.tgt_embed.weight" in case.meta["state_dict"]
            ):
                gradient, content = gradient.chunk(2, dim=1)
                norms["transformer.tgt_embed.weight"] = float(content.norm())
            norms[name] = float(gradient.norm())
    return norms


def check_gradients(case: Case, expected: np.ndarray, rtol: float) -> None:
    ours = gradient_norms(case)
    assert set(ours) == set(case.meta["grad_names"])
    values = np.array([ours[name] for name in case.meta["grad_names"]])
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=1e-6 * expected.max())


def check_mode(
    case: Case, training: bool, dtype: torch.dtype, expected: dict, rtol: float
) -> tuple[dict, Losses]:
    """Check the losses of one pass; in float32 also run the backward pass."""
    case.model.train(training).zero_grad()
    samples, targets = inputs(case, dtype)
    outputs = case.model(samples, targets)
    losses = case.criterion(outputs, targets)
    assert set(losses) - set(expected) == {"projection_std"}
    for name, value in expected.items():
        logged = "error" in name  # the published code logs these in float32
        assert_close(
            losses[name], value, rtol=1e-6 if logged else rtol, atol=1e-9 if rtol < 1e-7 else 1e-6
        )
    assert_close(
        case.criterion.total_loss(losses),
        sum(expected[name] * weight for name, weight in case.meta["weight_dict"].items()),
        rtol=rtol,
    )
    if dtype == torch.float32:
        case.criterion.total_loss(losses).backward()
    return outputs, losses


def check_float32(case: Case) -> None:
    """Check outputs, matching, losses and gradients, in evaluation mode and in training mode."""
    meta, arrays = case.meta, case.arrays
    assert meta["weight_dict"] == case.criterion.weight_dict
    assert (
        sum(p.numel() for p in case.model.parameters() if p.requires_grad)
        == meta["trainable_params"]
    )
    case.criterion.train()
    outputs, losses = check_mode(case, False, torch.float32, meta["eval"]["losses"], 1e-5)
    targets = inputs(case, torch.float32)[1]
    for direction in (1, 2):
        check_direction(case, outputs, losses, targets, direction)
    half = len(targets) // 2
    assert_close(outputs["projections"][:half], arrays["mid/enc_head.0.projector"], atol=1e-4)
    assert_close(outputs["predictions"][:half], arrays["mid/enc_head.0.predictor"], atol=1e-4)
    check_gradients(case, arrays["grad_norms"], rtol=5e-3)
    check_mode(case, True, torch.float32, meta["train"]["losses"], 1e-5)
    check_gradients(case, arrays["train_grad_norms"], rtol=5e-3)
    state = case.model.state_dict()
    for name, total in meta["bn_running_after_train_sum"].items():
        assert_close(state[name].double().sum(), total, rtol=1e-4, atol=1e-4)


def check_float64(case: Case) -> None:
    """Check the losses of training mode in float64, with tolerances of rounding alone."""
    case.model.double()
    case.criterion.double().train()
    with torch.no_grad():
        check_mode(case, True, torch.float64, case.meta["float64"]["train_losses"], 1e-9)


def check_steps(case: Case) -> None:
    """Check the losses before and after an optimizer step, at 1/100 of the learning rate and with equal noise."""
    args, (samples, targets) = case.args, inputs(case, torch.float32)
    case.model.train()
    case.criterion.train()
    optimizer = build_optimizer(
        case.model,
        args.lr * 0.01,
        args.lr_backbone,
        case.meta["adamw"]["weight_decay"],
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
    )
    before, after = case.meta["adamw_lr_x0.01"]["step_losses"][:2]
    total = case.criterion.total_loss(case.criterion(case.model(samples, targets), targets))
    assert_close(total, before, rtol=1e-4)
    total.backward()
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), case.meta["adamw"]["clip_max_norm"])
    optimizer.step()
    with torch.no_grad():
        total = case.criterion.total_loss(case.criterion(case.model(samples, targets), targets))
    assert_close(total, after, rtol=1e-4)


def check_data(name: str, meta: dict, arrays: dict, folder: Path) -> None:
    """Check views, their pixels, regions in both views, random regions, selected regions, disturbed boxes."""
    image = Image.fromarray(arrays["image_uint8"].repeat(4, 0).repeat(4, 1))
    for number, case in enumerate(meta["two_view"]["cases"]):
        views = draw_views(
            SampleRNG.from_seeds(python=case["seed"]),
            (240, 320),
            0.5,
            case["views_bbox_stochastic"],
        )
        assert views.size == tuple(case["view_size_h_w"])
        assert_close(views.overlap_xyxy_abs, case["inter_raw"], rtol=1e-9)
        for side, view in ((1, views.first), (2, views.second)):
            assert_close(np.array(view), case[f"crop{side}_top_left_h_w"], rtol=1e-9)
            assert_close(
                views.image_to_view(views.overlap_xyxy_abs, view),
                case[f"inter_view{side}"],
                rtol=1e-9,
                atol=1e-9,
            )
            assert np.array_equal(
                np.asarray(crop_view(image, view, views.size))[::8, ::8],
                arrays[f"view{side}_{number}_stride8"],
            )
        regions = common_regions(torch.tensor(case["raw_boxes"]), views)
        picked = (
            select_regions(*regions, views, 6, SampleRNG(0)) if len(case["labels"]) >= 5 else None
        )
        proposed = case["gen_random"]
        right = np.array(proposed["labels"]) == 0
        random = random_regions(
            SampleRNG.from_seeds(numpy=case["gen_random_np_seed"]), views, len(right)
        )
        for side in range(2):
            assert_close(regions[side], case[f"anchors_view{side + 1}"], atol=1e-4)
            assert_close(random[side], np.array(proposed[f"view{side + 1}"])[right], atol=1e-4)
            if picked is not None:
                assert_close(picked[side], case[f"picked_view{side + 1}"], atol=1e-4)
    boxes = torch.from_numpy(arrays["disturb/boxes_xyxy"])
    noise = torch.from_numpy(arrays["disturb/normals"])
    assert_close(
        jitter_boxes(boxes, noise, 0.1), arrays["disturb/out_ratio0.1_h90_w110"], rtol=1e-6
    )


CHECKS = {"data_siamese": check_data}
