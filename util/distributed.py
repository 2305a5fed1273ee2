"""Processes: start, rank, collectives on any backend (NCCL on GPUs, gloo on CPUs)."""

import datetime
import logging
import os
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError

log = logging.getLogger("predetr")  # by name, since util.logger asks this module who writes

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Result = TypeVar("Result")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_gather_object(obj: Any) -> list[Any]:
    """The object of every process, by rank, on every process."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; the tensor itself in a single process."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """The values of the first process, in place."""
    for tensor in tensors if is_distributed() else ():
        dist.broadcast(tensor, 0)


def unwrap_model(model: nn.Module) -> Any:
    """The model without its DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_statistics(model: nn.Module) -> None:
    """Batch norm of each process has seen other images: before an evaluation all take those of the first, which a
    checkpoint holds.
    """
    norms = [part for part in model.modules() if isinstance(part, BATCH_NORMS)]
    broadcast(buffer for norm in norms for buffer in norm.buffers())


def from_main(make: Callable[[], Result]) -> Result:
    """What the main process makes, on every process; the others wait for it.

    Raises:
        UserError: on every process, where `make` raised it.
    """
    if not is_distributed():
        return make()
    made: list[Any] = [None, None]
    if is_main_process():
        try:
            made[0] = make()
        except UserError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise UserError(made[1])
    return made[0]


def _slurm_environment() -> None:
    """Translates an `srun` task into the environment of torchrun; one task alone needs no process group.

    The shell of a batch job has SLURM_PROCID and SLURM_NTASKS too, but is no task: only srun's steps say how many tasks
    they have.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in os.environ or tasks < 2 or "RANK" in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], str(tasks)
    alone = (
        torch.cuda.device_count() == 1
    )  # each task sees its own GPU and no other, as with --gpus-per-task=1
    os.environ.setdefault("LOCAL_RANK", "0" if alone else os.environ.get("SLURM_LOCALID", "0"))


def _first_slurm_host() -> str:
    """Raises UserError where SLURM does not tell."""
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            "SLURM run without MASTER_ADDR: export MASTER_ADDR=<first host> and MASTER_PORT before srun"
        ) from error


def check_device(device: str) -> torch.device:
    """
    Raises:
        UserError: there is no such GPU.
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


def use_device(device: str) -> torch.device:
    """Checks the device and makes it the current one: streams, events and pinned memory go by that."""
    wanted = check_device(device)
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(device)
    return wanted


def init_distributed(device: str, dist_url: str = "env://") -> torch.device:
    """Joins the process group when started by torchrun, `torch.distributed.launch --use_env` or srun; returns the
    device.

    NCCL where the device is a GPU, gloo on CPUs. A single process stays without a group, and a second call changes
    nothing.
    """
    _slurm_environment()
    use_cuda = check_device(device).type == "cuda"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return use_device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
                "start fewer processes a node"
            )
        torch.cuda.set_device(local_rank)
    own = torch.device("cuda", local_rank) if use_cuda else torch.device(device)
    if dist.is_initialized():
        return own
    log.info("waiting for %s processes at %s", os.environ["WORLD_SIZE"], _meeting_place(dist_url))
    # A process that prepares data or evaluates alone may keep the others waiting for longer than the default.
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        init_method=dist_url,
        timeout=datetime.timedelta(hours=2),
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
    )
    log.info("distributed: %d processes, %s", get_world_size(), dist.get_backend())
    return own


def _meeting_place(dist_url: str) -> str:
    return (
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if dist_url == "env://"
        else dist_url
    )


def shutdown() -> None:
    if is_distributed():
        dist.destroy_process_group()
