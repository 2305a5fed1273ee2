"""Checks of single parts of a model: positional encodings, box operations, matching, losses, post-processing."""

from pathlib import Path

import numpy as np
import torch

from models.classification import Classification, inverse_sigmoid, sigmoid_focal_loss
from models.deformable_transformer import (
    DeformableAttention,
    DeformableMemory,
    encoder_reference_points,
    initial_proposals,
    sine_embed_boxes,
    valid_size_wh,
)
from models.matcher import HungarianMatcher
from models.ms_deform_attn import ms_deform_attn
from models.position_encoding import SinePositionEncoding, sine_embed_points
from models.postprocess import PostProcess
from tests.golden_models import assert_close
from util.box_ops import box_iou, box_xyxy_to_cxcywh, generalized_box_iou


def check_matcher(meta: dict, arrays: dict, kind: str) -> None:
    section = meta[f"matcher_{kind}"]
    for case in section["cases"]:
        prefix = f"matcher_{kind}/{case}"
        logits = torch.from_numpy(arrays[f"{prefix}/pred_logits"])
        boxes = torch.from_numpy(arrays[f"{prefix}/pred_boxes"])
        classes = logits.shape[-1] - (kind == "softmax")
        matcher = HungarianMatcher(Classification(kind, classes, **section["weights"]))
        targets = [
            {
                "labels": torch.from_numpy(arrays[f"{prefix}/labels{i}"]),
                "boxes": torch.from_numpy(arrays[f"{prefix}/boxes{i}"]),
            }
            for i in range(2)
        ]
        matches = matcher(logits[None], boxes[None], targets)
        for i, pair in enumerate(matches.pairs[0]):
            assert np.array_equal(np.stack(pair), arrays[f"{prefix}/match{i}"]), (
                f"{prefix} image {i}"
            )


def check_detr(name: str, meta: dict, arrays: dict, folder: Path) -> None:
    mask = torch.from_numpy(arrays["pos/mask"])
    assert_close(SinePositionEncoding(256)(mask), arrays["pos/sine_normalize"], atol=1e-5)
    assert_close(
        SinePositionEncoding(32, normalize=False)(mask), arrays["pos/sine_unnormalized"], atol=1e-5
    )
    a, b = torch.from_numpy(arrays["box/a_xyxy"]), torch.from_numpy(arrays["box/b_xyxy"])
    iou, union = box_iou(a, b)
    assert_close(iou, arrays["box/iou"], rtol=1e-6, atol=1e-7)
    assert_close(union, arrays["box/union"], rtol=1e-6)
    assert_close(generalized_box_iou(a, b), arrays["box/giou"], rtol=1e-6, atol=1e-6)
    assert_close(box_xyxy_to_cxcywh(a), arrays["box/a_cxcywh"], rtol=1e-6)
    check_matcher(meta, arrays, "softmax")
    x, t = torch.from_numpy(arrays["loss/x"]), torch.from_numpy(arrays["loss/t"])
    boxes = meta["loss"]["num_boxes"]
    assert_close(
        sigmoid_focal_loss(x, t).mean(1).sum() / boxes, meta["loss"]["sigmoid_focal"], rtol=1e-6
    )
    assert_close(
        sigmoid_focal_loss(x, t, alpha=-1).mean(1).sum() / boxes,
        meta["loss"]["sigmoid_focal_alpha_neg"],
        rtol=1e-6,
    )


def check_conditional(name: str, meta: dict, arrays: dict, folder: Path) -> None:
    assert_close(
        sine_embed_points(torch.from_numpy(arrays["sineembed/pos"]), 256),
        arrays["sineembed/out"],
        atol=1e-5,
    )
    assert_close(
        inverse_sigmoid(torch.from_numpy(arrays["inverse_sigmoid/x"])),
        arrays["inverse_sigmoid/out"],
        rtol=1e-6,
        atol=1e-6,
    )
    check_matcher(meta, arrays, "focal")
    logits, boxes = torch.from_numpy(arrays["post/logits"]), torch.from_numpy(arrays["post/boxes"])
    post = PostProcess(Classification("focal", logits.shape[-1], cost_class=2.0))
    for i, result in enumerate(
        post(
            {"pred_logits": logits, "pred_boxes": boxes},
            torch.from_numpy(arrays["post/target_sizes"]),
        )
    ):
        assert_close(result["scores"], arrays[f"post/img{i}/scores"], rtol=1e-6)
        assert np.array_equal(result["labels"].numpy(), arrays[f"post/img{i}/labels"])
        assert_close(result["boxes"], arrays[f"post/img{i}/boxes"], rtol=1e-5, atol=1e-4)


def check_updetr(name: str, meta: dict, arrays: dict, folder: Path) -> None:
    """Check query groups against the published mask, except rows that its loop, which ends too early, leaves empty."""
    for key, entry in meta["attention_mask"].items():
        queries, patches = map(int, key.split("_"))
        block = np.arange(queries) // (queries // patches)
        ours, published = block[:, None] == block, arrays[f"attention_mask/{key}_allowed"]
        filled = published.any(1)
        assert (~filled).sum() == entry["rows_without_any_allowed"]
        assert np.array_equal(ours[filled], published[filled])


def check_deformable(name: str, meta: dict, arrays: dict, folder: Path) -> None:
    """Check shifted positions, deformable attention with gradients, initial offsets, references and proposals."""
    mask = torch.from_numpy(arrays["pos/mask"])
    assert_close(
        SinePositionEncoding(256, shift=0.5)(mask), arrays["pos/sine_normalize"], atol=1e-5
    )
    assert_close(
        SinePositionEncoding(32, normalize=False)(mask), arrays["pos/sine_unnormalized"], atol=1e-5
    )
    value, locations, weights = (
        torch.from_numpy(arrays[f"msda/{part}"]).requires_grad_()
        for part in ("value", "sampling_locations", "attention_weights")
    )
    out = ms_deform_attn(
        value,
        [tuple(shape) for shape in arrays["msda/spatial_shapes"].tolist()],
        locations,
        weights,
        "pytorch",
    )
    assert_close(out, arrays["msda/output"], rtol=1e-5, atol=1e-6)
    out.backward(torch.from_numpy(arrays["msda/grad_output"]))
    for part, tensor in (
        ("value", value),
        ("sampling_locations", locations),
        ("attention_weights", weights),
    ):
        assert_close(tensor.grad, arrays[f"msda/grad_{part}"], rtol=1e-4, atol=1e-5)
    for levels in (1, 4):
        attention = DeformableAttention(256, num_heads=8, num_levels=levels, num_points=4)
        attention.reset_parameters()
        assert_close(
            attention.sampling_offsets.bias,
            arrays[f"init/sampling_offsets_bias_d256_l{levels}_h8_p4"],
            atol=1e-6,
        )
    assert_close(
        sine_embed_boxes(torch.from_numpy(arrays["proposal_pos/x"]).sigmoid(), 256),
        arrays["proposal_pos/out"],
        atol=1e-5,
    )
    check_proposals(arrays)


def check_proposals(arrays: dict) -> None:
    shapes = [tuple(shape) for shape in arrays["proposals/shapes"].tolist()]
    padding = torch.from_numpy(arrays["proposals/mask_flat"])
    masks = [
        x.unflatten(1, shape)
        for x, shape in zip(padding.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ]
    memory = DeformableMemory(
        [],
        tokens=torch.zeros(0),
        position=torch.zeros(0),
        padding_mask=padding,
        shapes=shapes,
        projected_map=torch.zeros(0),
        sizes_wh=torch.tensor([(float(w), float(h)) for h, w in shapes]),
        valid_sizes_wh=torch.stack([valid_size_wh(mask) for mask in masks], 1),
    )
    assert_close(memory.valid_ratios, arrays["valid_ratio/out"], rtol=1e-6)
    assert_close(encoder_reference_points(memory), arrays["enc_ref/out"], rtol=1e-6)
    logits, valid = initial_proposals(memory)
    assert np.array_equal(valid.numpy(), arrays["proposals/kept"])
    assert_close(logits, arrays["proposals/logit"], rtol=1e-5, atol=1e-6)


CHECKS = {
    "data_detr": check_detr,
    "data_cond": check_conditional,
    "data_deform": check_deformable,
    "data_updetr": check_updetr,
}
