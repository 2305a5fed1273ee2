"""What `pip install -e .` installs: the project's commands, and the names below, from any directory.

    from predetr import Predictor, build_model, settings

The project's own packages are not installed, since other projects have packages of these names too, such as `datasets`
of Hugging Face. Importing `predetr` changes nothing. The first use of a name above puts the project's folder at the
front of `sys.path`: from then on `import datasets` is the project's, in this process alone.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.2.0"
__all__ = ["Predictor", "build_model", "settings"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("datasets", "engine", "evaluation", "models", "predictor", "trainer", "util")
_MODULES = {"Predictor": "predictor", "build_model": "models", "settings": "util.settings"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_import_conflicts(PACKAGES)
    add_to_path()
    return getattr(importlib.import_module(_MODULES[name]), name)


def check_import_conflicts(names: tuple[str, ...]) -> None:
    """Raises ImportError if a package of one of these names is imported already, and is not the project's."""
    for name in names:
        module = sys.modules.get(name)
        ours = (ROOT / f"{name}.py", ROOT / name / "__init__.py")
        if module is not None and Path(module.__file__ or "").resolve() not in ours:
            raise ImportError(
                f"the package {name} of {module.__file__ or name} is already imported, and {ROOT} has one of this "
                "name: use PreDETR in a Python process of its own"
            )


def add_to_path() -> None:
    """Makes the project's own packages importable, before others of the same names.

    Raises:
        ImportError: `predetr` was installed without the project's folder.
    """
    if not (ROOT / "finetune_main.py").is_file():
        raise ImportError(
            "predetr runs from the project's folder, and is installed without it: pip install -e FOLDER"
        )
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
