"""The targets of a batch, packed into one tensor for each key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Problem = tuple[str, str]


@dataclass
class PackedTargets:
    """One tensor for each key: each tensor that a dataloader worker sends costs a shared-memory handle, and criterion
    and matcher read the objects of all images at once.

    It is also a sequence of the images' own targets: `len(targets)`, `targets[i]` and iteration give dicts whose
    tensors are views. No subclass of `collections.abc.Sequence`: some versions of PyTorch pin the items of a sequence
    one by one and never ask for its own `pin_memory`.

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
                raise ValueError(
                    f"targets of one batch have different keys: {sorted(target)} and {sorted(targets[0])}"
                )
        tensors = {key: torch.cat([target[key] for target in targets]) for key in keys}
        return cls(
            tensors, {key: [len(target[key]) for target in targets] for key in keys}, problems
        )

    def unpack(self) -> list[dict[str, Tensor]]:
        """One dict for each image; the tensors are views of the packed ones."""
        columns = {key: tensor.split(self.rows[key]) for key, tensor in self.tensors.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(len(self))]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTargets":
        moved = {
            key: tensor.to(device, non_blocking=non_blocking)
            for key, tensor in self.tensors.items()
        }
        return PackedTargets(moved, self.rows, self.problems)

    def pin_memory(self) -> "PackedTargets":
        pinned = {key: tensor.pin_memory() for key, tensor in self.tensors.items()}
        return PackedTargets(pinned, self.rows, self.problems)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.unpack()[index]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self.unpack()


Targets = PackedTargets | Sequence[dict[str, Tensor]]


def pack_objects(targets: Targets) -> PackedTargets:
    """The form in which criterion and matcher read targets: packed ones as they are; of a list of dicts `labels` and
    `boxes`, and `image_id` where every image has one.
    """
    if isinstance(targets, PackedTargets):
        return targets
    objects = [{key: target[key] for key in ("labels", "boxes")} for target in targets]
    if all("image_id" in target for target in targets):
        for own, target in zip(objects, targets, strict=True):
            own["image_id"] = torch.as_tensor(target["image_id"]).reshape(-1)
    return PackedTargets.pack(objects)
