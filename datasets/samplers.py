"""Which samples each rank sees, and in which order.

A run can stop and resume at any batch, also with another batch size or number of processes, and W ranks together see
the same batches as a single process.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from util.random_state import SampleRNG

CHUNK_BATCHES = 32  # global batches among which `--bucket_aspect` sorts the images of training

# (epoch, indices) -> (height, width) of each sample after its augmentation, int64 [n, 2]
FinalSizes = Callable[[int, list[int]], np.ndarray]
UNKNOWN_SIZE = (1, 1)  # of a bad image, which another one will replace
# (images per global batch, number of batches) of a part of an epoch
Segment = tuple[int, int]


def sort_by_size(sizes_hw: np.ndarray, batch_size: int) -> np.ndarray:
    """Return an order of samples [n, 2] in which those of a batch have similar sizes: int64 [n].

    The samples are sorted by aspect ratio and cut into as many parts as each part has batches; each part is sorted by
    area.
    """
    num_parts = max(round((len(sizes_hw) / batch_size) ** 0.5), 1)
    batches_of_part = -(-len(sizes_hw) // (batch_size * num_parts))
    by_aspect = np.argsort(sizes_hw[:, 1] / sizes_hw[:, 0], kind="stable")
    parts = [
        by_aspect[start : start + batches_of_part * batch_size]
        for start in range(0, len(by_aspect), batches_of_part * batch_size)
    ]
    areas = sizes_hw.prod(1)
    return np.concatenate([part[np.argsort(areas[part], kind="stable")] for part in parts])


def _check_sizes(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"batch size {batch_size}, rank {rank} of {world_size} processes")


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler that yields the batches of one rank as lists of (epoch, index).

    The order is a permutation drawn from (seed, epoch), or 0, 1, 2, ... without `shuffle`. It is cut into global
    batches of batch_size * world_size indices, and rank r takes every world_size-th index of each, starting at r. In
    each step, W ranks with batch size b therefore see the images that one process with batch size W * b sees.

    Unlike `DistributedSampler`, it repeats no index to fill up the end. With `drop_last` the incomplete global batch
    is dropped. Without it (evaluation) every index comes exactly once over all ranks, and the ranks may have different
    numbers of batches.

    With `final_sizes` (`--bucket_aspect`) the images of a global batch have similar sizes: they are sorted within
    chunks of CHUNK_BATCHES global batches of the random order, and the batches of a chunk are shuffled. The samples
    themselves do not change: their augmentation is a function of (seed, epoch, index), and only their order follows
    from their sizes. For evaluation see `EqualSizeSampler`.
    """

    def __init__(
        self,
        dataset_len: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        epoch: int = 0,
        start_batch: int = 0,
        final_sizes: FinalSizes | None = None,
    ) -> None:
        _check_sizes(batch_size, rank, world_size)
        self.dataset_len = dataset_len
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.final_sizes = final_sizes
        self.set_epoch(epoch, start_batch)

    def set_epoch(
        self,
        epoch: int,
        start_batch: int = 0,
        max_batches: int | None = None,
        earlier: Sequence[Segment] = (),
    ) -> None:
        """Set the epoch of the next iteration.

        Args:
            start_batch: batches of the epoch to skip, when a run resumes in mid-epoch.
            max_batches: upper limit on the batches that follow. None: up to the end of the epoch.
            earlier: what the epoch began with, before these batches, when a run resumes with another batch size or
                number of processes. The images that were not in it follow, in batches of the current size.
        """
        self.epoch = epoch
        self.start_batch = start_batch
        self.max_batches = max_batches
        self.earlier = tuple(earlier)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this rank in a complete epoch."""
        return self._count_batches(self.dataset_len)

    @property
    def batches_after_earlier(self) -> int:
        """Batches of this rank in the current epoch, without those of other sizes at its beginning."""
        done = sum(size * batches for size, batches in self.earlier)
        return self._count_batches(self.dataset_len - done)

    def _count_batches(self, num_images: int) -> int:
        complete, rest = divmod(num_images, self.batch_size * self.world_size)
        # The incomplete global batch has indices for the first `rest` ranks only.
        has_last_batch = not self.drop_last and rest > self.rank
        return complete + int(has_last_batch)

    def __len__(self) -> int:
        left = max(self.batches_after_earlier - self.start_batch, 0)
        return left if self.max_batches is None else min(left, self.max_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # The epoch travels with each index, because persistent dataloader workers keep their copy of the dataset and
        # never see a new value of an attribute.
        epoch = self.epoch
        for indices in itertools.islice(self._global_batches(epoch), len(self)):
            yield [(epoch, index) for index in indices[self.rank :: self.world_size]]

    def _global_batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield the indices of each global batch from `start_batch` on."""
        order = self._order().tolist()
        for size, batches in self.earlier:
            first = itertools.islice(self._cut(epoch, order, size), batches)
            done = {index for batch in first for index in batch}
            order = [index for index in order if index not in done]
        yield from self._cut(epoch, order, self.batch_size * self.world_size, self.start_batch)

    def _cut(
        self, epoch: int, order: list[int], size: int, start_batch: int = 0
    ) -> Iterator[list[int]]:
        """Yield the global batches of an order of images from `start_batch` on."""
        if self.final_sizes is None:
            for start in range(start_batch * size, len(order), size):
                yield order[start : start + size]
            return

        first = 0  # number of the chunk's first batch
        for chunk in self._chunks(order, size):
            following = first + -(-len(chunk) // size)
            # Sizes cost time: those of chunks that a resumed run has finished are not needed.
            if following > start_batch:
                batches = self._sorted_batches(epoch, chunk, first, size)
                yield from batches[max(start_batch - first, 0) :]
            first = following

    def _chunks(self, order: list[int], size: int) -> list[list[int]]:
        """Cut an order into the parts within which images are sorted, all of complete global batches but the last."""
        step = CHUNK_BATCHES * size
        # The images that are dropped are random ones, not the largest.
        complete = len(order) // size * size
        chunks = [order[i : min(i + step, complete)] for i in range(0, complete, step)]
        return [*chunks, order[complete:]]

    def _sorted_batches(
        self, epoch: int, indices: list[int], first: int, size: int
    ) -> list[list[int]]:
        if len(indices) > size:
            assert self.final_sizes is not None
            by_size = sort_by_size(self.final_sizes(epoch, indices), size)
            indices = [indices[i] for i in by_size.tolist()]
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        # A stream of its own, so that a resumed run can start at any chunk.
        SampleRNG.from_key(self.seed, epoch, -2 - first).python.shuffle(batches)
        return batches

    def _order(self) -> torch.Tensor:
        """Indices of all ranks in the order of this epoch: int64 [dataset_len]."""
        if not self.shuffle:
            return torch.arange(self.dataset_len)
        rng = SampleRNG.from_key(self.seed, self.epoch)
        return torch.randperm(self.dataset_len, generator=rng.torch)


class EqualSizeSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of evaluation with `--bucket_aspect`: the images of a batch have the same size, so none is padded.

    Each image then gets the detections that it gets alone. Every index comes once over all ranks. The batches of all
    sizes, the largest images first, are dealt to the ranks in turn.

    Args:
        final_sizes: see `EpochSampler`.
        in_order: number of images that come first, in the order of the dataset and alone.
    """

    def __init__(
        self,
        dataset_len: int,
        batch_size: int,
        final_sizes: FinalSizes,
        *,
        rank: int = 0,
        world_size: int = 1,
        in_order: int = 0,
    ) -> None:
        _check_sizes(batch_size, rank, world_size)
        self.dataset_len = dataset_len
        self.batch_size = batch_size
        self.final_sizes = final_sizes
        self.rank = rank
        self.world_size = world_size
        self.in_order = min(in_order, dataset_len)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self._batches:
            yield [(0, index) for index in indices]

    @functools.cached_property
    def _batches(self) -> list[list[int]]:
        """The batches of this rank."""
        by_size: dict[tuple[int, int], list[int]] = {}
        following = list(range(self.in_order, self.dataset_len))
        sizes = self.final_sizes(0, following).tolist() if following else []
        for index, (height, width) in zip(following, sizes, strict=True):
            by_size.setdefault((height, width), []).append(index)
        batches = [[index] for index in [*range(self.in_order), *by_size.pop(UNKNOWN_SIZE, [])]]
        for size in sorted(by_size, key=lambda hw: (hw[0] * hw[1], hw), reverse=True):
            of_size = by_size[size]
            batches += [
                of_size[i : i + self.batch_size] for i in range(0, len(of_size), self.batch_size)
            ]
        return batches[self.rank :: self.world_size]
