"""Distributed training: launch, rank, and collectives on any backend (NCCL on GPUs, gloo on CPUs)."""

import contextlib
import datetime
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util.errors import LostProcess, UserError
from util.slurm import slurm_tasks

# By name: `util.logger` imports this module to ask for the rank.
log = logging.getLogger("predetr")

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# A rank that prepares data or evaluates alone may keep the others waiting for longer than PyTorch's default.
TIMEOUT_MINUTES = 120.0
# Time in which the other processes of a failed collective say where they wait.
REPORT_SECONDS = 3.0
# Gloo raises plain RuntimeErrors, which name its source files.
GLOO = "gloo/"
Result = TypeVar("Result")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    """Turn the failure of a collective in the block into one line that names it, this rank, and who did not come.

    With NCCL, whose collectives are asynchronous, PyTorch's watchdog ends the process instead.

    Raises:
        LostProcess: another process died, or did not come within the time limit.
    """
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if not (is_distributed() and (isinstance(error, dist.DistError) or GLOO in str(error))):
            raise
        seconds = time.monotonic() - start
        raise LostProcess(
            f"rank {get_rank()} waited {seconds:.1f} s in {name}, and {_others_in_collective(name)}"
        ) from error


def _others_in_collective(name: str) -> str:
    """Return what the other processes do while this one has failed in a collective.

    Each process that fails writes where it is to the launcher's store: who does not is stuck elsewhere, or dead.
    """
    others = [rank for rank in range(get_world_size()) if rank != get_rank()]
    if not _stores:  # a group of the user's own program
        return "another process did not come"
    try:
        reports = dist.PrefixStore("lost", _stores[-1])
        reports.set(str(get_rank()), name)
        with contextlib.suppress(dist.DistStoreError):
            seconds = datetime.timedelta(seconds=REPORT_SECONDS)
            reports.wait([str(rank) for rank in others], seconds)
        found = {
            rank: reports.get(str(rank)).decode() for rank in others if reports.check([str(rank)])
        }
    except RuntimeError:  # the process that has the store is gone, too
        return "another process did not come"
    missing = [f"rank {rank} did not come" for rank in others if rank not in found]
    elsewhere = [f"rank {rank} was in {place}" for rank, place in found.items() if place != name]
    return ", ".join([*missing, *elsewhere]) or "so did all others"


def barrier() -> None:
    if is_distributed():
        with collective("barrier"):
            dist.barrier()


def all_gather_object(obj: Any) -> list[Any]:
    """Return the objects of all ranks, in their order, on every rank."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    with collective("all_gather of objects"):
        dist.all_gather_object(gathered, obj)
    return gathered


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if is_distributed():
        with collective("all_reduce"):
            dist.all_reduce(tensor)
    return tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors with those of rank 0, in place."""
    if not is_distributed():
        return
    with collective("broadcast of tensors"):
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def unwrap_model(model: nn.Module) -> Any:
    """Return the model without its DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def broadcast_batch_norm_stats(model: nn.Module) -> None:
    """Overwrite the batch norm statistics with those of rank 0.

    Each rank has seen other images. Before an evaluation all ranks take the statistics that a checkpoint saves.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    broadcast_tensors(buffer for norm in norms for buffer in norm.buffers())


def compute_on_rank0(compute: Callable[[], Result]) -> Result:
    """Call a function on rank 0 only and return its result on every rank; the others wait.

    Raises:
        UserError: On every rank, if the function raises it or a subclass.
    """
    if not is_distributed():
        return compute()

    result_or_error: list[Any] = [None, None]
    if is_main_process():
        try:
            result_or_error[0] = compute()
        except UserError as error:
            # Raising here would leave the other ranks waiting in the broadcast.
            result_or_error[1] = error
    with collective("broadcast of what rank 0 computes"):
        dist.broadcast_object_list(result_or_error, src=0)

    result, error = result_or_error
    if error is not None:
        raise error
    return result


def _slurm_environment() -> None:
    """Translate the environment of an `srun` task into torchrun's; a single task needs no process group."""
    tasks = slurm_tasks()
    if tasks < 2 or "RANK" in os.environ:
        return

    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    # Jobs that share a node need different ports. Clients of the system get theirs from 32768 on.
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(tasks)

    # With --gpus-per-task=1 a task sees its own GPU only, as cuda:0, whatever its number on the node.
    has_own_gpu = torch.cuda.device_count() == 1
    local_rank = "0" if has_own_gpu else os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("LOCAL_RANK", local_rank)


def _first_slurm_host() -> str:
    """Return the first host of the SLURM job.

    Raises:
        UserError: scontrol is not available or fails.
    """
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            "SLURM run without MASTER_ADDR: export MASTER_ADDR=<first host> and MASTER_PORT before srun"
        ) from error


def check_device(device: str) -> torch.device:
    """Return the device.

    Raises:
        UserError: The GPU does not exist.
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return wanted
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: no CUDA GPU is visible to PyTorch {torch.__version__}; use --device cpu"
        )
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0; use one of them"
        )
    return wanted


def select_device(device: str) -> torch.device:
    """Check the device and make it the current one, which streams, events and pinned memory use.

    Raises:
        UserError: The GPU does not exist.
    """
    wanted = check_device(device)
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(device)
    return wanted


def init_distributed(
    device: str, dist_url: str = "env://", timeout_minutes: float = TIMEOUT_MINUTES
) -> torch.device:
    """Join the process group if torchrun, `torch.distributed.launch --use_env` or srun started this process.

    The backend is NCCL for GPUs and gloo for CPUs. A process that was started alone stays without a group. A second
    call has no effect.

    Args:
        timeout_minutes: How long a collective, and this function, waits for the other processes.

    Returns:
        The device of this process: with a group and GPUs, the GPU with the local rank.

    Raises:
        UserError: The GPU does not exist, or not all processes come.
    """
    _slurm_environment()
    use_cuda = check_device(device).type == "cuda"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return select_device(device)

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
                "start fewer processes per node"
            )
        # Before NCCL starts: collectives run on the current GPU.
        torch.cuda.set_device(local_rank)
    own_device = torch.device("cuda", local_rank) if use_cuda else torch.device(device)
    if dist.is_initialized():
        return own_device

    address = _init_address(dist_url)
    log.info("waiting for %s processes at %s", os.environ["WORLD_SIZE"], address)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=_meeting_place(dist_url, rank, world_size, timeout),
            timeout=timeout,
            world_size=world_size,
            rank=rank,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"rank {rank}: not all of {world_size} processes came to {address} within {timeout_minutes:g} minutes; "
            "start all of them, or give them more time with --dist_timeout_minutes"
        ) from error
    log.info("distributed: %d processes, %s", get_world_size(), dist.get_backend())
    return own_device


_stores: list[dist.Store] = []  # of the groups that this process joins, one after the other


def _meeting_place(
    dist_url: str, rank: int, world_size: int, timeout: datetime.timedelta
) -> dist.Store:
    """Return the store through which the processes of the next group find each other.

    A program may train several times, each time in a new group. The launcher's store still has the addresses of an
    earlier group, so that processes would wait for each other at these: each group has keys of its own.
    """
    store, _, _ = next(rendezvous(dist_url, rank, world_size, timeout=timeout))
    _stores.append(dist.PrefixStore(f"group_{len(_stores)}", store))
    return _stores[-1]


def _init_address(dist_url: str) -> str:
    """Return the address at which the processes meet, for the log."""
    if dist_url != "env://":
        return dist_url
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def shutdown() -> None:
    if is_distributed():
        dist.destroy_process_group()
