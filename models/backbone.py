"""Feature extractors: torchvision ResNets with the published names, and any `timm:NAME`.

`Backbone(images [B, 3, H, W]) -> list of maps [B, C, h, w]`, with `strides` and `num_channels` of the maps and the `mean` and `std`
that its images are normalised with.
"""
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models._utils import IntermediateLayerGetter

from models.backbone_weights import backbone_normalization
from util.logger import UserError
from util.nested_tensor import NestedTensor

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


@dataclass
class FeatureMap:
    """tensor [B, C, h, w]; mask bool [B, h, w], True on padding; position [B, D, h, w] in the tensor's type."""

    tensor: Tensor
    mask: Tensor
    position: Tensor


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm whose statistics and affine are constants, in the type of its input: under autocast nothing is widened."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(1, -1, 1, 1) + shift.to(x.dtype).view(1, -1, 1, 1)


class LiveBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that trains, with the state-dict keys of the frozen one (no `num_batches_tracked`)."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", None)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args) -> None:
        # Without a version PyTorch would add a counter that this norm does not have, and then find it unexpected.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": self._version}, *args)


def _resnet_body(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> tuple[nn.Module, list[int], list[int]]:
    if dilation and name in ("resnet18", "resnet34"):
        raise UserError(f"--dilation needs a ResNet with bottleneck blocks, --backbone {name} has none: use resnet50 or resnet101")
    norm_layer = FrozenBatchNorm2d if norm == "frozen" else LiveBatchNorm2d
    resnet = getattr(torchvision.models, name)(
        weights=None, norm_layer=norm_layer, replace_stride_with_dilation=[False, False, dilation]
    )
    body = IntermediateLayerGetter(resnet, {f"layer{stage}": str(i) for i, stage in enumerate(stages)})
    width = 64 if name in ("resnet18", "resnet34") else 256
    channels = [width * 2 ** (stage - 1) for stage in stages]
    strides = [16 if dilation and stage == 4 else 2 ** (stage + 1) for stage in stages]
    return body, strides, channels


def _timm_body(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> tuple[nn.Module, list[int], list[int]]:
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError as error:
        raise UserError(f"--backbone timm:{name} needs the package timm: pip install timm ({error})") from error
    try:
        body = timm.create_model(name, pretrained=False, features_only=True, **({"output_stride": 16} if dilation else {}))
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise UserError(f"--backbone timm:{name}: timm can't build it as a feature extractor ({error})") from error
    levels = len(body.feature_info)
    # Stage 4 is the last map, stage 1 the fourth from the end: strides 32, 16, 8, 4 as in a ResNet.
    indices = [levels - 5 + stage for stage in stages]
    body = timm.create_model(
        name, pretrained=False, features_only=True, out_indices=indices, **({"output_stride": 16} if dilation else {})
    )
    if norm == "frozen":
        body = freeze_batch_norm_2d(body)
    _probe(body, name)
    return body, list(body.feature_info.reduction()), list(body.feature_info.channels())


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
        raise UserError(f"--backbone timm:{name} can't read images of any size ({reason}): choose a convolutional one") from error
    body.train(training)


class Backbone(nn.Module):
    """A feature extractor whose stem and first stage never train, as published.

    Args:
        name: `resnet18|34|50|101` or `timm:NAME`.
        norm: `frozen` (statistics and affine are constants) or `live` (needed where the weights are random).
        dilation: stride 16 in place of 32 in the last stage (DC5).
        stages: which of stages 1 to 4 are returned.
        trainable: False freezes everything (`--lr_backbone` of 0, `--fre_cnn`).
    """

    def __init__(
        self, name: str, norm: str = "frozen", dilation: bool = False, stages: tuple[int, ...] = (4,), trainable: bool = True
    ) -> None:
        super().__init__()
        if name in RESNETS:
            self.body, self.strides, self.num_channels = _resnet_body(name, norm, dilation, stages)
        elif name.startswith("timm:"):
            self.body, self.strides, self.num_channels = _timm_body(name.removeprefix("timm:"), norm, dilation, stages)
        else:
            raise UserError(f"--backbone {name} is unknown: use one of {', '.join(RESNETS)} or timm:NAME")
        self.name, self.norm = name, norm
        self.channels_last_maps = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.mean, self.std = backbone_normalization(name)
        self._freeze(trainable)

    def _freeze(self, trainable: bool) -> None:
        """With frozen norms only the later stages train; with live ones the whole backbone, since nothing in it is trained yet."""
        early = self._early_parameters() if self.norm == "frozen" else set()
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(trainable and name not in early)

    def _early_parameters(self) -> set[str]:
        names = [name for name, _ in self.body.named_parameters()]
        if self.name in RESNETS:
            return {name for name in names if not name.startswith(("layer2", "layer3", "layer4"))}
        return _up_to_stride_4(self.body, names)

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W], normalised with `mean` and `std`."""
        maps = self.body(images)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last_maps else maps


def _up_to_stride_4(body: nn.Module, names: list[str]) -> set[str]:
    """Parameters of a timm extractor up to the end of its last map of stride 4 or less."""
    infos = [info for info in body.feature_info.info if info["reduction"] <= 4]
    if not infos:
        return set()
    module = infos[-1]["module"].replace(".", "_")
    inside = [i for i, name in enumerate(names) if name.replace(".", "_").startswith(module + "_")]
    return set(names[: max(inside) + 1]) if inside else set()


class BackboneWithPositions(nn.Sequential):
    """`0`: the backbone, `1`: the position code, so that keys are those of the published checkpoints."""

    def forward(self, samples: NestedTensor) -> list[FeatureMap]:
        maps = []
        for tensor in self[0](samples.tensors):
            mask = resize_mask(samples.mask, tensor.shape[-2:])
            maps.append(FeatureMap(tensor, mask, self[1](mask).to(tensor.dtype)))
        return maps


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Padding mask [B, H, W] at another size [B, h, w], nearest neighbour by floor as published."""
    return functional.interpolate(mask[None].float(), size=tuple(size)).to(torch.bool)[0]
