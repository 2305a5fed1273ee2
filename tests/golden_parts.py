"""Checks of the model-side parts in the data cases: positions, box operations, matching corner cases, losses,
post-processing.
"""

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
from tests.golden_models import close
from util.box_ops import box_iou, box_xyxy_to_cxcywh, generalized_box_iou


def check_matcher(js: dict, z: dict, kind: str) -> None:
    section = js[f"matcher_{kind}"]
    for case in section["cases"]:
        prefix = f"matcher_{kind}/{case}"
        logits, boxes = (
            torch.from_numpy(z[f"{prefix}/pred_logits"]),
            torch.from_numpy(z[f"{prefix}/pred_boxes"]),
        )
        classes = logits.shape[-1] - (kind == "softmax")
        matcher = HungarianMatcher(Classification(kind, classes, **section["weights"]))
        targets = [
            {
                "labels": torch.from_numpy(z[f"{prefix}/labels{i}"]),
                "boxes": torch.from_numpy(z[f"{prefix}/boxes{i}"]),
            }
            for i in range(2)
        ]
        matches = matcher(logits[None], boxes[None], targets)
        for i, pair in enumerate(matches.pairs[0]):
            assert np.array_equal(np.stack(pair), z[f"{prefix}/match{i}"]), f"{prefix} image {i}"


def check_detr(name: str, js: dict, z: dict, folder: Path) -> None:
    mask = torch.from_numpy(z["pos/mask"])
    close(SinePositionEncoding(256)(mask), z["pos/sine_normalize"], atol=1e-5)
    close(SinePositionEncoding(32, normalize=False)(mask), z["pos/sine_unnormalized"], atol=1e-5)
    a, b = torch.from_numpy(z["box/a_xyxy"]), torch.from_numpy(z["box/b_xyxy"])
    iou, union = box_iou(a, b)
    close(iou, z["box/iou"], rtol=1e-6, atol=1e-7)
    close(union, z["box/union"], rtol=1e-6)
    close(generalized_box_iou(a, b), z["box/giou"], rtol=1e-6, atol=1e-6)
    close(box_xyxy_to_cxcywh(a), z["box/a_cxcywh"], rtol=1e-6)
    check_matcher(js, z, "softmax")
    x, t = torch.from_numpy(z["loss/x"]), torch.from_numpy(z["loss/t"])
    boxes = js["loss"]["num_boxes"]
    close(sigmoid_focal_loss(x, t).mean(1).sum() / boxes, js["loss"]["sigmoid_focal"], rtol=1e-6)
    close(
        sigmoid_focal_loss(x, t, alpha=-1).mean(1).sum() / boxes,
        js["loss"]["sigmoid_focal_alpha_neg"],
        rtol=1e-6,
    )


def check_conditional(name: str, js: dict, z: dict, folder: Path) -> None:
    close(
        sine_embed_points(torch.from_numpy(z["sineembed/pos"]), 256), z["sineembed/out"], atol=1e-5
    )
    close(
        inverse_sigmoid(torch.from_numpy(z["inverse_sigmoid/x"])),
        z["inverse_sigmoid/out"],
        rtol=1e-6,
        atol=1e-6,
    )
    check_matcher(js, z, "focal")
    logits, boxes = torch.from_numpy(z["post/logits"]), torch.from_numpy(z["post/boxes"])
    post = PostProcess(Classification("focal", logits.shape[-1], cost_class=2.0))
    for i, result in enumerate(
        post({"pred_logits": logits, "pred_boxes": boxes}, torch.from_numpy(z["post/target_sizes"]))
    ):
        close(result["scores"], z[f"post/img{i}/scores"], rtol=1e-6)
        assert np.array_equal(result["labels"].numpy(), z[f"post/img{i}/labels"])
        close(result["boxes"], z[f"post/img{i}/boxes"], rtol=1e-5, atol=1e-4)


def check_updetr(name: str, js: dict, z: dict, folder: Path) -> None:
    """Query groups see exactly what the published mask allows, where that is right (its loop ends early otherwise)."""
    for key, entry in js["attention_mask"].items():
        queries, patches = map(int, key.split("_"))
        block = np.arange(queries) // (queries // patches)
        ours, published = block[:, None] == block, z[f"attention_mask/{key}_allowed"]
        right = published.any(1)
        assert (~right).sum() == entry["rows_without_any_allowed"]
        assert np.array_equal(ours[right], published[right])


def check_deformable(name: str, js: dict, z: dict, folder: Path) -> None:
    """Shifted positions, deformable attention with its gradients, initial offsets, valid shares, references and
    proposals of cells.
    """
    mask = torch.from_numpy(z["pos/mask"])
    close(SinePositionEncoding(256, shift=0.5)(mask), z["pos/sine_normalize"], atol=1e-5)
    close(SinePositionEncoding(32, normalize=False)(mask), z["pos/sine_unnormalized"], atol=1e-5)
    value, locations, weights = (
        torch.from_numpy(z[f"msda/{part}"]).requires_grad_()
        for part in ("value", "sampling_locations", "attention_weights")
    )
    out = ms_deform_attn(
        value,
        [tuple(shape) for shape in z["msda/spatial_shapes"].tolist()],
        locations,
        weights,
        "pytorch",
    )
    close(out, z["msda/output"], rtol=1e-5, atol=1e-6)
    out.backward(torch.from_numpy(z["msda/grad_output"]))
    for part, tensor in (
        ("value", value),
        ("sampling_locations", locations),
        ("attention_weights", weights),
    ):
        close(tensor.grad, z[f"msda/grad_{part}"], rtol=1e-4, atol=1e-5)
    for levels in (1, 4):
        attention = DeformableAttention(256, num_heads=8, num_levels=levels, num_points=4)
        attention.reset_parameters()
        close(
            attention.sampling_offsets.bias,
            z[f"init/sampling_offsets_bias_d256_l{levels}_h8_p4"],
            atol=1e-6,
        )
    close(
        sine_embed_boxes(torch.from_numpy(z["proposal_pos/x"]).sigmoid(), 256),
        z["proposal_pos/out"],
        atol=1e-5,
    )
    check_cells(z)


def check_cells(z: dict) -> None:
    shapes = [tuple(shape) for shape in z["proposals/shapes"].tolist()]
    padding = torch.from_numpy(z["proposals/mask_flat"])
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
        sizes_wh=torch.tensor([(float(w), float(h)) for h, w in shapes]),
        valid_sizes_wh=torch.stack([valid_size_wh(mask) for mask in masks], 1),
    )
    close(memory.valid_ratios, z["valid_ratio/out"], rtol=1e-6)
    close(encoder_reference_points(memory), z["enc_ref/out"], rtol=1e-6)
    logits, valid = initial_proposals(memory)
    assert np.array_equal(valid.numpy(), z["proposals/kept"])
    close(logits, z["proposals/logit"], rtol=1e-5, atol=1e-6)


CHECKS = {
    "data_detr": check_detr,
    "data_cond": check_conditional,
    "data_deform": check_deformable,
    "data_updetr": check_updetr,
}
