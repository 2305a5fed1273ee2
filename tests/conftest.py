"""Options and fixtures that all tests share."""

from pathlib import Path

import pytest
import torch

from util.runs.memory import MemoryEstimate

ROOT = Path(__file__).resolve().parent.parent
# Test files that look at the number of multiply-adds.
COUNTING_TESTS = ("test_model_summary.py", "test_scripts.py", "test_deformable_runs.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(ROOT / "tests" / "golden"),
        help="folder of golden files, see tests/golden/README.md",
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip counting multiply-adds, which takes a good part of the time of a small run."""
    if request.node.path.name not in COUNTING_TESTS:
        monkeypatch.setattr("util.runs.model_summary._multiply_adds_or_none", lambda *args: None)


@pytest.fixture(autouse=True)
def _no_memory_estimate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the forward pass that estimates the memory, except in the tests of it."""
    if request.node.path.name != "test_memory.py":
        estimate = MemoryEstimate(parameters=0, activations=0)
        monkeypatch.setattr("memory.estimate_memory", lambda *args: estimate)


def pytest_unconfigure() -> None:
    """End dataloader workers: after a failed or interrupted test, pytest would wait for them."""
    from util.runs.session import kill_dataloader_workers

    kill_dataloader_workers()
