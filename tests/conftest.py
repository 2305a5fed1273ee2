"""Options and fixtures that all tests share.

PyTorch is imported where it is used: with pytest -n, the process that starts the workers needs none of it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# Test files that look at the number of multiply-adds, and at curves.png.
COUNTING_TESTS = ("test_model_summary.py", "test_scripts.py", "test_deformable_runs.py")
CURVES_TESTS = ("test_folder.py",)
# Networks as text -> names of each convolution with the frozen norm that follows it.
folded_names: dict[str, list[tuple[str, str]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(ROOT / "tests" / "golden"),
        help="folder of golden files, see tests/golden/README.md",
    )


def pytest_collection_finish() -> None:
    """Exclude what the imports created from garbage collection, which would visit it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


# These are as wide as a module, so that they hold for the runs of its fixtures too.


@pytest.fixture(scope="module", autouse=True)
def _no_counting(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip counting multiply-adds, which takes a good part of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in COUNTING_TESTS:
            patch.setattr("util.runs.model_summary._multiply_adds_or_none", lambda *args: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_memory_estimate(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip the forward pass that estimates the memory, except in the tests of it."""
    from util.runs.memory import MemoryEstimate

    estimate = MemoryEstimate(parameters=0, activations=0)
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_memory.py":
            patch.setattr("memory.estimate_memory", lambda *args: estimate)
        yield


@pytest.fixture(scope="module", autouse=True)
def _blank_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write a blank curves.png: drawing it after every epoch takes longer than the epoch of a small run."""
    from PIL import Image

    blank = Image.new("RGB", (8, 8))
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in CURVES_TESTS:
            patch.setattr("util.runs.page.plot_logs", lambda logs, fields, path: blank.save(path))
        yield


@pytest.fixture(scope="module", autouse=True)
def _norms_found_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Find the norms that convolutions apply once per architecture: it is half of the time to build a small model."""
    from models import frozen_norm

    find = frozen_norm._find_pairs

    def find_once(network: nn.Module) -> list[tuple]:
        key = repr(network)
        if key not in folded_names:
            names = {module: name for name, module in network.named_modules()}
            folded_names[key] = [(names[conv], names[norm]) for conv, norm in find(network)]
        modules = dict(network.named_modules())
        return [(modules[conv], modules[norm]) for conv, norm in folded_names[key]]

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_frozen_norm.py":
            patch.setattr(frozen_norm, "_find_pairs", find_once)
        yield


def pytest_unconfigure() -> None:
    """End dataloader workers: after a failed or interrupted test, pytest would wait for them."""
    if "torch" in sys.modules:
        from util.runs.session import kill_dataloader_workers

        kill_dataloader_workers()
