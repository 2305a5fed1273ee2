"""Synthetic checkpoints with the names and shapes of every published kind, built from the key lists of the code bases.

Small tensors hold random numbers; of large ones every number is the same, so that files stay small.
"""

import re
from argparse import Namespace

import torch
from torch import Tensor

from models import build_model
from tests.tiny import MODEL_FLAGS
from util.settings import FINETUNE, make_parser, resolve

SMALL = tuple(MODEL_FLAGS)
CHANNELS = {"resnet18": 512, "resnet50": 2048}


def shapes(detector: str, *flags: str, outputs: int = 91) -> dict[str, Tensor]:
    """The state dict, without memory, of a detector with `outputs` rows in its class head."""
    words = [
        "--detector",
        detector,
        "--classification",
        "focal",
        "--num_classes",
        str(outputs),
        "--backbone_weights",
        "none",
        *flags,
    ]
    args = resolve(
        make_parser(FINETUNE).parse_args([*words, "--backbone_norm", "frozen", "--device", "cpu"])
    )
    with torch.device("meta"):
        model = build_model(args)[0]
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    return {key: tensors[key] for key in model.state_dict()}


def parts(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights, and biases of as many rows, without memory."""
    made = {}
    for name, shape in names.items():
        made[f"{name}.weight"], made[f"{name}.bias"] = (
            torch.empty(size, device="meta") for size in (shape, shape[:1])
        )
    return made


def filled(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Numbers for tensors without memory, variances above 0; names that share a tensor go on sharing it."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if id(tensor) not in made:
            numbers = (
                torch.randn(tensor.shape if tensor.numel() < 20000 else 1, generator=generator) / 20
            )
            made[id(tensor)] = (
                numbers.abs() + 1 if key.endswith("running_var") else numbers
            ).expand(tensor.shape)
    return {key: made[id(tensor)] for key, tensor in state.items()}


def width(state: dict[str, Tensor]) -> int:
    return state["transformer.decoder.layers.0.norm1.weight"].shape[0]


def patch_parts(dim: int, channels: int, head: str = "") -> dict[str, Tensor]:
    align = f"{head}feature_align.layers."
    return parts(
        {"patch2query": (dim, channels), f"{align}0": (dim, dim), f"{align}1": (channels, dim)}
    )


def updetr(*flags: str, backbone: str = "resnet18") -> dict[str, Tensor]:
    """UP-DETR's pre-training: 2 classes and "no object", patch and feature projections."""
    state = shapes("detr", *flags, outputs=3)
    return {**state, **patch_parts(width(state), CHANNELS[backbone])}


def detreg(detector: str, *flags: str) -> dict[str, Tensor]:
    """DETReg's pre-training: COCO's class head and an embedding of 512 numbers."""
    state = shapes(detector, *flags, outputs=92 if detector == "detr" else 91)
    return {
        **state,
        **parts(
            {
                "feature_embed.layers.0": (width(state),) * 2,
                "feature_embed.layers.1": (512, width(state)),
            }
        ),
    }


def siamese(
    detector: str, *flags: str, channels: int = 512, baseline: bool = False
) -> dict[str, Tensor]:
    """Names of Siamese DETR's code base; `baseline` is its re-implementation of UP-DETR, without the global head."""
    head, state, named = (
        "head." if baseline else "pred_head.",
        shapes(detector, *flags, outputs=3),
        {},
    )
    dim = width(state)
    for key, value in state.items():
        indexed = re.match(r"(class_embed|bbox_embed)\.(?:(\d)\.)?(.+)", key)
        if indexed:
            named[f"{head}{indexed[1]}.{indexed[3]}"] = value
        elif key == "query_embed.weight" and detector == "deformable_detr":
            for name in ("query_embed.weight", "transformer.tgt_embed.weight"):
                named[name] = torch.empty(len(value), dim, device="meta")
        else:
            named[key.replace("backbone.0.body.", "backbone.")] = value
    named |= patch_parts(dim, channels, head)
    if not baseline:
        maps = (
            3 if "input_proj.1.0.weight" in state else 1
        )  # of the backbone, whose pooled memories are joined
        for name, layers, levels in (
            ("projector", (0, 3, 6), (1, 4, 7)),
            ("predictor", (0, 3), (1,)),
        ):
            own = f"enc_head.0.{name}.mlp."
            named |= parts(
                {
                    **{f"{own}{i}": (dim, dim) for i in layers},
                    **{f"{own}{i}": (dim,) for i in levels},
                }
            )
            for i in levels:
                named |= {
                    f"{own}{i}.{leaf}": torch.empty(dim, device="meta")
                    for leaf in ("running_mean", "running_var")
                }
                named[f"{own}{i}.num_batches_tracked"] = torch.empty((), device="meta")
        named["enc_head.0.projector.mlp.0.weight"] = torch.empty(dim, maps * dim, device="meta")
    named[f"{head}criterion.empty_weight"] = torch.empty(3, device="meta")
    return named


def siamese_file(state: dict[str, Tensor]) -> dict:
    """As mmcv saves it; the criterion's weights are those of every published config."""
    state = {
        key: torch.tensor([1.0, 1.0, 0.1]) if key.endswith("empty_weight") else value
        for key, value in filled(state).items()
    }
    return {
        "meta": {"epoch": 3, "iter": 300000},
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }


def masks() -> dict[str, Tensor]:
    """DETR with a mask head: the detector below `detr.`"""
    state = {f"detr.{key}": value for key, value in shapes("detr", *SMALL, outputs=251).items()}
    names = {
        "bbox_attention.q_linear": (32, 32),
        "bbox_attention.k_linear": (32, 32),
        "mask_head.out_lay": (1, 2, 3, 3),
    }
    names |= {f"mask_head.lay{i}": (8, 8, 3, 3) for i in range(1, 6)} | {
        f"mask_head.gn{i}": (8,) for i in range(1, 6)
    }
    return {
        **state,
        **parts({**names, **{f"mask_head.adapter{i}": (8, 8, 1, 1) for i in range(1, 4)}}),
    }


def settings(**more) -> Namespace:
    """The settings that all published code bases store, as they store them."""
    return Namespace(
        lr=1e-4,
        seed=7,
        backbone="resnet18",
        dilation=False,
        nheads=4,
        position_embedding="sine",
        masks=False,
        **more,
    )


def published_files() -> dict[str, dict]:
    """Name of a published kind -> content of such a file, with a small detector."""
    both = ("--with_box_refine", "--two_stage")
    return {
        "detr": {"model": filled(shapes("detr", *SMALL, outputs=92))},
        "conditional": {
            "model": filled(shapes("conditional_detr", *SMALL)),
            "args": settings(),
            "epoch": 49,
        },
        "masks": {"model": filled(masks())},
        "updetr": {
            "model": filled(updetr(*SMALL, "--pre_norm")),
            "args": settings(num_patches=10),
            "epoch": 59,
        },
        "updetr finetuned": {
            "model": filled(shapes("detr", *SMALL, "--pre_norm", outputs=92)),
            "args": settings(pretrain="up.pth"),
        },
        "detreg detr": {
            "model": filled(detreg("detr", *SMALL, "--pre_norm")),
            "args": settings(object_embedding_loss=True),
        },
        "siamese detr": siamese_file(siamese("detr", *SMALL)),
        "siamese conditional": siamese_file(siamese("conditional_detr", *SMALL)),
        "siamese updetr": siamese_file(siamese("conditional_detr", *SMALL, baseline=True)),
        "deformable": {
            "model": filled(shapes("deformable_detr", *SMALL)),
            "args": settings(num_feature_levels=4),
        },
        "deformable two-stage": {
            "model": filled(shapes("deformable_detr", *SMALL, *both)),
            "args": settings(num_queries=20),
        },
        "detreg": {
            "model": filled(detreg("deformable_detr", *SMALL)),
            "args": settings(object_embedding_loss=True),
        },
        "siamese deformable": siamese_file(siamese("deformable_detr", *SMALL, channels=896)),
        "siamese single scale": siamese_file(
            siamese("deformable_detr", *SMALL, "--num_feature_levels", "1")
        ),
    }
