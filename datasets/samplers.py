"""Which samples a process sees, in which order, so that a run can stop and go on anywhere and W processes equal one."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.random_state import SampleRandom


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Yields this process's batches as lists of (epoch, index), from batch `start_batch` on.

    The order is a permutation drawn for (seed, epoch), or 0, 1, 2, ... without `shuffle`, cut into global batches of
    batch_size * world_size; process r takes every world_size-th index of each from r on. So W processes with batch b
    see in each step the images of one process with batch W * b.
    With `drop_last` the incomplete global batch at the end is left out. Without it every index comes exactly once over
    all processes, whose numbers of batches may then differ (evaluation).
    """

    def __init__(
        self,
        dataset_len: int,
        batch_size: int,
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
        self.dataset_len, self.batch_size = dataset_len, batch_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(epoch, start_batch)

    def set_epoch(self, epoch: int, start_batch: int = 0, max_batches: int | None = None) -> None:
        """The epoch of the next iteration; `start_batch` batches of it count as seen (resuming in mid-epoch), and at
        most `max_batches` follow."""
        self.epoch, self.start_batch, self.max_batches = epoch, start_batch, max_batches

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        whole, rest = divmod(self.dataset_len, self.batch_size * self.world_size)
        return whole + int(not self.drop_last and rest > self.rank)

    def __len__(self) -> int:
        left = max(self.batches_per_epoch - self.start_batch, 0)
        return left if self.max_batches is None else min(left, self.max_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self._order()
        global_size = self.batch_size * self.world_size
        for batch in range(self.start_batch, self.start_batch + len(self)):
            start = batch * global_size
            mine = order[
                start + self.rank : min(start + global_size, self.dataset_len) : self.world_size
            ]
            yield [(epoch, index) for index in mine.tolist()]

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.dataset_len)
        return torch.randperm(
            self.dataset_len, generator=SampleRandom.of(self.seed, self.epoch).torch
        )
