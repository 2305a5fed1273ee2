"""A padded batch of images with its padding mask.

Shapes: B images, H x W padded size, h x w size of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class NestedTensor:
    """Images padded at the bottom and the right to a common size.

    tensors: [B, 3, H, W].
    mask: bool [B, H, W], True on padding.
    padded: whether any image may have padding. Known on the host: with False, attention runs
        without a mask, and nobody has to read the mask back from the device to find out.
    """

    tensors: Tensor
    mask: Tensor
    padded: bool = True

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NestedTensor":
        return NestedTensor(
            self.tensors.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
            self.padded,
        )

    def pin_memory(self) -> "NestedTensor":
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), self.padded)

    def __len__(self) -> int:
        return len(self.tensors)


def pad_batch(samples: NestedTensor, height: int, width: int) -> NestedTensor:
    """Pad a batch with zeros to at least [B, 3, height, width]."""
    missing = [max(height - samples.tensors.shape[2], 0), max(width - samples.tensors.shape[3], 0)]
    pads = (0, missing[1], 0, missing[0])
    return NestedTensor(
        functional.pad(samples.tensors, pads),
        functional.pad(samples.mask, pads, value=True),
        samples.padded or any(missing),
    )


def nested_tensor_from_list(images: list[Tensor]) -> NestedTensor:
    """Pad images [3, h, w] with zeros to the largest height and width, and batch them.

    Raises:
        ValueError: an image is not 3-dimensional.
    """
    for image in images:
        if image.ndim != 3:
            raise ValueError(f"images must be [3, H, W], got shape {tuple(image.shape)}")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)

    tensors = images[0].new_zeros((len(images), images[0].shape[0], height, width))  # [B, 3, H, W]
    mask = torch.ones((len(images), height, width), dtype=torch.bool, device=images[0].device)
    for i, image in enumerate(images):
        tensors[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    padded = any(image.shape[1:] != (height, width) for image in images)
    return NestedTensor(tensors, mask, padded)


def as_nested_tensor(samples: "NestedTensor | Tensor | list[Tensor]") -> NestedTensor:
    """Convert a batch [B, 3, H, W] or a list of images [3, h, w]; a `NestedTensor` passes.

    Raises:
        ValueError: a tensor is not 4-dimensional, or an image of a list not 3-dimensional.
    """
    if isinstance(samples, NestedTensor):
        return samples
    if isinstance(samples, Tensor):
        if samples.ndim != 4:
            raise ValueError(f"a batch must be [B, 3, H, W], got shape {tuple(samples.shape)}")
        batch, _, height, width = samples.shape
        mask = torch.zeros((batch, height, width), dtype=torch.bool, device=samples.device)
        return NestedTensor(samples, mask, padded=False)
    return nested_tensor_from_list(list(samples))
