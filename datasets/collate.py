"""Batches: images padded to one size as uint8, packed targets, normalisation on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets


def separate_views(
    batch: Sequence[tuple[Tensor, dict[str, Any]]],
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Samples of V views -> samples of one: view 1 of all, then view 2, and so on. `problems` stay with view 1."""
    separate = []
    for view in range(len(batch[0][0])):
        for images, target in batch:
            own = {key: value[view] for key, value in target.items() if key != "problems"}
            if view == 0 and "problems" in target:
                own["problems"] = target["problems"]
            separate.append((images[view], own))
    return separate


def collate(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[NestedTensor, PackedTargets]:
    """[(image uint8 [3, h, w], target)] -> (uint8 batch [B, 3, H, W], packed targets).

    Zeros pad at the bottom and the right up to the largest height and width. The batch is channels-last in memory, as
    decoded pixels are: the copy is then eight times faster, and convolutions prefer it. Samples of V views, [V, 3, h,
    w] with targets that have an axis of V more, become V * B images: view 1 of all, then view 2, and so on.
    """
    if batch[0][0].ndim == 4:
        batch = separate_views(batch)
    images = [image for image, _ in batch]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = any(image.shape[1:] != (height, width) for image in images)
    tensors = torch.empty(
        (len(images), 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last
    )
    mask = torch.full((len(images), height, width), padded)
    for i, image in enumerate(images):
        _, h, w = image.shape
        tensors[i, :, :h, :w] = image
        tensors[i, :, h:] = 0
        tensors[i, :, :h, w:] = 0
        mask[i, :h, :w] = False
    return NestedTensor(tensors, mask, padded), PackedTargets.pack([target for _, target in batch])


def normalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, (x / 255 - mean) / std; mean and std for values in [0, 1]."""
    shift = torch.tensor(mean, dtype=torch.float32).to(images.device, non_blocking=True)
    scale = torch.tensor(std, dtype=torch.float32).to(images.device, non_blocking=True)
    return images.to(torch.float32).div_(255).sub_(shift[:, None, None]).div_(scale[:, None, None])


def normalize(samples: NestedTensor, mean: Sequence[float], std: Sequence[float]) -> NestedTensor:
    """Normalises a uint8 batch on its device; padding becomes exactly 0, as if it had been added after normalising."""
    images = normalize_images(samples.tensors, mean, std)
    if samples.padded:
        images.masked_fill_(samples.mask[:, None], 0)
    return NestedTensor(images, samples.mask, samples.padded)


def to_device(
    samples: NestedTensor,
    targets: PackedTargets,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[NestedTensor, PackedTargets]:
    """Copies a batch to the device and normalises images and patches there."""
    samples = normalize(samples.to(device, non_blocking=True), mean, std)
    targets = targets.to(device, non_blocking=True)
    if "patches" in targets.tensors:
        targets.tensors["patches"] = normalize_images(targets.tensors["patches"], mean, std)
    return samples, targets
