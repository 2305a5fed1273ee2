"""A process that does not come to a collective ends the others in one line, instead of keeping them waiting."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.two_processes import free_port
from util import distributed
from util.distributed import (
    all_gather_object,
    all_reduce_sum,
    barrier,
    compute_on_rank0,
    get_rank,
    init_distributed,
)
from util.errors import DiskError, UserError

SECONDS = 3.0


def _stuck() -> None:
    """Rank 1 is busy with something else."""
    barrier()
    if get_rank() == 1:
        time.sleep(1000)
    all_reduce_sum(torch.ones(2))


def _elsewhere() -> None:
    """Rank 1 takes another way through the code."""
    barrier()
    if get_rank() == 1:
        all_gather_object("another way")
    else:
        all_reduce_sum(torch.ones(2))


def _dead() -> None:
    barrier()
    if get_rank() == 1:
        os._exit(9)
    all_reduce_sum(torch.ones(2))


def _refused() -> None:
    """Only rank 0 looks."""

    def fail() -> None:
        raise DiskError("cannot read args.json: stale file handle", "  ls first\n  ls second")

    compute_on_rank0(fail)


def _process(
    scenario: Callable, rank: int, port: int, output: Path, seconds: float, report_seconds: float
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.REPORT_SECONDS = report_seconds
    try:
        init_distributed("cpu", timeout_minutes=seconds / 60)
        scenario()
    except UserError as error:
        output.write_text(f"{type(error).__name__}: {error}")
    os._exit(1)


def errors_of(
    scenario: Callable,
    folder: Path,
    ranks: tuple[int, ...] = (0, 1),
    awaited: tuple[int, ...] = (0,),
    seconds: float = SECONDS,
    report_seconds: float = 1.0,
) -> list[str]:
    """Run a scenario in two processes, and return the errors of those whose end is awaited.

    They are forked, so that they need not import PyTorch.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    outputs = [folder / f"rank_{rank}" for rank in ranks]
    processes = [
        context.Process(
            target=_process, args=(scenario, rank, port, output, seconds, report_seconds)
        )
        for rank, output in zip(ranks, outputs, strict=True)
    ]
    for process in processes:
        process.start()
    for rank in awaited:
        processes[rank].join()
    for process in processes:
        process.kill()
        process.join()
    return [outputs[rank].read_text() for rank in awaited]


def test_process_that_is_stuck_is_named(tmp_path: Path) -> None:
    (error,) = errors_of(_stuck, tmp_path)
    assert error.startswith("LostProcess: rank 0 waited ")
    assert error.endswith(" s in all_reduce, and rank 1 did not come")


@pytest.mark.slow
def test_process_in_another_collective_is_named(tmp_path: Path) -> None:
    first, second = errors_of(_elsewhere, tmp_path, awaited=(0, 1), report_seconds=60)
    assert first.endswith("in all_reduce, and rank 1 was in all_gather of objects")
    # Rank 0 has the store here, and may be gone with it when rank 1 asks. With torchrun the launcher has it.
    assert second.endswith(
        (
            "in all_gather of objects, and rank 0 was in all_reduce",
            "in all_gather of objects, and another process did not come",
        )
    )


def test_process_that_died_is_named(tmp_path: Path) -> None:
    (error,) = errors_of(_dead, tmp_path, seconds=60)
    assert error.endswith("in all_reduce, and rank 1 did not come")


def test_process_that_never_starts(tmp_path: Path) -> None:
    (error,) = errors_of(_stuck, tmp_path, ranks=(0,), seconds=1)
    assert error.startswith("UserError: rank 0: not all of 2 processes came to 127.0.0.1:")
    assert "--dist_timeout_minutes" in error


def test_all_ranks_get_the_error_of_rank_0_as_it_is(tmp_path: Path) -> None:
    """With its kind, and the lines below it."""
    first, second = errors_of(_refused, tmp_path, awaited=(0, 1))
    assert first == second
    assert first == ("DiskError: cannot read args.json: stale file handle\n  ls first\n  ls second")
