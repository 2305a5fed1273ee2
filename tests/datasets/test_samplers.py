"""Order of samples over ranks, epochs and resumed runs; random numbers of a sample."""

import numpy as np
import pytest
import torch

from datasets.samplers import EpochSampler, EqualSizeSampler
from util.random_state import SampleRNG


def batches(**settings) -> list[list[tuple[int, int]]]:
    defaults = {"dataset_len": 23, "batch_size": 4, "shuffle": True, "seed": 7, "drop_last": True}
    return list(EpochSampler(**{**defaults, **settings}))


def test_ranks_together_equal_one_process() -> None:
    whole = batches(batch_size=4)
    parts = [batches(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole) == 5
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(parts[0][step] + parts[1][step])
        assert parts[0][step] == batch[0::2]


def test_each_epoch_has_its_own_permutation_and_number() -> None:
    first, second = batches(epoch=0), batches(epoch=1)
    assert first != second
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert second == batches(epoch=1)
    assert [i for batch in first for _, i in batch] != [
        i for batch in batches(epoch=0, seed=8) for _, i in batch
    ]
    orders = [batches(epoch=epoch, seed=seed) for seed in range(4) for epoch in range(4)]
    assert len({tuple(i for batch in order for _, i in batch) for order in orders}) == 16, (
        "no two epochs have the same order, also with different seeds"
    )


def test_resume_in_mid_epoch() -> None:
    sampler = EpochSampler(23, 4, shuffle=True, seed=7, drop_last=True)
    sampler.set_epoch(2, start_batch=3)
    assert list(sampler) == batches(epoch=2)[3:]
    assert len(sampler) == 2
    sampler.set_epoch(3)
    assert list(sampler) == batches(epoch=3)


@pytest.mark.parametrize("dataset_len", [1, 7, 8, 9, 10, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(dataset_len: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        sampler = EpochSampler(dataset_len, 4, shuffle=False, rank=rank, world_size=world_size)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        assert all(batch for batch in mine)
        seen += [index for batch in mine for _, index in batch]
    assert sorted(seen) == list(range(dataset_len))


def sizes_of_draws(epoch: int, indices: list[int]) -> np.ndarray:
    """A size per (epoch, index), of widely different areas and aspect ratios."""
    keys = [SampleRNG.from_key(9, epoch, index).python for index in indices]
    return np.array([(rng.randint(20, 80), rng.randint(20, 80)) for rng in keys])


def padded_per_image_pixel(order: list[list[tuple[int, int]]]) -> float:
    sizes = [sizes_of_draws(batch[0][0], [index for _, index in batch]) for batch in order]
    padded = sum(len(batch) * int(batch.max(0).prod()) for batch in sizes)
    return padded / sum(int(batch.prod(1).sum()) for batch in sizes) - 1


BUCKETS = {"dataset_len": 1003, "batch_size": 4, "final_sizes": sizes_of_draws}


def test_sorted_batches_have_little_padding() -> None:
    plain = batches(dataset_len=1003, epoch=2)
    by_size = batches(**BUCKETS, epoch=2)
    assert len(by_size) == len(plain) == 250
    # The same images, also those that are dropped: the last ones of the random order.
    assert sorted(sum(by_size, [])) == sorted(sum(plain, []))
    assert padded_per_image_pixel(plain) > 0.7
    assert padded_per_image_pixel(by_size) < 0.3
    # Sorted within chunks of 32 batches only, and in random order there.
    assert set(sum(by_size[:32], [])) == set(sum(plain[:32], []))
    areas = [sizes_of_draws(2, [i for _, i in batch]).prod(1).mean() for batch in by_size[:32]]
    assert areas != sorted(areas)
    assert by_size == batches(**BUCKETS, epoch=2)
    assert [i for _, i in by_size[0]] != [i for _, i in batches(**BUCKETS, epoch=3)[0]]


def test_sorted_batches_of_ranks_and_resumed_runs() -> None:
    whole = batches(**BUCKETS)
    parts = [batches(**{**BUCKETS, "batch_size": 2}, rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert (batch[0::2], batch[1::2]) == (first, second)
    for start in (0, 1, 31, 32, 33, 250):
        assert batches(**BUCKETS, start_batch=start) == whole[start:]


def test_resumed_run_does_not_size_finished_chunks() -> None:
    sized: list[int] = []

    def count(epoch: int, indices: list[int]) -> np.ndarray:
        sized.extend(indices)
        return sizes_of_draws(epoch, indices)

    next(iter(EpochSampler(1003, 4, shuffle=True, start_batch=40, final_sizes=count)))
    assert len(sized) == 32 * 4  # the second chunk alone


@pytest.mark.parametrize("own", [{"dataset_len": 1003}, BUCKETS], ids=["random", "by size"])
def test_epoch_continues_with_other_batch_sizes(own: dict) -> None:
    """Parts of an epoch with 4, 6 and 2 x 5 images per step: no image comes twice, and all but an incomplete batch."""
    parts = [(4, 40), (6, 50)]
    seen = sum(batches(**{**own, "batch_size": 4})[:40], [])
    sampler = EpochSampler(seed=7, shuffle=True, drop_last=True, **{**own, "batch_size": 6})
    sampler.set_epoch(0, earlier=parts[:1])
    assert len(sampler) == (1003 - 160) // 6
    seen += sum(list(sampler)[:50], [])

    by_rank = []
    for rank in range(2):
        settings = {**own, "batch_size": 5, "rank": rank, "world_size": 2}
        sampler = EpochSampler(seed=7, shuffle=True, drop_last=True, **settings)
        sampler.set_epoch(0, start_batch=3, earlier=parts)
        by_rank.append(list(sampler))
        assert len(by_rank[-1]) == len(sampler) == (1003 - 160 - 300) // 10 - 3
        sampler.set_epoch(0, earlier=parts, max_batches=3)
        seen += sum(sampler, [])
    seen += sum(sum(by_rank, []), [])
    assert len(seen) == 1000
    assert len(set(seen)) == 1000


def few_sizes(epoch: int, indices: list[int]) -> np.ndarray:
    """Six sizes; every 50th image is a bad one."""
    keys = [SampleRNG.from_key(9, epoch, index).python for index in indices]
    sizes = [(rng.choice([20, 30]), rng.choice([20, 30, 40])) for rng in keys]
    return np.array([(1, 1) if i % 50 == 0 else hw for i, hw in zip(indices, sizes, strict=True)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_in_batches_of_equal_size(world_size: int) -> None:
    """Each image once, without padding, the first ones first, and the work dealt evenly."""
    seen, counts = [], []
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        sampler = EqualSizeSampler(203, 4, few_sizes, in_order=5 * world_size, **ranks)
        mine = [[index for _, index in batch] for batch in sampler]
        assert len(mine) == len(sampler)
        assert mine[:5] == [[i] for i in range(rank, 5 * world_size, world_size)]
        assert all(len(np.unique(few_sizes(0, batch), axis=0)) == 1 for batch in mine)
        assert max(map(len, mine)) == 4
        assert {epoch for batch in sampler for epoch, _ in batch} == {0}
        assert all(len(batch) == 1 for batch in mine if batch[0] % 50 == 0)
        areas = [few_sizes(0, batch)[0].prod() for batch in mine if batch[0] % 50][5:]
        assert areas == sorted(areas, reverse=True)
        seen += sum(mine, [])
        counts.append(len(mine))
    assert sorted(seen) == list(range(203))
    assert max(counts) - min(counts) <= 1


def test_equal_sizes_of_few_images() -> None:
    assert list(EqualSizeSampler(2, 4, few_sizes, in_order=12)) == [[(0, 0)], [(0, 1)]]
    assert list(EqualSizeSampler(0, 4, few_sizes)) == []


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="batch size 0"):
        EpochSampler(10, 0, shuffle=False)
    with pytest.raises(ValueError, match="batch size 0"):
        EqualSizeSampler(10, 0, few_sizes)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochSampler(10, 1, shuffle=False, rank=2, world_size=2)


def draw_numbers(rng: SampleRNG) -> tuple[float, float, float]:
    return rng.python.random(), float(rng.numpy.rand()), float(torch.rand(1, generator=rng.torch))


def test_random_numbers_are_a_function_of_seed_epoch_and_index() -> None:
    assert draw_numbers(SampleRNG.from_key(1, 2, 3)) == draw_numbers(SampleRNG.from_key(1, 2, 3))
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1), (-1, 2, 3)]
    assert len({draw_numbers(SampleRNG.from_key(*key)) for key in keys}) == len(keys)


def test_streams_are_independent_of_each_other() -> None:
    one, other = SampleRNG(5), SampleRNG(5)
    one.python.random()
    assert one.numpy.rand() == other.numpy.rand()
    assert torch.equal(torch.rand(2, generator=one.torch), torch.rand(2, generator=other.torch))


def test_streams_from_seeds_equal_those_of_the_libraries() -> None:
    rng = SampleRNG.from_seeds(python=3, numpy=4, torch=5)
    assert rng.numpy.randint(1000) == np.random.RandomState(4).randint(1000)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    expected = torch.randint(0, 1000, (3,))
    torch.set_rng_state(state)
    assert torch.equal(torch.randint(0, 1000, (3,), generator=rng.torch), expected)
