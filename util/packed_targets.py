"""The targets of a batch, packed into one tensor per key.

Shapes: B images in the batch, N rows of a key over all images (for `boxes` and `labels`: objects).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Problem = tuple[str, str]  # (path of the image, reason)
DroppedBoxes = tuple[str, int]  # (path of the image, number of boxes)
REPORTS = {
    "problems",
    "dropped_boxes",
}  # optional keys of a target that are lists instead of tensors

# Keys that stay on the CPU: no loss reads them, and evaluation needs them there or copies them itself. Error messages
# read ids, and `datasets.collate.to_device` reads colors on the host.
HOST_KEYS = {"image_id", "orig_size", "area", "iscrowd", "patch_colors", "view_colors"}

# Begins the reason of an image that is fine, but has fewer boxes than its pretext needs.
TOO_FEW_PROPOSALS = "too few proposals"


# Not a subclass of `collections.abc.Sequence`: some versions of PyTorch pin the items of a Sequence one by one and
# never call its own `pin_memory`.
@dataclass
class PackedTargets:
    """Targets of a batch, with the rows of all images concatenated per key.

    Each tensor that a dataloader worker sends costs a shared-memory handle, so a batch sends one tensor per key instead
    of one per key and image. The criterion and the matcher also read the objects of all images at once.

    A `PackedTargets` behaves like a list of per-image targets, too: `len(targets)`, `targets[i]` and iteration give
    dicts whose tensors are views of the packed ones.

    Attributes:
        tensors: key -> the rows of all images, concatenated, [N, ...]. From `datasets.collate.collate` to `to_device`,
            which turns them into bool [N, H, W], `masks` are packed bits, uint8 [N, H, ceil(W / 8)].
        counts: key -> number of rows of each image, a list of B ints. They stay on the host, so that reading the number
            of objects never synchronizes with the GPU.
        problems: (path, reason) of each image that could not be used and was replaced by another one.
        dropped_boxes: (path, number of boxes) of each image with boxes outside of it, or panoptic segments without
            pixels, which only loading it shows.
    """

    tensors: dict[str, Tensor]
    counts: dict[str, list[int]]
    problems: list[Problem] = field(default_factory=list)
    dropped_boxes: list[DroppedBoxes] = field(default_factory=list)

    @classmethod
    def pack(cls, targets: Sequence[dict[str, Any]]) -> "PackedTargets":
        """Pack B dicts of tensors with the same keys. The optional keys REPORTS are collected separately.

        Raises:
            ValueError: the keys of two targets differ.
        """
        problems = [problem for target in targets for problem in target.get("problems", [])]
        dropped = [boxes for target in targets for boxes in target.get("dropped_boxes", [])]
        keys = [key for key in targets[0] if key not in REPORTS]

        for target in targets:
            if set(target) - REPORTS != set(keys):
                raise ValueError(
                    f"targets of one batch have different keys: {sorted(target)} and {sorted(targets[0])}"
                )

        tensors = {key: torch.cat([target[key] for target in targets]) for key in keys}  # [N, ...]
        counts = {key: [len(target[key]) for target in targets] for key in keys}
        return cls(tensors, counts, problems, dropped)

    def unpack(self) -> list[dict[str, Tensor]]:
        """Return one dict per image; its tensors are views of the packed ones."""
        columns = {key: tensor.split(self.counts[key]) for key, tensor in self.tensors.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(len(self))]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTargets":
        """Return a copy on `device`, except for HOST_KEYS, which stay where they are."""
        moved = {
            key: tensor if key in HOST_KEYS else tensor.to(device, non_blocking=non_blocking)
            for key, tensor in self.tensors.items()
        }
        return PackedTargets(moved, self.counts, self.problems, self.dropped_boxes)

    def pin_memory(self) -> "PackedTargets":
        """Return a copy in pinned memory. The dataloader calls this where `pin_memory=True`."""
        pinned = {
            key: tensor if key in HOST_KEYS else tensor.pin_memory()
            for key, tensor in self.tensors.items()
        }
        return PackedTargets(pinned, self.counts, self.problems, self.dropped_boxes)

    def __len__(self) -> int:
        # Every key has one count per image, so any key gives B.
        return len(next(iter(self.counts.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.unpack()[index]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self.unpack()


Targets = PackedTargets | Sequence[dict[str, Tensor]]


def pad_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    """Zero-pad the masks of B images, [n, h, w] each, at the bottom and right to one size [H, W]."""
    height, width = (max(own.shape[axis] for own in masks) for axis in (1, 2))
    return [pad(own, (0, width - own.shape[2], 0, height - own.shape[1])) for own in masks]


def pack_objects(targets: Targets) -> PackedTargets:
    """Return targets in the form that the criterion and the matcher read.

    Packed targets are returned unchanged. A list of dicts, as in DETR's interface, is packed: `labels` and `boxes`, and
    `image_id` and `masks` (padded to the largest of the batch) if every image has them.
    """
    if isinstance(targets, PackedTargets):
        return targets

    objects = [{key: target[key] for key in ("labels", "boxes")} for target in targets]
    if targets and all("masks" in target for target in targets):
        masks = pad_masks([target["masks"] for target in targets])
        for packed, own in zip(objects, masks, strict=True):
            packed["masks"] = own  # [n, H, W]
    if all("image_id" in target for target in targets):
        for packed, target in zip(objects, targets, strict=True):
            # `pack` concatenates rows, so a scalar id becomes a row of length 1.
            packed["image_id"] = torch.as_tensor(target["image_id"]).reshape(-1)  # [1]
    return PackedTargets.pack(objects)
