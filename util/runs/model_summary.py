"""Summary of a model: parameters, multiply-adds, kernels, and the published figures to compare with."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util.bf16 import AMP_DTYPES, log_bf16
from util.errors import UserError
from util.logger import log
from util.nested_tensor import NestedTensor
from util.settings import Settings

# (detector, backbone, DC5, feature levels) -> (parameters in M, multiply-adds in G), as published by DETR, Conditional
# DETR and Deformable DETR for validation images of COCO with a short side of 800 pixels.
PUBLISHED: dict[tuple[str, str, bool, int], tuple[int, int]] = {
    ("detr", "resnet50", False, 1): (41, 86),
    ("detr", "resnet50", True, 1): (41, 187),
    ("detr", "resnet101", False, 1): (60, 152),
    ("detr", "resnet101", True, 1): (60, 253),
    ("conditional_detr", "resnet50", False, 1): (44, 90),
    ("conditional_detr", "resnet50", True, 1): (44, 195),
    ("conditional_detr", "resnet101", False, 1): (63, 156),
    ("conditional_detr", "resnet101", True, 1): (63, 262),
    ("deformable_detr", "resnet50", False, 1): (34, 78),
    ("deformable_detr", "resnet50", True, 1): (34, 128),
    ("deformable_detr", "resnet50", False, 4): (40, 173),
}

# The architecture that these figures are for.
PUBLISHED_SETTINGS = {
    "hidden_dim": 256,
    "nheads": 8,
    "enc_layers": 6,
    "dec_layers": 6,
    "pre_norm": False,
}
PUBLISHED_DIM_FEEDFORWARD = {"deformable_detr": 1024}  # 2048 elsewhere
PUBLISHED_NUM_QUERIES = {"detr": 100}  # 300 elsewhere

# One bilinear sample and its weighted sum (Deformable DETR, Zhu et al. 2021, appendix A.1).
MULTIPLY_ADDS_PER_SAMPLE = 5


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (all parameters, trainable parameters). Shared ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _sampling_flops(value_shape, grid_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, channels = value_shape[:2]  # value [N, C, H, W], grid [N, P, Q, 2], N = B * heads
    return 2 * MULTIPLY_ADDS_PER_SAMPLE * batch * channels * grid_shape[1] * grid_shape[2]


def count_multiply_adds(detector: nn.Module, height: int, width: int) -> int:
    """Return the multiply-adds of `detector` for one image [3, height, width] without padding.

    With a mask head, the masks of all queries are included.

    Counts convolutions, matrix products and attention, and 5 per sampled value in deformable attention. Norms,
    activations and sums are not counted, as in published figures.

    A copy of the network runs on the meta device: nothing is computed, no memory is allocated, and neither the network
    nor a random state changes.
    """
    # PyTorch does not count grid_sample by itself.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: _sampling_flops}
    )
    network = _to_meta(detector).eval()
    # SDPBackend.MATH splits attention into matrix products, which every version of the counter knows.
    with torch.no_grad(), torch.device("meta"), counter, sdpa_kernel(SDPBackend.MATH):
        mask = torch.zeros((1, height, width), dtype=torch.bool)
        outputs = network(NestedTensor(torch.empty(1, 3, height, width), mask, padded=False))
        if hasattr(network, "mask_head"):
            outputs["pred_masks"]  # computed when it is read
    return counter.get_total_flops() // 2  # one multiply-add is two operations


def _to_meta(module: nn.Module) -> nn.Module:
    """Return a copy on the meta device. Shared parameters stay shared."""
    # deepcopy takes what is in its memo instead of copying: here the weights are never copied.
    memo = {
        id(tensor): torch.empty_like(tensor, device="meta")
        for tensor in [*module.parameters(), *module.buffers()]
    }
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        if hasattr(part, "implementation"):
            part.implementation = "pytorch"  # a GPU kernel would be invisible to the counter
    return copied


def evaluation_size(settings: Settings) -> tuple[int, int]:
    """Return (height, width) of a 4:3 image at the run's evaluation size: 800 x 1066 by default."""
    width = int(settings.image_size * 4 / 3)
    if settings.max_size and width > settings.max_size:
        return round(settings.max_size * 3 / 4), settings.max_size
    return settings.image_size, width


def published_figures(settings: Settings) -> tuple[int, int] | None:
    """Return (parameters in M, multiply-adds in G) of the published detector with this architecture, or None."""
    wanted = {
        **PUBLISHED_SETTINGS,
        "dim_feedforward": PUBLISHED_DIM_FEEDFORWARD.get(settings.detector, 2048),
        "num_queries": PUBLISHED_NUM_QUERIES.get(settings.detector, 300),
    }
    if settings.with_box_refine or settings.two_stage or settings.masks:
        return None
    if any(getattr(settings, name) != value for name, value in wanted.items()):
        return None
    return PUBLISHED.get(
        (settings.detector, settings.backbone, settings.dilation, settings.num_feature_levels)
    )


def log_model_summary(model: nn.Module, settings: Settings) -> dict[str, object]:
    """Log what is trained, its size and its kernels. Return the same, to be stored with the run.

    `multiply_adds` are those of the detector for an image of `multiply_adds_hw`, or None if they can't be counted.
    `kernels` are the implementations of attention, see `Detector.kernels`.
    """
    total, trainable = count_parameters(model)
    detector = model.base_detector()
    pretext_only = total - count_parameters(detector)[0]
    name = f"{settings.pretext} on {settings.detector}" if settings.pretext else settings.detector
    if settings.masks:
        name = f"{name} with a mask head"
    from_checkpoint = settings.resume or settings.pretrain or settings.frozen_weights
    log.info(
        "model: %s, backbone %s (%s batch norm, weights: %s): %s parameters, %s trainable; device %s, amp %s",
        name,
        settings.backbone,
        settings.backbone_norm,
        "checkpoint" if from_checkpoint else settings.backbone_weights,
        f"{total:,}",
        f"{trainable:,}",
        settings.device,
        settings.amp,
    )
    if pretext_only:
        log.info("  %s of these belong to the pretext; fine-tuning drops them", f"{pretext_only:,}")

    device = torch.device(settings.device)
    log_bf16(device, settings.amp == "bf16")
    dtype = AMP_DTYPES[settings.amp] or torch.float32
    kernels = detector.kernels(device, dtype)
    if kernels:
        log.info(
            "  %s", "; ".join(f"{operation}: {kernel}" for operation, kernel in kernels.items())
        )

    height, width = evaluation_size(settings)
    multiply_adds = _multiply_adds_or_none(detector, height, width)
    if multiply_adds is not None:
        log.info(
            "  %s for an image of %d x %d%s%s",
            _format_multiply_adds(multiply_adds),
            height,
            width,
            f" with the masks of all {detector.num_queries} queries" if settings.masks else "",
            _format_published(settings),
        )
    _warn_random_backbone(settings, trainable)
    return {
        "parameters": total,
        "trainable": trainable,
        "of_the_pretext": pretext_only,
        "multiply_adds": multiply_adds,
        "multiply_adds_hw": [height, width],
        "kernels": kernels,
    }


def _warn_random_backbone(settings: Settings, trainable: int) -> None:
    """Warn about settings that train, but learn little, because the backbone has random weights."""
    random_weights = settings.backbone_weights == "none" and not settings.resume
    if settings.object_embedding_loss and random_weights:
        log.warning(
            "--object_embedding_loss with --backbone_weights none: the target embeddings are those of a random network"
        )
    if settings.backbone_norm == "live" and trainable and settings.lr_backbone <= 0:
        log.warning(
            "the backbone has random weights and is frozen: its features will hardly tell images apart; "
            "give --backbone_weights or train it (--lr_backbone above 0, no --fre_cnn)"
        )


def _multiply_adds_or_none(detector: nn.Module, height: int, width: int) -> int | None:
    try:
        return count_multiply_adds(detector, height, width)
    except (RuntimeError, TypeError, ValueError, AttributeError, UserError) as error:
        # A number in the log must not end a run. A custom backbone may do what the meta device can't follow.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        log.info("  multiply-adds are not counted (%s)", reason)
        return None


def _format_multiply_adds(count: int) -> str:
    if count >= 1e8:
        return f"{count / 1e9:.1f} G multiply-adds"
    return f"{count / 1e6:.1f} M multiply-adds"


def _format_published(settings: Settings) -> str:
    figures = published_figures(settings)
    if figures is None:
        return ""
    parameters, multiply_adds = figures
    return (
        f" (published: {parameters} M parameters, {multiply_adds} G at a short side of 800 pixels)"
    )
