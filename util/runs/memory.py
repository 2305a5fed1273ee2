"""Memory of a training step: what the backward pass keeps, what is available, and the batch that fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Fraction of the available memory that `--batch_size auto` fills. The rest is for what the estimate does not know:
# fragmentation, workspaces of convolutions, on a CPU also the dataloader workers.
FILL = {"cuda": 0.85, "cpu": 0.7}
# Memory in use at the peak, relative to what the backward pass keeps: temporary tensors and what the allocator holds.
# Measured on a CPU, see docs/performance.md.
PEAK = 1.2
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of optimizer state per trainable parameter
CGROUP_LIMITS = (  # (limit, usage) of a container, version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a training step needs in addition to the weights, in bytes.

    parameters: gradients and optimizer state. activations: what the forward pass of one image keeps for the backward
    pass, and the gradients that are in flight there.
    """

    parameters: int
    activations: int

    def step(self, batch_size: int) -> int:
        """Return the bytes of a step on `batch_size` images."""
        return self.parameters + batch_size * self.activations

    def largest_batch(self, available: float) -> int:
        """Return the largest number of images that fit; 0 if none does."""
        return max(int(available - self.parameters) // max(self.activations, 1), 0)


class SavedBytes:
    """Sum of the memory that the backward pass keeps, each block once.

    Attributes:
        total: bytes of all blocks.
        largest: bytes of the largest one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = self.largest = 0
        self.seen = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*model.parameters(), *model.buffers()]
        }

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor


@contextmanager
def counting_saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what forward passes in this context keep for the backward pass, parameters and buffers excepted.

    The graph must stay alive inside of the context: freed memory may be counted twice.
    """
    saved = SavedBytes(model)
    with saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


@contextmanager
def counting_outputs(network: nn.Module) -> Iterator[list[int]]:
    """Yield a list of the bytes of every module's output in this context."""
    sizes: list[int] = []

    def add(_module: nn.Module, _inputs: tuple, output: object) -> None:
        sizes.append(output.nbytes if isinstance(output, Tensor) else 0)

    hooks = [module.register_forward_hook(add) for module in network.modules()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def nothing_changes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random states and buffers, such as batch norm statistics, after a trial forward pass."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def parameter_bytes(model: nn.Module, optimizer: str, averaged: bool = False) -> int:
    """Return the bytes of gradients and optimizer state of the trainable parameters.

    Args:
        optimizer: a key of `MOMENTS`.
        averaged: with `--ema`, which holds every parameter and buffer once more.
    """
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    state = [*model.parameters(), *model.buffers()] if averaged else []
    return (1 + MOMENTS[optimizer]) * sum(sizes) + sum(tensor.nbytes for tensor in state)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    limits = [
        limit
        for limit in (_memory_of_system(), *map(_memory_of_container, CGROUP_LIMITS))
        if limit is not None
    ]
    return min(limits, default=None)


def _memory_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    values = dict(line.split(":") for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024  # in kB


def _memory_of_container(files: tuple[str, str]) -> int | None:
    try:
        limit, used = (int(Path(name).read_text(encoding="ascii")) for name in files)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(limit - used, 0)
