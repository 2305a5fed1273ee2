"""Batches: images padded to one size as uint8, targets packed into a few tensors, normalisation on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from util.nested_tensor import NestedTensor

Problem = tuple[str, str]


@dataclass
class PackedTargets:
    """The targets of a batch with ONE tensor a key, since each tensor that a worker sends costs a shared-memory handle.

    tensors: key -> the rows of all images one after the other, [sum of rows, ...].
    rows: key -> rows of each image; on the host, so that counting objects never asks a device.
    problems: (path, reason) of each image that could not be used and was replaced.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, list[int]]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def pack(cls, targets: Sequence[dict[str, Any]]) -> "PackedTargets":
        """Packs dicts of tensors with equal keys; `problems`, where a target has it, is kept aside.

        Raises:
            ValueError: targets whose tensor keys differ.
        """
        problems = [problem for target in targets for problem in target.get("problems", [])]
        keys = [key for key in targets[0] if key != "problems"]
        for target in targets:
            if set(target) - {"problems"} != set(keys):
                raise ValueError(f"targets of one batch have different keys: {sorted(target)} and {sorted(targets[0])}")
        tensors = {key: torch.cat([target[key] for target in targets]) for key in keys}
        return cls(tensors, {key: [len(target[key]) for target in targets] for key in keys}, problems)

    def unpack(self) -> list[dict[str, Tensor]]:
        """One dict an image; the tensors are views of the packed ones."""
        columns = {key: tensor.split(self.rows[key]) for key, tensor in self.tensors.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(len(self))]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTargets":
        moved = {key: tensor.to(device, non_blocking=non_blocking) for key, tensor in self.tensors.items()}
        return PackedTargets(moved, self.rows, self.problems)

    def pin_memory(self) -> "PackedTargets":
        pinned = {key: tensor.pin_memory() for key, tensor in self.tensors.items()}
        return PackedTargets(pinned, self.rows, self.problems)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


def separate_views(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[tuple[Tensor, dict[str, Any]]]:
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
    tensors = torch.empty((len(images), 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last)
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
    samples: NestedTensor, targets: PackedTargets, device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Copies a batch to the device and normalises images and patches there."""
    samples = normalize(samples.to(device, non_blocking=True), mean, std)
    targets = targets.to(device, non_blocking=True)
    if "patches" in targets.tensors:
        targets.tensors["patches"] = normalize_images(targets.tensors["patches"], mean, std)
    return samples, targets.unpack()
