"""Copying batches to the device, on a GPU while the step before is still running there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from datasets.collate import to_device
from util.nested_tensor import NestedTensor
from util.packed_images import PackedImages
from util.packed_targets import PackedTargets

Place = TypeVar("Place")
OnHost = tuple[Place, PackedImages, PackedTargets]


class Transfer:
    """Copies batches to a device and normalizes them there.

    On a GPU this happens on a stream of its own. A training step returns as soon as its losses are known, while its
    backward pass is still running. A copy on the same stream would wait for that; on its own stream it overlaps with
    it. The order of the batches does not change.

    Args:
        normalization: `mean` and `std` of the images, RGB in [0, 1].
    """

    def __init__(self, device: torch.device, normalization: Mapping[str, Sequence[float]]) -> None:
        self.device, self.normalization = device, normalization
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(
        self, samples: PackedImages, targets: PackedTargets
    ) -> tuple[NestedTensor, PackedTargets]:
        """Return the batch on the device, see `datasets.collate.to_device`."""
        with torch.cuda.stream(self.stream):  # has no effect if it is None
            inputs, targets = to_device(samples, targets, self.device, **self.normalization)
        if self.stream is not None:
            self._hand_over([inputs.tensors, inputs.mask, *targets.tensors.values()])
        return inputs, targets

    def _hand_over(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the current stream wait for the copies, and keep their memory until it has used them."""
        assert self.stream is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        # The memory belongs to the other stream, which would reuse it for the next batch while this one is in use.
        for tensor in tensors:
            tensor.record_stream(current)


class LookAhead(Generic[Place]):
    """Iterates over batches on the host and on the device. The next one can be fetched early.

    Each item is (batch on the host, images on the device, targets on the device).

    Args:
        batches: tuples of anything, images and targets; read one by one, never further ahead than `fetch_next` asks.
    """

    def __init__(self, batches: Iterable[OnHost], transfer: Transfer) -> None:
        self.batches, self.transfer = iter(batches), transfer
        self.next: tuple[OnHost, NestedTensor, PackedTargets] | None = None

    def fetch_next(self) -> NestedTensor | None:
        """Fetch the next batch and return its images on the device; None: there is none, or it was fetched before."""
        if self.next is not None:
            return None
        batch = next(self.batches, None)
        if batch is None:
            return None
        self.next = batch, *self.transfer(*batch[1:])
        return self.next[1]

    def __iter__(self) -> Iterator[tuple[OnHost, NestedTensor, PackedTargets]]:
        while True:
            self.fetch_next()
            current, self.next = self.next, None
            if current is None:
                return
            yield current
