"""What a run trains, in numbers: parameters, those that train, multiply-adds, and the published figures beside them."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util.errors import UserError
from util.logger import log
from util.nested_tensor import NestedTensor
from util.settings import Settings

# (detector, backbone, DC5, feature levels) -> (parameters in millions, multiply-adds in G), as DETR, Conditional DETR
# and Deformable DETR publish them, for validation images of COCO with a short side of 800.
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
PUBLISHED_SIZES = {
    "hidden_dim": 256,
    "nheads": 8,
    "enc_layers": 6,
    "dec_layers": 6,
    "pre_norm": False,
}
PUBLISHED_WIDTHS = {"deformable_detr": 1024}  # of the feed-forward networks; 2048 elsewhere
PUBLISHED_QUERIES = {"detr": 100}  # 300 elsewhere
MULTIPLY_ADDS_PER_SAMPLE = (
    5  # multiply-adds of one bilinear sample and its weighted sum (Zhu et al. 2021, appendix A.1)
)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, those that train); shared ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _sampling_flops(value_shape, grid_shape, *_args, out_shape=None, **_kwargs) -> int:
    batch, channels = value_shape[:2]
    return 2 * MULTIPLY_ADDS_PER_SAMPLE * batch * channels * grid_shape[1] * grid_shape[2]


def count_multiply_adds(detector: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of `detector` on one image [3, height, width] without padding: convolutions, matrix products and
    attention, and for deformable attention 5 for each sampled value. Norms, activations and sums are not counted, as in
    published figures.

    Nothing is computed and no memory is used: a copy of the network runs on the meta device. The network itself and
    random states stay as they are.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: _sampling_flops}
    )
    network = _on_meta(detector).eval()
    # Attention by matrix products, which every version of the counter knows.
    with torch.no_grad(), torch.device("meta"), counter, sdpa_kernel(SDPBackend.MATH):
        mask = torch.zeros((1, height, width), dtype=torch.bool)
        network(NestedTensor(torch.empty(1, 3, height, width), mask, padded=False))
    return counter.get_total_flops() // 2


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and types only; shared ones stay shared."""
    tensors = {
        id(tensor): torch.empty_like(tensor, device="meta")
        for tensor in [*module.parameters(), *module.buffers()]
    }
    copied = copy.deepcopy(module, tensors)
    for part in copied.modules():
        if hasattr(
            part, "implementation"
        ):  # a kernel of a GPU, whose plain counterpart can be counted
            part.implementation = "pytorch"
    return copied


def evaluation_size(settings: Settings) -> tuple[int, int]:
    """(height, width) of a 4:3 image at the run's evaluation size: 800 x 1066 unless given otherwise."""
    width = int(settings.image_size * 4 / 3)
    if settings.max_size and width > settings.max_size:
        return round(settings.max_size * 3 / 4), settings.max_size
    return settings.image_size, width


def published_figures(settings: Settings) -> tuple[int, int] | None:
    """(millions of parameters, G of multiply-adds) of the published detector with this architecture; None if there is
    none.
    """
    sizes = {
        **PUBLISHED_SIZES,
        "dim_feedforward": PUBLISHED_WIDTHS.get(settings.detector, 2048),
        "num_queries": PUBLISHED_QUERIES.get(settings.detector, 300),
    }
    if (
        settings.with_box_refine
        or settings.two_stage
        or any(getattr(settings, name) != value for name, value in sizes.items())
    ):
        return None
    return PUBLISHED.get(
        (settings.detector, settings.backbone, settings.dilation, settings.num_feature_levels)
    )


def log_model_summary(model: nn.Module, settings: Settings) -> dict[str, object]:
    """Logs what is trained, how large it is and which kernels run; returns the same, to be kept with the run.

    `multiply_adds` are those of the detector on an image of `multiply_adds_hw`, None where they can't be counted.
    `kernels` say what attention runs on, see `Detector.kernels`.
    """
    total, trainable = count_parameters(model)
    detector = model.base_detector()
    what = f"{settings.pretext} on {settings.detector}" if settings.pretext else settings.detector
    log.info(
        "%s, %s (%s batch norm, weights: %s): %s parameters, %s trainable; device %s, amp %s",
        what,
        settings.backbone,
        settings.backbone_norm,
        settings.backbone_weights,
        f"{total:,}",
        f"{trainable:,}",
        settings.device,
        settings.amp,
    )
    own = total - count_parameters(detector)[0]
    if own:
        log.info(
            "  of these %s parameters belong to the pretext; fine-tuning leaves them behind",
            f"{own:,}",
        )
    dtype = torch.bfloat16 if settings.amp == "bf16" else torch.float32
    kernels = detector.kernels(torch.device(settings.device), dtype)
    if kernels:
        log.info(
            "  %s", "; ".join(f"{operation}: {kernel}" for operation, kernel in kernels.items())
        )
    height, width = evaluation_size(settings)
    count = _multiply_adds_or_none(detector, height, width)
    if count is not None:
        log.info(
            "  %s for an image of %d x %d%s", _in_g(count), height, width, _published_text(settings)
        )
    if (
        settings.object_embedding_loss
        and settings.backbone_weights == "none"
        and not settings.resume
    ):
        log.warning(
            "--object_embedding_loss with --backbone_weights none: the embeddings to predict are those of a random "
            "network"
        )
    if settings.backbone_norm == "live" and trainable and settings.lr_backbone <= 0:
        log.warning(
            "the backbone has random weights and is frozen: its features will hardly tell images apart; "
            "give --backbone_weights or leave it trainable (--lr_backbone above 0, no --fre_cnn)"
        )
    return {
        "parameters": total,
        "trainable": trainable,
        "of_the_pretext": own,
        "multiply_adds": count,
        "multiply_adds_hw": [height, width],
        "kernels": kernels,
    }


def _multiply_adds_or_none(detector: nn.Module, height: int, width: int) -> int | None:
    """A number for people must not end a run: a backbone from elsewhere may do what shapes alone can't follow."""
    try:
        return count_multiply_adds(detector, height, width)
    except (RuntimeError, TypeError, ValueError, AttributeError, UserError) as error:
        log.info(
            "  multiply-adds are not counted (%s)",
            str(error).strip().split("\n")[0] or type(error).__name__,
        )
        return None


def _in_g(count: int) -> str:
    return (
        f"{count / 1e9:.1f} G multiply-adds"
        if count >= 1e8
        else f"{count / 1e6:.1f} M multiply-adds"
    )


def _published_text(settings: Settings) -> str:
    figures = published_figures(settings)
    return (
        ""
        if figures is None
        else f" (published: {figures[0]} M parameters, {figures[1]} G at a short side of 800)"
    )
