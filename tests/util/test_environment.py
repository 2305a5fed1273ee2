"""An old Python or PyTorch: entry scripts say what is needed, before they import anything else."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

from util.environment import MIN_PYTHON, MIN_TORCH, check_environment

ROOT = Path(__file__).resolve().parents[2]
# What Python 3.7 compiles before the check.
SCRIPTS = ("main.py", "finetune_main.py", "run_with_submitit.py")
FILES = (*SCRIPTS, "detr_main.py", "util/__init__.py", "util/environment.py")


def test_this_environment_is_new_enough() -> None:
    check_environment()


@pytest.mark.parametrize(
    ("python", "torch", "found"),
    [
        ((3, 7, 16), "1.8.0", "Python 3.7"),
        ((3, 10, 0), "1.13.1+cu117", "Python 3.10, PyTorch 1.13.1+cu117"),
        ((3, 10, 0), "2.6.0", "PyTorch 2.6.0"),
    ],
)
def test_old_versions_are_named_in_one_line(
    python: tuple[int, ...], torch: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
    with pytest.raises(SystemExit) as stop:
        check_environment()
    message = str(stop.value)
    assert "needs Python 3.10 and PyTorch 2.7 or later" in message
    assert found in message
    assert "\n" not in message


def test_bounds_are_those_of_the_package() -> None:
    python, torch = (".".join(map(str, bound)) for bound in (MIN_PYTHON, MIN_TORCH))
    assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()
    assert f"torch>={torch}" in (ROOT / "requirements.txt").read_text().splitlines()


@pytest.mark.parametrize("name", FILES)
def test_scripts_check_first(name: str) -> None:
    """Old Pythons parse these files, and the entry scripts import nothing of the project before the check."""
    tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 7))
    if name not in SCRIPTS:
        return
    lines = [ast.unparse(node) for node in tree.body[1:]]  # without the docstring
    check = lines.index("check_environment()")
    assert set(lines[:check]) <= {"import os", "from util.environment import check_environment"}
