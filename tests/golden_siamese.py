"""Checks of a case of Siamese DETR: our model, filled by the golden rule, against the published numbers, in float32 and
float64.
"""

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
from tests.golden_models import Case, close, load, load_fill
from util.box_ops import box_xyxy_to_cxcywh
from util.checkpoints.architecture import infer_detector
from util.checkpoints.published_layouts import to_detr_names
from util.nested_tensor import NestedTensor
from util.random_state import SampleRNG
from util.runs.optimizer import build_optimizer
from util.settings import PRETRAIN, make_parser, resolve


def our_args(js: dict) -> Namespace:
    """Our flags for the settings of a case."""
    published = js["model_config"]
    args = make_parser(PRETRAIN).parse_args(
        [
            "--pretext",
            "siamese",
            "--backbone_weights",
            "none",
            "--device",
            "cpu",
            "--num_workers",
            "0",
        ]
    )
    args.detector, args.backbone_norm, args.reproduce_published = (
        infer_detector(js["state_dict"]),
        "frozen",
        True,
    )
    args.num_queries, args.num_patches = published["num_queries"], published["num_patches"]
    args.box_disturbance, args.dropout = published["box_disturbance"], js["dropout"]
    args.feature_loss_coef = float(published["weight_dict"]["loss_feature"])
    args.global_loss_coef = float(published["weight_dict"]["loss_enc_global_contra"])
    args.num_feature_levels = published["transformer"].get("num_feature_levels")
    return resolve(args)


def build(name: str, folder: Path) -> Case:
    js, z = load(name, folder)
    args = our_args(js)
    model, criterion, postprocessors = build_model(args)
    fill = load_fill(folder)
    weights = fill.fill_shapes(fill.float_entries(js), js["seed"], js["tied_groups"])
    state = to_detr_names({key: torch.from_numpy(value) for key, value in weights.items()})
    counters = {
        key: value
        for key, value in model.state_dict().items()
        if key.endswith("num_batches_tracked")
    }
    model.load_state_dict({**state, **counters}, strict=True)
    normals = torch.from_numpy(z["disturb_normals"])
    model.sample_noise = lambda boxes: by_view(normals.unflatten(0, (-1, 2))).to(boxes.dtype)
    return Case(js, z, model, criterion, postprocessors["bbox"], args)


def by_view(pairs: Tensor) -> Tensor:
    """[B, 2, ...] -> [2B, ...], view 1 of all images, then view 2."""
    return pairs.transpose(0, 1).flatten(0, 1)


def inputs(case: Case, dtype: torch.dtype) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    sizes = case.js["view_sizes"]
    mask = by_view(torch.from_numpy(case.z["mask"]))
    batch, targets = torch.zeros(len(mask), 3, *mask.shape[1:], dtype=dtype), []
    for view in range(2):
        for i, (height, width) in enumerate(sizes):
            batch[len(targets), :, :height, :width] = (
                torch.from_numpy(case.z[f"view{view + 1}_{i}_q32"]).to(dtype) / 32
            )
            boxes = torch.from_numpy(case.z[f"boxes{i}_xyxy"][view]).to(dtype)
            targets.append(
                {
                    "boxes": box_xyxy_to_cxcywh(boxes) / torch.tensor([width, height] * 2),
                    "labels": torch.ones(len(boxes), dtype=torch.int64),
                    "patches": torch.from_numpy(case.z[f"crops{i}_v{view + 1}_q32"]).to(dtype) / 32,
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
    z, prefix = case.z, f"out_v{direction}/"
    chosen = z[f"{prefix}aux_query_idx"]
    for name, layer in [
        ("", outputs),
        *((f"aux{i}/", aux) for i, aux in enumerate(outputs["aux_outputs"])),
    ]:
        close(
            layer["pred_logits"][mine][:, chosen if name else slice(None)],
            z[f"{prefix}{name}pred_logits"],
            atol=1e-4,
        )
        close(layer["pred_boxes"][mine], z[f"{prefix}{name}pred_boxes"], atol=1e-5)
    features = z[f"{prefix}pred_feature"]
    ours = outputs["pred_features"][mine][..., : features.shape[-1]]
    close(ours if features.shape[1] == ours.shape[1] else ours[:, chosen], features, atol=1e-4)
    true = z[f"{prefix}gt_feature"]
    close(
        outputs["target_features"].chunk(2)[1 if direction == 1 else 0][:, : true.shape[1]],
        true,
        atol=2e-4,
    )
    for i, target in enumerate(targets[mine]):
        close(target["boxes"], z[f"targets_v{direction}/boxes{i}"], atol=1e-6)
    layers = [f"aux{layer}" for layer in range(len(outputs["aux_outputs"]))] + ["last"]
    for name, per_image in zip(layers, losses.matches.pairs, strict=True):
        for i, (query, target) in enumerate(per_image[mine]):
            assert np.array_equal(
                np.stack([query, target]), z[f"match_v{direction}/{name}/img{i}"]
            ), (
                direction,
                name,
                i,
            )


def gradient_norms(case: Case) -> dict[str, float]:
    """By published names: those of the two halves of Deformable DETR's queries, and of heads that all layers share."""
    norms = {}
    for name, p in case.model.named_parameters():
        if p.requires_grad:
            name, gradient = name.removeprefix("detector."), p.grad.double()
            for part in ("class_embed.", "bbox_embed.", "feature_align."):
                if name.startswith(part):
                    name = f"pred_head.{part}{name.removeprefix(part).removeprefix('0.')}"
            if (
                name == "query_embed.weight"
                and "transformer.tgt_embed.weight" in case.js["state_dict"]
            ):
                gradient, content = gradient.chunk(2, dim=1)
                norms["transformer.tgt_embed.weight"] = float(content.norm())
            norms[name] = float(gradient.norm())
    return norms


def check_gradients(case: Case, expected: np.ndarray, rtol: float) -> None:
    ours = gradient_norms(case)
    assert set(ours) == set(case.js["grad_names"])
    values = np.array([ours[name] for name in case.js["grad_names"]])
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=1e-6 * expected.max())


def check_mode(
    case: Case, training: bool, dtype: torch.dtype, expected: dict, rtol: float
) -> tuple[dict, Losses]:
    """Losses of one pass, whose gradients are computed in float32."""
    case.model.train(training).zero_grad()
    samples, targets = inputs(case, dtype)
    outputs = case.model(samples, targets)
    losses = case.criterion(outputs, targets)
    assert set(losses) - set(expected) == {"projection_std"}
    for name, value in expected.items():
        logged = "error" in name  # float32 in the published code
        close(
            losses[name], value, rtol=1e-6 if logged else rtol, atol=1e-9 if rtol < 1e-7 else 1e-6
        )
    close(
        case.criterion.total_loss(losses),
        sum(expected[name] * weight for name, weight in case.js["weight_dict"].items()),
        rtol=rtol,
    )
    if dtype == torch.float32:
        case.criterion.total_loss(losses).backward()
    return outputs, losses


def check_float32(case: Case) -> None:
    """Outputs, matching, losses and gradients with running statistics in the heads, then with those of the batch."""
    js, z = case.js, case.z
    assert js["weight_dict"] == case.criterion.weight_dict
    assert (
        sum(p.numel() for p in case.model.parameters() if p.requires_grad) == js["trainable_params"]
    )
    case.criterion.train()
    outputs, losses = check_mode(case, False, torch.float32, js["eval"]["losses"], 1e-5)
    targets = inputs(case, torch.float32)[1]
    for direction in (1, 2):
        check_direction(case, outputs, losses, targets, direction)
    half = len(targets) // 2
    close(outputs["projections"][:half], z["mid/enc_head.0.projector"], atol=1e-4)
    close(outputs["predictions"][:half], z["mid/enc_head.0.predictor"], atol=1e-4)
    check_gradients(case, z["grad_norms"], rtol=5e-3)
    check_mode(case, True, torch.float32, js["train"]["losses"], 1e-5)
    check_gradients(case, z["train_grad_norms"], rtol=5e-3)
    state = case.model.state_dict()
    for name, total in js["bn_running_after_train_sum"].items():
        close(state[name].double().sum(), total, rtol=1e-4, atol=1e-4)


def check_float64(case: Case) -> None:
    """Losses in float64, where tolerances are those of rounding alone, with the statistics of the batch."""
    case.model.double()
    case.criterion.double().train()
    with torch.no_grad():
        check_mode(case, True, torch.float64, case.js["float64"]["train_losses"], 1e-9)


def check_steps(case: Case) -> None:
    """Steps of the optimiser at a hundredth of the rate, in training mode, with the same disturbance: the losses before
    the first two.
    """
    args, (samples, targets) = case.args, inputs(case, torch.float32)
    case.model.train(), case.criterion.train()
    optimizer = build_optimizer(
        case.model,
        args.lr * 0.01,
        args.lr_backbone,
        case.js["adamw"]["weight_decay"],
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
    )
    for expected in case.js["adamw_lr_x0.01"]["step_losses"][:2]:
        total = case.criterion.total_loss(case.criterion(case.model(samples, targets), targets))
        close(total, expected, rtol=1e-4)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), case.js["adamw"]["clip_max_norm"])
        optimizer.step()


def check_data(name: str, js: dict, z: dict, folder: Path) -> None:
    """Views, their pixels, regions in both, random regions, the picked ones, and disturbed boxes."""
    image = Image.fromarray(z["image_uint8"].repeat(4, 0).repeat(4, 1))
    for number, case in enumerate(js["two_view"]["cases"]):
        views = draw_views(
            SampleRNG.from_seeds(python=case["seed"]),
            (240, 320),
            0.5,
            case["views_bbox_stochastic"],
        )
        assert views.size == tuple(case["view_size_h_w"])
        close(views.overlap_xyxy_abs, case["inter_raw"], rtol=1e-9)
        for side, view in ((1, views.first), (2, views.second)):
            close(np.array(view), case[f"crop{side}_top_left_h_w"], rtol=1e-9)
            close(
                views.image_to_view(views.overlap_xyxy_abs, view),
                case[f"inter_view{side}"],
                rtol=1e-9,
                atol=1e-9,
            )
            assert np.array_equal(
                np.asarray(crop_view(image, view, views.size))[::8, ::8],
                z[f"view{side}_{number}_stride8"],
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
            close(regions[side], case[f"anchors_view{side + 1}"], atol=1e-4)
            close(random[side], np.array(proposed[f"view{side + 1}"])[right], atol=1e-4)
            if picked is not None:
                close(picked[side], case[f"picked_view{side + 1}"], atol=1e-4)
    boxes, normals = (
        torch.from_numpy(z["disturb/boxes_xyxy"]),
        torch.from_numpy(z["disturb/normals"]),
    )
    close(jitter_boxes(boxes, normals, 0.1), z["disturb/out_ratio0.1_h90_w110"], rtol=1e-6)


CHECKS = {"data_siamese": check_data}
