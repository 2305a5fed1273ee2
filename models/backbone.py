"""Backbones: images in, feature maps out.

`Backbone(images [B, 3, H, W]) -> list of feature maps [B, C, h, w]`. It has the `strides` and
`num_channels` of the maps, and the `mean` and `std` that its images are normalized with.
A new backbone is a file with a builder and a line in `util.settings.registry.BACKBONES`.

Shapes: B images, H x W padded image size, D model width, C channels and h x w size of a feature map.
"""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.frozen_norm import fold_frozen_norms
from util.moved_names import moved_from
from util.nested_tensor import NestedTensor
from util.settings.registry import BACKBONES, import_object, lookup

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.backbone")


@dataclass
class FeatureMap:
    """A feature map with its padding mask and positional encoding.

    tensor: [B, C, h, w].
    mask: bool [B, h, w], True on padding.
    position: [B, D, h, w], in the dtype of `tensor`. Early maps that only a mask head
        reads have none: [B, 0, h, w].
    """

    tensor: Tensor
    mask: Tensor
    position: Tensor


@dataclass
class Body:
    """What a builder of the registry BACKBONES returns for (name, norm, dilation, stages).

    network: images [B, 3, H, W] -> maps of the requested stages, as a list or a dict. Its parameter
        names are those of its weight files.
    strides, num_channels: of these maps.
    mean, std: normalization of the images, RGB in 0..1.
    early_names: parameter names of stem and first stage, which never train with frozen norms.
    channels_last: the network returns maps as [B, h, w, C].
    patch_size: the network reads multiples of it, and mixes all pixels of an image: it must not see padding. None: any
        size, and padding matters at its border only.
    """

    network: nn.Module
    _: KW_ONLY
    strides: list[int]
    num_channels: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    early_names: set[str]
    channels_last: bool = False
    patch_size: int | None = None


class Backbone(nn.Module):
    """A feature extractor.

    Args:
        name: a name in the registry, or `timm:NAME`.
        norm: `frozen` (constant statistics and affine parameters) or `live` (ordinary batch norm,
            for random weights).
        dilation: replace the stride of the last stage by dilation, 16 in place of 32 (DC5).
        stages: which of the stages 1 to 4 to return.
        trainable: False freezes all parameters (`--lr_backbone 0`, `--fre_cnn`).
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
        family = name[: name.find(":") + 1] or name  # "timm:NAME" -> "timm:"
        build_body = import_object(lookup(BACKBONES, "--backbone", family))
        body: Body = build_body(name, norm, dilation, stages)

        self.body = body.network
        if norm == "frozen":
            fold_frozen_norms(self.body)
        self.strides, self.num_channels = body.strides, body.num_channels
        self.name, self.norm = name, norm
        self.mean, self.std = body.mean, body.std
        self.channels_last_maps = body.channels_last
        self.patch_size = body.patch_size
        self._freeze(trainable, body.early_names)
        self._ahead: tuple[Tensor, list[Tensor]] | None = None

    def _freeze(self, trainable: bool, early_names: set[str]) -> None:
        # As in DETR, stem and first stage keep their pre-trained weights. Live norms are for a
        # backbone with random weights, where a frozen stem would stay random.
        for name, parameter in self.body.named_parameters():
            keep_frozen = self.norm == "frozen" and name in early_names
            parameter.requires_grad_(trainable and not keep_frozen)

    @property
    def frozen(self) -> bool:
        """Whether no parameter trains."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def constant(self) -> bool:
        """Whether the maps of an image are the same in every training step, and need no padding mask."""
        if self.patch_size is not None:
            return False
        return self.frozen and not any(map(_updates_or_draws, self.modules()))

    def compute_ahead(self, images: Tensor) -> None:
        """Compute the maps that `maps` will return for these images. Only for a `constant` one."""
        with torch.enable_grad():  # as in a step: --compile would need another graph
            self._ahead = images, self(images)

    def maps(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Return `forward`, or what `compute_ahead` has computed for these images, once."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].is_set_to(images):
            return ahead[1]
        return self(images, mask)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Extract feature maps, one [B, C, h, w] per stage.

        images: [B, 3, H, W], normalized with `mean` and `std`.
        mask: bool [B, H, W], True on padding at the bottom and the right; None: no image is padded.
        """
        if self.patch_size is None:
            return self._extract(images)
        images = pad_to_multiple(images, self.patch_size)
        if mask is None:
            return self._extract(images)
        return self._extract_each(images, valid_cells(mask, self.patch_size))

    def _extract(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        if self.channels_last_maps:
            maps = [x.permute(0, 3, 1, 2) for x in maps]  # [B, h, w, C] -> [B, C, h, w]
        return maps

    def _extract_each(self, images: Tensor, cells_hw: list[tuple[int, int]]) -> list[Tensor]:
        """Extract the map of each image without its padding; cells of padding are 0.

        Attention to padding, and position embeddings of the padded size, would make the features of an image depend on
        the other images of the batch. Images of one size run together.

        cells_hw: size of each image in patches.
        """
        assert self.patch_size is not None
        grid = [side // self.patch_size for side in images.shape[-2:]]
        whole = None
        for height, width in sorted(set(cells_hw)):
            index = [i for i, size in enumerate(cells_hw) if size == (height, width)]
            part = images[index, :, : height * self.patch_size, : width * self.patch_size]
            (found,) = self._extract(part)  # [b, C, height, width]
            if whole is None:
                whole = found.new_zeros((len(images), found.shape[1], *grid))
            whole[index, :, :height, :width] = found
        assert whole is not None
        return [whole]


def pad_to_multiple(x: Tensor, multiple: int, value: float = 0) -> Tensor:
    """Pad [..., H, W] at the bottom and the right."""
    height, width = x.shape[-2:]
    return functional.pad(x, (0, -width % multiple, 0, -height % multiple), value=value)


def valid_cells(mask: Tensor, patch_size: int) -> list[tuple[int, int]]:
    """Return how many patches (down, across) each image has, also those that it fills in part.

    mask: bool [B, H, W], True on padding. It is read on the host, which waits for a GPU.
    """
    sizes = torch.stack([(~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)], 1)  # [B, 2], (h, w)
    return [(-(-height // patch_size), -(-width // patch_size)) for height, width in sizes.tolist()]


def _updates_or_draws(module: nn.Module) -> bool:
    """Whether a training step changes a module's buffers, or the module draws random numbers."""
    draws = getattr(module, "p", 0) or getattr(module, "drop_prob", 0)  # dropout; drop path of timm
    return isinstance(module, nn.modules.batchnorm._NormBase) or bool(draws)


class BackboneWithPositions(nn.Sequential):
    """Backbone and positional encoding.

    A Sequential, because published checkpoints name the backbone `backbone.0` and a learned
    encoding `backbone.1`.
    """

    num_levels = 3  # the last maps, which a detector may read; they get a positional encoding

    if TYPE_CHECKING:  # nn.Sequential types every item as a plain Module

        def __getitem__(self, index: Any) -> Any: ...

    def forward(self, samples: NestedTensor) -> list[FeatureMap]:
        """Extract one `FeatureMap` per stage."""
        backbone, position_encoding = self[0], self[1]
        pixel_mask = samples.mask
        if backbone.patch_size is not None:  # as the images are
            pixel_mask = pad_to_multiple(pixel_mask, backbone.patch_size, value=True)
        # [B, C, h, w] each
        tensors = backbone.maps(samples.tensors, samples.mask if samples.padded else None)
        maps = []
        for level, tensor in enumerate(tensors):
            mask = resize_mask(pixel_mask, tensor.shape[-2:])  # [B, h, w]
            position = tensor[:, :0]
            if level >= len(tensors) - self.num_levels:
                position = position_encoding(mask).to(tensor.dtype)  # [B, D, h, w]
            maps.append(FeatureMap(tensor, mask, position))
        return maps


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a padding mask, bool [B, H, W] -> [B, h, w], by nearest neighbor.

    As published, row i reads pixel row floor(i * H / h), columns likewise.
    """
    # The batch takes the place of the channels, which `interpolate` requires.
    resized = functional.interpolate(mask[None].float(), size=tuple(size))  # [1, B, h, w]
    return resized.to(torch.bool)[0]
