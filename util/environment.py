"""The oldest Python and PyTorch that the project runs on. This file itself runs on any Python 3."""

import re
import sys

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 7)  # also in requirements.txt


def check_environment() -> None:
    """Leave an entry script with one line under an old Python or PyTorch, before anything that they can't import.

    The published codebases' environments have Python 3.7 and PyTorch 1.x.
    """
    found = "Python {}.{}".format(*sys.version_info[:2])  # noqa: UP032, as in the rest: for any Python 3
    is_old = sys.version_info < MIN_PYTHON
    if not is_old:
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version("torch")
        except PackageNotFoundError:
            return  # its import says so
        found += ", PyTorch " + installed
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        is_old = bool(numbers) and tuple(map(int, numbers.groups())) < MIN_TORCH
    if is_old:
        raise SystemExit(
            "error: PreDETR needs Python 3.10 and PyTorch 2.7 or later, this is "
            + found
            + ": install it in a new environment (docs/installation.md); checkpoints of the old one can be read"
        )
