"""Batches: uint8 images padded to one size, packed targets, and normalization on the device.

Shapes: B images, V views, [H, W] the padded size, [h, w] the size of one image, n objects of one image, T of all.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.colors import PATCH_COLORS, VIEW_COLORS, Size, augment_batch
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets


def flatten_views(
    batch: Sequence[tuple[Tensor, dict[str, Any]]],
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Turn B samples of V views into V * B samples: view 1 of all images, then view 2, and so on.

    `problems` stay with view 1, so that a bad image is reported once and not once per view.
    """
    num_views = len(batch[0][0])
    flat = []
    for view in range(num_views):
        for images, target in batch:
            own = {key: value[view] for key, value in target.items() if key != "problems"}
            if view == 0 and "problems" in target:
                own["problems"] = target["problems"]
            flat.append((images[view], own))
    return flat


def collate(
    batch: Sequence[tuple[Tensor, dict[str, Any]]], multiple: int = 1
) -> tuple[NestedTensor, PackedTargets]:
    """Collate [(image uint8 [3, h, w], target), ...] into (uint8 batch [B, 3, H, W], packed targets).

    Images are zero-padded at the bottom and right to the largest height and width of the batch, rounded up to a
    multiple of `multiple`. Samples of V views,
    [V, 3, h, w] with a leading axis of V in every target, become V * B images (see `flatten_views`).
    """
    if batch[0][0].ndim == 4:
        batch = flatten_views(batch)

    images = [image for image, _ in batch]
    height, width = (
        -(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2)
    )
    padded = any(image.shape[1:] != (height, width) for image in images)

    # Channels-last, as decoded images are: the copy is then eight times faster, and convolutions prefer this layout.
    tensors = torch.empty(
        (len(images), 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last
    )  # [B, 3, H, W]
    mask = torch.full((len(images), height, width), padded)  # [B, H, W], True on padding
    for i, image in enumerate(images):
        _, h, w = image.shape
        tensors[i, :, :h, :w] = image
        # `tensors` is uninitialized memory: zero only the padding instead of the whole batch.
        tensors[i, :, h:] = 0
        tensors[i, :, :h, w:] = 0
        mask[i, :h, :w] = False
    targets = [_pack_masks(target, height, width) for _, target in batch]
    return NestedTensor(tensors, mask, padded), PackedTargets.pack(targets)


def padding_fraction(samples: NestedTensor, targets: PackedTargets) -> float:
    """Return the fraction of a batch's pixels that are padding. It reads the sizes on the host."""
    num_images, _, height, width = samples.tensors.shape
    pixels = targets.tensors["size"].view(-1, 2).prod(1).sum()
    return 1 - float(pixels) / (num_images * height * width)


def _pack_masks(target: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return a target with its `masks`, uint8 [n, h, w], padded to the batch and packed: uint8 [n, H, ceil(W / 8)].

    One bit per pixel: masks are the largest part of a batch, and every copy on the way to the device takes an eighth.
    """
    if "masks" not in target:
        return target
    masks = target["masks"].numpy()  # [n, h, w]
    bits = np.zeros((len(masks), height, -(-width // 8)), np.uint8)
    # `packbits` pads the last byte of a row with zeros, as the padding of the batch.
    packed = np.packbits(masks, axis=2)  # [n, h, ceil(w / 8)]
    bits[:, : packed.shape[1], : packed.shape[2]] = packed
    return {**target, "masks": torch.from_numpy(bits)}


def unpack_masks(bits: Tensor, width: int) -> Tensor:
    """Unpack masks on their device: uint8 [T, H, ceil(W / 8)] -> bool [T, H, W]."""
    # Made on the device: a copy from the host would make it wait.
    shifts = torch.arange(
        7, -1, -1, dtype=torch.uint8, device=bits.device
    )  # [8], the highest bit first
    pixels = (bits[..., None] >> shifts).bitwise_and_(1)  # [T, H, ceil(W / 8), 8]
    return pixels.flatten(2)[..., :width].bool()


def normalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize uint8 [..., 3, H, W] to float32, (x / 255 - mean) / std. `mean` and `std` are for values in [0, 1]."""
    # non_blocking: the host must not wait for the device in the middle of a training step.
    shift = torch.tensor(mean, dtype=torch.float32).to(images.device, non_blocking=True)  # [3]
    scale = torch.tensor(std, dtype=torch.float32).to(images.device, non_blocking=True)  # [3]
    return images.to(torch.float32).div_(255).sub_(shift[:, None, None]).div_(scale[:, None, None])


def normalize(samples: NestedTensor, mean: Sequence[float], std: Sequence[float]) -> NestedTensor:
    """Normalize a uint8 batch on its device."""
    images = normalize_images(samples.tensors, mean, std)  # [B, 3, H, W]
    if samples.padded:
        # DETR pads after normalization: padding is 0 there, not -mean / std.
        images.masked_fill_(samples.mask[:, None], 0)
    return NestedTensor(images, samples.mask, samples.padded)


def apply_colors(
    samples: NestedTensor, targets: PackedTargets, sizes: Sequence[Size]
) -> tuple[NestedTensor, PackedTargets]:
    """Apply the colors that the dataset has drawn and left to the device, and drop them from the targets.

    Args:
        samples, targets: on the device, uint8. They are not modified.
        sizes: (height, width) of each image without padding, on the host; read only for colors of views.
    """
    tensors = dict(targets.tensors)
    patch_colors, view_colors = tensors.pop(PATCH_COLORS, None), tensors.pop(VIEW_COLORS, None)
    if patch_colors is not None:
        tensors["patches"] = augment_batch(tensors["patches"], patch_colors)
    if view_colors is not None:
        images = augment_batch(samples.tensors, view_colors, sizes)
        samples = replace(samples, tensors=images)
    counts = {key: targets.counts[key] for key in tensors}
    return samples, replace(targets, tensors=tensors, counts=counts)


def to_device(
    samples: NestedTensor,
    targets: PackedTargets,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[NestedTensor, PackedTargets]:
    """Copy a batch to the device, augment and normalize its images and patches there, and unpack its masks."""
    sizes = targets.tensors["size"].view(-1, 2).tolist() if VIEW_COLORS in targets.tensors else []
    samples, targets = apply_colors(
        samples.to(device, non_blocking=True), targets.to(device, non_blocking=True), sizes
    )
    samples = normalize(samples, mean, std)
    if "patches" in targets.tensors:
        patches = targets.tensors["patches"]  # uint8 [sum of M, 3, S, S]
        targets.tensors["patches"] = normalize_images(patches, mean, std)
    if "masks" in targets.tensors:
        width = samples.tensors.shape[-1]
        targets.tensors["masks"] = unpack_masks(targets.tensors["masks"], width)  # bool [T, H, W]
    return samples, targets
