"""Options and settings that all tests share."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(ROOT / "tests" / "golden"), help="folder of golden files, see tests/golden/README.md")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
