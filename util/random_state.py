"""Random numbers: independent streams per sample or epoch, and the states of the global generators for checkpoints.

The streams depend only on (seed, epoch, index), not on which dataloader worker makes the sample or when.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

_UNSIGNED = 2**64


class SampleRNG:
    """Three independent streams, because published pipelines draw from three libraries. Each is created on first use.

    Attributes:
        python: `random.Random`.
        numpy: `numpy.random.RandomState`.
        torch: `torch.Generator` on the CPU.
    """

    def __init__(self, seed: int) -> None:
        self._seeds = _hash_seeds(seed)

    @classmethod
    def from_key(cls, seed: int, epoch: int, index: int = -1) -> "SampleRNG":
        """Return the streams of a sample, or without an index those of the epoch."""
        rng = cls.__new__(cls)
        rng._seeds = _hash_seeds(seed, epoch, index)
        return rng

    @classmethod
    def from_seeds(cls, python: int = 0, numpy: int = 0, torch: int = 0) -> "SampleRNG":
        """Return streams with raw seeds, as `random.seed`, `numpy.random.seed` and `torch.manual_seed` set them."""
        rng = cls.__new__(cls)
        rng._seeds = (python, numpy, torch)
        return rng

    @cached_property
    def python(self) -> random.Random:
        return random.Random(self._seeds[0])

    @cached_property
    def numpy(self) -> np.random.RandomState:
        return np.random.RandomState(self._seeds[1])

    @cached_property
    def torch(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seeds[2])


def _hash_seeds(*key: int) -> tuple[int, int, int]:
    """Hash a key into one seed per stream, so that the streams of neighboring keys are independent."""
    # SeedSequence takes no negative numbers, and seeds or the index -1 may be negative.
    words = np.random.SeedSequence([value % _UNSIGNED for value in key]).generate_state(3)
    return int(words[0]), int(words[1]), int(words[2])


def get_rng_states() -> dict[str, Any]:
    """Return the states of all global random generators: Python, NumPy, PyTorch and every GPU.

    They are plain containers and tensors, which `torch.load(weights_only=True)` accepts.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, gauss_next = random.getstate()
    return {
        "python": [version, list(numbers), gauss_next],
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_states(states: Mapping[str, Any]) -> None:
    """Restore the states from `get_rng_states`. If there are fewer GPUs now, the states of the others are ignored."""
    version, numbers, gauss_next = states["python"]
    random.setstate((version, tuple(numbers), gauss_next))

    legacy = states["numpy"]
    keys = legacy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))

    # Generators take their state from the CPU, wherever the checkpoint was loaded to.
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)


@contextlib.contextmanager
def unchanged_rng_states() -> Iterator[None]:
    """Restore the states of all global random generators at the end of the block, whatever is drawn in it."""
    states = get_rng_states()
    try:
        yield
    finally:
        set_rng_states(states)
