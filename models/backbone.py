"""Feature extractors. A backbone is a file with a builder and a line in `util.settings.registry.BACKBONES`.

`Backbone(images [B, 3, H, W]) -> list of maps [B, C, h, w]`, with `strides` and `num_channels` of the maps and the
`mean` and `std` that its images are normalised with.
"""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from util.nested_tensor import NestedTensor
from util.settings.registry import BACKBONES, load, lookup


@dataclass
class FeatureMap:
    """tensor [B, C, h, w]; mask bool [B, h, w], True on padding; position [B, D, h, w] in the tensor's type."""

    tensor: Tensor
    mask: Tensor
    position: Tensor


@dataclass
class Body:
    """What a builder of the registry BACKBONES makes of (name, norm, dilation, stages).

    network: images [B, 3, H, W] -> maps of the asked stages, a list or a dict; names of its tensors are those of its
    weight files. strides, num_channels: of these maps. mean, std: what images are normalised with. early: names of the
    parameters that fine-tuning leaves alone (stem and first stage). channels_last: maps come as [B, h, w, C].
    """

    network: nn.Module
    _: KW_ONLY
    strides: list[int]
    num_channels: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    early: set[str]
    channels_last: bool = False


class Backbone(nn.Module):
    """A feature extractor. With frozen norms its stem and first stage never train, as published; with live ones all of
    it does.

    Args:
        name: a name of the registry, or `timm:NAME`.
        norm: `frozen` (statistics and affine are constants) or `live` (needed where the weights are random).
        dilation: stride 16 in place of 32 in the last stage (DC5).
        stages: which of stages 1 to 4 are returned.
        trainable: False freezes everything (`--lr_backbone` of 0, `--fre_cnn`).
    """

    def __init__(
        self,
        name: str,
        norm: str = "frozen",
        *,
        dilation: bool = False,
        stages: tuple[int, ...] = (4,),
        trainable: bool = True,
    ) -> None:
        super().__init__()
        family = name[: name.find(":") + 1] or name
        made: Body = load(lookup(BACKBONES, "--backbone", family))(name, norm, dilation, stages)
        self.body, self.strides, self.num_channels = made.network, made.strides, made.num_channels
        self.name, self.norm, self.mean, self.std = name, norm, made.mean, made.std
        self.channels_last_maps = made.channels_last
        self._freeze(trainable, made.early)

    def _freeze(self, trainable: bool, early: set[str]) -> None:
        """With frozen norms only the later stages train; with live ones the whole backbone, since nothing in it is
        trained yet.
        """
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(trainable and not (self.norm == "frozen" and name in early))

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W], normalised with `mean` and `std`."""
        maps = self.body(images)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last_maps else maps


class BackboneWithPositions(nn.Sequential):
    """`0`: the backbone, `1`: the positional encoding, so that keys are those of the published checkpoints."""

    if TYPE_CHECKING:  # nn.Sequential says Module of each

        def __getitem__(self, index: Any) -> Any: ...

    def forward(self, samples: NestedTensor) -> list[FeatureMap]:
        maps = []
        for tensor in self[0](samples.tensors):
            mask = resize_mask(samples.mask, tensor.shape[-2:])
            maps.append(FeatureMap(tensor, mask, self[1](mask).to(tensor.dtype)))
        return maps


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Padding mask [B, H, W] at another size [B, h, w], nearest neighbour by floor as published."""
    return functional.interpolate(mask[None].float(), size=tuple(size)).to(torch.bool)[0]
