"""Random numbers of one sample or epoch, a function of (seed, epoch, index) whatever worker makes it and when; and the
states of the global generators, which checkpoints hold.
"""

import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

_UNSIGNED = 2**64


class SampleRandom:
    """Three independent streams, made when first used, because published pipelines draw from three libraries.

    `python` is a `random.Random`, `numpy` a `numpy.random.RandomState`, `torch` a CPU `torch.Generator`.
    """

    def __init__(self, seed: int) -> None:
        self._seeds = _hash_seeds(seed)

    @classmethod
    def of(cls, seed: int, epoch: int, index: int = -1) -> "SampleRandom":
        """The streams of sample `index` in `epoch` of a run with `seed`; without an index those of the epoch itself."""
        state = cls.__new__(cls)
        state._seeds = _hash_seeds(seed, epoch, index)
        return state

    @classmethod
    def fixed(cls, python: int = 0, numpy: int = 0, torch: int = 0) -> "SampleRandom":
        """Streams with these raw seeds, as `random.seed`, `numpy.random.seed` and `torch.manual_seed` set them."""
        state = cls.__new__(cls)
        state._seeds = (python, numpy, torch)
        return state

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
    words = np.random.SeedSequence([value % _UNSIGNED for value in key]).generate_state(3)
    return int(words[0]), int(words[1]), int(words[2])


def random_states() -> dict[str, Any]:
    """The states of all global random generators (python, numpy, torch, every GPU) as plain containers and tensors."""
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


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restores what `random_states` gave; with fewer GPUs than then, only theirs."""
    version, numbers, gauss_next = states["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    legacy = states["numpy"]
    keys = legacy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)
