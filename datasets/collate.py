"""Batches: packed uint8 images and targets, and their normalization and padding on the device.

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
from util.packed_images import ROW, PackedImages
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
) -> tuple[PackedImages, PackedTargets]:
    """Collate [(image uint8 [3, h, w], target), ...] into (packed uint8 images, packed targets).

    On the device images are zero-padded at the bottom and right to the largest height and width of the batch, rounded
    up to a multiple of `multiple`. Samples of V views,
    [V, 3, h, w] with a leading axis of V in every target, become V * B images (see `flatten_views`).
    """
    if batch[0][0].ndim == 4:
        batch = flatten_views(batch)
    images = PackedImages.pack([image for image, _ in batch], multiple)
    targets = [_pack_masks(target, images.height, images.width) for _, target in batch]
    return images, PackedTargets.pack(targets)


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
    """Normalize uint8 [..., 3, H, W] to float32, (x / 255 - mean) / std. `mean` and `std` are for values in [0, 1].

    They have one value per channel.
    """
    # non_blocking: the host must not wait for the device in the middle of a training step.
    shift = torch.tensor(mean, dtype=torch.float32).to(images.device, non_blocking=True)  # [3]
    scale = torch.tensor(std, dtype=torch.float32).to(images.device, non_blocking=True)  # [3]
    return images.to(torch.float32).div_(255).sub_(shift[:, None, None]).div_(scale[:, None, None])


def normalize(
    samples: NestedTensor | PackedImages, mean: Sequence[float], std: Sequence[float]
) -> NestedTensor:
    """Normalize and pad a uint8 batch on its device. DETR pads after normalization: padding is 0, not -mean / std."""
    if isinstance(samples, PackedImages):
        # Rows of pixels as an image of 3 * ROW channels: the same operations for each pixel as on an image.
        rows = samples.pixels[:, :, None, None]  # [P / ROW, 3 * ROW, 1, 1]
        pixels = normalize_images(rows, [*mean] * ROW, [*std] * ROW).flatten(1)
        return replace(samples, pixels=pixels).pad()
    images = normalize_images(samples.tensors, mean, std)  # [B, 3, H, W]
    if samples.padded:
        images.masked_fill_(samples.mask[:, None], 0)
    return NestedTensor(images, samples.mask, samples.padded)


def apply_colors(
    samples: PackedImages, targets: PackedTargets, sizes: Sequence[Size]
) -> tuple[NestedTensor | PackedImages, PackedTargets]:
    """Apply the colors that the dataset has drawn and left to the device, and drop them from the targets.

    Args:
        samples, targets: on the device, uint8. They are not modified.
        sizes: (height, width) of each image without padding, on the host; read only for colors of views.
    """
    tensors = dict(targets.tensors)
    patch_colors, view_colors = tensors.pop(PATCH_COLORS, None), tensors.pop(VIEW_COLORS, None)
    if patch_colors is not None:
        tensors["patches"] = augment_batch(tensors["patches"], patch_colors)
    colored: NestedTensor | PackedImages = samples
    if view_colors is not None:
        padded = samples.pad()
        images = augment_batch(padded.tensors, view_colors, sizes)
        colored = replace(padded, tensors=images)
    counts = {key: targets.counts[key] for key in tensors}
    return colored, replace(targets, tensors=tensors, counts=counts)


def to_device(
    samples: PackedImages,
    targets: PackedTargets,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[NestedTensor, PackedTargets]:
    """Copy a batch to the device; augment, normalize and pad its images and patches there, and unpack its masks."""
    sizes = targets.tensors["size"].view(-1, 2).tolist() if VIEW_COLORS in targets.tensors else []
    colored, targets = apply_colors(
        samples.to(device, non_blocking=True), targets.to(device, non_blocking=True), sizes
    )
    normalized = normalize(colored, mean, std)
    if "patches" in targets.tensors:
        patches = targets.tensors["patches"]  # uint8 [sum of M, 3, S, S]
        targets.tensors["patches"] = normalize_images(patches, mean, std)
    if "masks" in targets.tensors:
        width = normalized.tensors.shape[-1]
        targets.tensors["masks"] = unpack_masks(targets.tensors["masks"], width)  # bool [T, H, W]
    return normalized, targets
