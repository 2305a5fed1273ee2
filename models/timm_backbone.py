"""Any feature extractor of timm that reads images of any size, as `--backbone timm:NAME`."""

from typing import Any

import torch
from torch import nn

from models.backbone import Body
from models.timm_vit import build_vit, is_vit
from util.checkpoints.backbone_weights import backbone_normalization
from util.errors import UserError


def build(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> Body:
    """Build `timm:NAME`, see `models.backbone.Body`.

    Raises:
        UserError: timm is not installed, or cannot build this network as a feature extractor.
    """
    full_name, name = name, name.removeprefix("timm:")
    body = _create(name)
    from timm.layers import freeze_batch_norm_2d

    if is_vit(body):
        vit = build_vit(body, name, dilation, stages)
        if norm == "frozen":  # of hybrids
            vit.network = freeze_batch_norm_2d(vit.network)
        _check_any_image_size(vit.network, name, vit.strides[0])
        return vit

    # Stage 4 is the last map, stage 1 the fourth from the end: strides 32, 16, 8, 4 as in a ResNet.
    # Build again with these maps only, since timm then drops the layers after the last one.
    levels = len(body.feature_info)
    indices = [levels - 5 + stage for stage in stages]
    stride = {"output_stride": 16} if dilation else {}
    body = _create(name, out_indices=indices, **stride)
    if norm == "frozen":
        body = freeze_batch_norm_2d(body)
    _check_any_image_size(body, name, 16)

    mean, std = backbone_normalization(full_name)
    return Body(
        body,
        strides=list(body.feature_info.reduction()),
        num_channels=list(body.feature_info.channels()),
        mean=mean,
        std=std,
        early_names=_early_parameters(body, [key for key, _ in body.named_parameters()]),
        channels_last=str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC"),
    )


def _create(name: str, **options: Any) -> Any:
    """Build a feature extractor of timm.

    Raises:
        UserError: timm is not installed, or cannot build this network as a feature extractor.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--backbone timm:{name} needs the package timm: pip install timm ({error})"
        ) from error
    try:
        return timm.create_model(name, pretrained=False, features_only=True, **options)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise UserError(
            f"--backbone timm:{name}: timm can't build it as a feature extractor ({error})"
        ) from error


@torch.no_grad()
def _check_any_image_size(body: nn.Module, name: str, multiple: int) -> None:
    """Check that a network reads an image of an unusual size, 6 x 10 multiples; some are built for one size.

    Raises:
        UserError: it does not.
    """
    training = body.training
    try:
        body.eval()(torch.zeros(1, 3, 6 * multiple, 10 * multiple))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--backbone timm:{name} can't read images of any size ({reason}): choose a convolutional "
            "one or another vit_NAME"
        ) from error
    body.train(training)


def _early_parameters(body: Any, names: list[str]) -> set[str]:
    """Return the parameter names up to the end of the last map of stride 4 or less.

    That is stem and first stage of a ResNet.
    """
    infos = [info for info in body.feature_info.info if info["reduction"] <= 4]
    if not infos:
        return set()
    # Modules of a feature extractor have underscores where the names in `feature_info` have dots.
    module = infos[-1]["module"].replace(".", "_")
    inside = [i for i, name in enumerate(names) if name.replace(".", "_").startswith(module + "_")]
    return set(names[: max(inside) + 1]) if inside else set()
