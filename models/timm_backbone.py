"""Any convolutional feature extractor of timm, as `timm:NAME`."""

from typing import Any

import torch
from torch import nn

from models.backbone import Body
from util.checkpoints.backbone_weights import backbone_normalization
from util.errors import UserError


def build(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> Body:
    """`timm:NAME`; maps of timm that come as [B, h, w, C] are said to be so."""
    full_name, name = name, name.removeprefix("timm:")
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError as error:
        raise UserError(
            f"--backbone timm:{name} needs the package timm: pip install timm ({error})"
        ) from error
    stride: dict[str, Any] = {"output_stride": 16} if dilation else {}
    try:
        body: Any = timm.create_model(name, pretrained=False, features_only=True, **stride)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise UserError(
            f"--backbone timm:{name}: timm can't build it as a feature extractor ({error})"
        ) from error
    levels = len(body.feature_info)
    # Stage 4 is the last map, stage 1 the fourth from the end: strides 32, 16, 8, 4 as in a ResNet.
    indices = [levels - 5 + stage for stage in stages]
    body = timm.create_model(
        name, pretrained=False, features_only=True, out_indices=indices, **stride
    )
    if norm == "frozen":
        body = freeze_batch_norm_2d(body)
    _probe(body, name)
    early = _up_to_stride_4(body, [name for name, _ in body.named_parameters()])
    channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
    strides, channels = list(body.feature_info.reduction()), list(body.feature_info.channels())
    mean, std = backbone_normalization(full_name)
    return Body(
        body,
        strides=strides,
        num_channels=channels,
        mean=mean,
        std=std,
        early=early,
        channels_last=channels_last,
    )


@torch.no_grad()
def _probe(body: nn.Module, name: str) -> None:
    """Detectors see images of any size; some networks of timm are made for one.

    Raises:
        UserError: the network refuses an image of another size.
    """
    training = body.training
    try:
        body.eval()(torch.zeros(1, 3, 96, 160))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--backbone timm:{name} can't read images of any size ({reason}): choose a convolutional one"
        ) from error
    body.train(training)


def _up_to_stride_4(body: Any, names: list[str]) -> set[str]:
    """Parameters of a timm extractor up to the end of its last map of stride 4 or less."""
    infos = [info for info in body.feature_info.info if info["reduction"] <= 4]
    if not infos:
        return set()
    module = infos[-1]["module"].replace(".", "_")
    inside = [i for i, name in enumerate(names) if name.replace(".", "_").startswith(module + "_")]
    return set(names[: max(inside) + 1]) if inside else set()
