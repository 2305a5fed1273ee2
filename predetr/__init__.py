"""The installed package (`pip install -e .`): the project's commands, and these names from any directory.

    from predetr import Predictor, build_model, finetune, pretrain, settings

The project's other packages are not installed, because their names are common: `datasets` is also Hugging Face's.
Importing `predetr` changes nothing. The first use of a name above puts the project folder at the front of `sys.path`;
from then on, in this process, `import datasets` is the project's.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.2.0"
__all__ = ["Predictor", "build_model", "finetune", "pretrain", "settings"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "datasets",
    "engine",
    "evaluation",
    "finetune_main",
    "main",
    "memory",
    "models",
    "predictor",
    "trainer",
    "util",
    "visualization",
)
_MODULES = {
    "Predictor": "predictor",
    "build_model": "models",
    "finetune": "predetr.runs",
    "pretrain": "predetr.runs",
    "settings": "util.settings",
}


def __getattr__(name: str) -> Any:
    # Called by Python for names that the module does not define (PEP 562): they are imported on first use.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_import_conflicts(PACKAGES)
    add_to_path()
    return getattr(importlib.import_module(_MODULES[name]), name)


def check_import_conflicts(names: tuple[str, ...]) -> None:
    """Check that no package of another project is already imported under one of these names.

    Raises:
        ImportError: there is one.
    """
    for name in names:
        module = sys.modules.get(name)
        own_files = (ROOT / f"{name}.py", ROOT / name / "__init__.py")
        if module is not None and Path(module.__file__ or "").resolve() not in own_files:
            raise ImportError(
                f"{module.__file__ or name} is already imported as {name}, a name that {ROOT} uses too; "
                "use PreDETR in a separate Python process"
            )


def add_to_path() -> None:
    """Make the project's packages importable, ahead of others with the same names.

    Raises:
        ImportError: `predetr` was installed without the project folder.
    """
    if not (ROOT / "finetune_main.py").is_file():
        raise ImportError(
            "predetr runs from the project folder, and is installed without it: pip install -e FOLDER"
        )
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
