"""Options and settings that all tests share."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


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
    """Counting multiply-adds is a good part of the time of a small run; the tests of the summary do it."""
    if request.node.path.name not in (
        "test_model_summary.py",
        "test_scripts.py",
        "test_deformable_runs.py",
    ):
        monkeypatch.setattr("util.runs.model_summary._multiply_adds_or_none", lambda *args: None)


def pytest_unconfigure() -> None:
    """Where a test failed or was broken off, pytest would wait for its loader processes."""
    from util.runs.session import end_loaders

    end_loaders()
