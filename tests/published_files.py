"""Synthetic checkpoints with the parameter names and shapes of every published kind.

They are built from the key lists of the published codebases. Small tensors are random. Large ones repeat one random
number, so that the files stay small.
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
    """Return the state dict, on the meta device, of a detector with `outputs` rows in its class head."""
    words = [
        "--detector", detector, "--classification", "focal", "--num_classes", str(outputs),
        "--backbone_weights", "none", *flags, "--backbone_norm", "frozen", "--device", "cpu",
    ]  # fmt: skip
    args = resolve(make_parser(FINETUNE).parse_args(words))
    with torch.device("meta"):
        model = build_model(args)[0]
    # Parameters and buffers themselves, not state_dict's detached ones: shared tensors keep one id.
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    return {key: tensors[key] for key in model.state_dict()}


def linear_layers(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a weight of each shape, and a bias with as many rows, on the meta device."""
    state = {}
    for name, shape in sizes.items():
        state[f"{name}.weight"] = torch.empty(shape, device="meta")
        state[f"{name}.bias"] = torch.empty(shape[:1], device="meta")
    return state


def filled(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict from the meta device with random values. Shared tensors stay shared, variances are > 0."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if id(tensor) not in values:
            shape = tensor.shape if tensor.numel() < 20000 else 1
            numbers = torch.randn(shape, generator=generator) / 20
            if key.endswith("running_var"):
                numbers = numbers.abs() + 1
            values[id(tensor)] = numbers.expand(tensor.shape)
    return {key: values[id(tensor)] for key, tensor in state.items()}


def width(state: dict[str, Tensor]) -> int:
    return state["transformer.decoder.layers.0.norm1.weight"].shape[0]


def patch_layers(dim: int, channels: int, head: str = "") -> dict[str, Tensor]:
    """Return `patch2query` and `feature_align` of a pretext with query patches. `head` is the prefix of the heads."""
    align = f"{head}feature_align.layers."
    return linear_layers(
        {"patch2query": (dim, channels), f"{align}0": (dim, dim), f"{align}1": (channels, dim)}
    )


def updetr(*flags: str, backbone: str = "resnet18") -> dict[str, Tensor]:
    """Return UP-DETR's pre-training: 2 classes and "no object", and the layers for query patches."""
    state = shapes("detr", *flags, outputs=3)
    return {**state, **patch_layers(width(state), CHANNELS[backbone])}


def detreg(detector: str, *flags: str) -> dict[str, Tensor]:
    """Return DETReg's pre-training: COCO's class head and an object embedding of 512 dimensions."""
    state = shapes(detector, *flags, outputs=92 if detector == "detr" else 91)
    dim = width(state)
    embedding = {"feature_embed.layers.0": (dim, dim), "feature_embed.layers.1": (512, dim)}
    return {**state, **linear_layers(embedding)}


def siamese(
    detector: str, *flags: str, channels: int = 512, baseline: bool = False
) -> dict[str, Tensor]:
    """Return a pre-training with the names of Siamese DETR's codebase.

    baseline: its re-implementation of UP-DETR, which has no global head (`enc_head`).
    """
    head = "head." if baseline else "pred_head."
    state = shapes(detector, *flags, outputs=3)
    dim = width(state)
    renamed = {}
    for key, value in state.items():
        match = re.match(r"(class_embed|bbox_embed)\.(?:(\d)\.)?(.+)", key)
        if match:
            renamed[f"{head}{match[1]}.{match[3]}"] = value
        elif key == "query_embed.weight" and detector == "deformable_detr":
            for name in ("query_embed.weight", "transformer.tgt_embed.weight"):
                renamed[name] = torch.empty(len(value), dim, device="meta")
        else:
            renamed[key.replace("backbone.0.body.", "backbone.")] = value

    renamed |= patch_layers(dim, channels, head)
    if not baseline:
        # The global head concatenates the pooled memory of each backbone map.
        num_maps = 3 if "input_proj.1.0.weight" in state else 1
        renamed |= _global_head(dim, num_maps)
    renamed[f"{head}criterion.empty_weight"] = torch.empty(3, device="meta")
    return renamed


def _global_head(dim: int, num_maps: int) -> dict[str, Tensor]:
    state = {}
    for name, linears, norms in (("projector", (0, 3, 6), (1, 4, 7)), ("predictor", (0, 3), (1,))):
        mlp = f"enc_head.0.{name}.mlp."
        state |= linear_layers({f"{mlp}{i}": (dim, dim) for i in linears})
        state |= linear_layers({f"{mlp}{i}": (dim,) for i in norms})
        for i in norms:
            for leaf in ("running_mean", "running_var"):
                state[f"{mlp}{i}.{leaf}"] = torch.empty(dim, device="meta")
            state[f"{mlp}{i}.num_batches_tracked"] = torch.empty((), device="meta")
    state["enc_head.0.projector.mlp.0.weight"] = torch.empty(dim, num_maps * dim, device="meta")
    return state


def siamese_file(state: dict[str, Tensor]) -> dict:
    """Return the content of a file as mmcv saves it, with the criterion's weights of every published config."""
    state = {
        key: torch.tensor([1.0, 1.0, 0.1]) if key.endswith("empty_weight") else value
        for key, value in filled(state).items()
    }
    return {
        "meta": {"epoch": 3, "iter": 300000},
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }


def masks(*flags: str) -> dict[str, Tensor]:
    """Return DETR for panoptic data with a mask head: the detector is below `detr.`."""
    return shapes("detr", "--masks", *(flags or SMALL), outputs=251)


def settings(**more) -> Namespace:
    """Return the settings that all published codebases store, in their form."""
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


def _file(state: dict[str, Tensor], **entries) -> dict:
    return {"model": filled(state), **entries}


def published_files() -> dict[str, dict]:
    """Return the content of a file of each published kind, with a small detector, by the name of the kind."""
    two_stage = ("--with_box_refine", "--two_stage")
    return {
        "detr": _file(shapes("detr", *SMALL, outputs=92)),
        "conditional": _file(shapes("conditional_detr", *SMALL), args=settings(), epoch=49),
        "masks": _file(masks()),
        "updetr": _file(updetr(*SMALL, "--pre_norm"), args=settings(num_patches=10), epoch=59),
        "updetr finetuned": _file(
            shapes("detr", *SMALL, "--pre_norm", outputs=92), args=settings(pretrain="up.pth")
        ),
        "detreg detr": _file(
            detreg("detr", *SMALL, "--pre_norm"), args=settings(object_embedding_loss=True)
        ),
        "siamese detr": siamese_file(siamese("detr", *SMALL)),
        "siamese conditional": siamese_file(siamese("conditional_detr", *SMALL)),
        "siamese updetr": siamese_file(siamese("conditional_detr", *SMALL, baseline=True)),
        "deformable": _file(shapes("deformable_detr", *SMALL), args=settings(num_feature_levels=4)),
        "deformable two-stage": _file(
            shapes("deformable_detr", *SMALL, *two_stage), args=settings(num_queries=20)
        ),
        "detreg": _file(
            detreg("deformable_detr", *SMALL), args=settings(object_embedding_loss=True)
        ),
        "siamese deformable": siamese_file(siamese("deformable_detr", *SMALL, channels=896)),
        "siamese single scale": siamese_file(
            siamese("deformable_detr", *SMALL, "--num_feature_levels", "1")
        ),
    }
