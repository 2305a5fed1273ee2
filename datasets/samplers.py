"""Which samples each rank sees, and in which order.

A run can stop and resume at any batch, and W ranks together see the same batches as a single process.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.random_state import SampleRNG


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler that yields the batches of one rank as lists of (epoch, index).

    The order is a permutation drawn from (seed, epoch), or 0, 1, 2, ... without `shuffle`. It is cut into global
    batches of batch_size * world_size indices, and rank r takes every world_size-th index of each, starting at r. In
    each step, W ranks with batch size b therefore see the images that one process with batch size W * b sees.

    Unlike `DistributedSampler`, it repeats no index to fill up the end. With `drop_last` the incomplete global batch
    is dropped. Without it (evaluation) every index comes exactly once over all ranks, and the ranks may have different
    numbers of batches.
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
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch size {batch_size}, rank {rank} of {world_size} processes")
        self.dataset_len = dataset_len
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.set_epoch(epoch, start_batch)

    def set_epoch(self, epoch: int, start_batch: int = 0, max_batches: int | None = None) -> None:
        """Set the epoch of the next iteration.

        Args:
            start_batch: batches of the epoch to skip, when a run resumes in mid-epoch.
            max_batches: upper limit on the batches that follow. None: up to the end of the epoch.
        """
        self.epoch = epoch
        self.start_batch = start_batch
        self.max_batches = max_batches

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this rank in a complete epoch."""
        complete, rest = divmod(self.dataset_len, self.batch_size * self.world_size)
        # The incomplete global batch has indices for the first `rest` ranks only.
        has_last_batch = not self.drop_last and rest > self.rank
        return complete + int(has_last_batch)

    def __len__(self) -> int:
        left = max(self.batches_per_epoch - self.start_batch, 0)
        return left if self.max_batches is None else min(left, self.max_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # The epoch travels with each index, because persistent dataloader workers keep their copy of the dataset and
        # never see a new value of an attribute.
        epoch, order = self.epoch, self._order()
        global_batch_size = self.batch_size * self.world_size
        for batch in range(self.start_batch, self.start_batch + len(self)):
            start = batch * global_batch_size
            end = min(start + global_batch_size, self.dataset_len)
            indices = order[start + self.rank : end : self.world_size]
            yield [(epoch, index) for index in indices.tolist()]

    def _order(self) -> torch.Tensor:
        """Indices of all ranks in the order of this epoch: int64 [dataset_len]."""
        if not self.shuffle:
            return torch.arange(self.dataset_len)
        rng = SampleRNG.from_key(self.seed, self.epoch)
        return torch.randperm(self.dataset_len, generator=rng.torch)
