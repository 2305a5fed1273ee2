"""The installed commands. Each runs an entry script of the project folder in the current directory."""

import runpy

from predetr import ROOT, add_to_path


def pretrain() -> None:
    """Run main.py (`predetr-pretrain`)."""
    _run("main.py")


def finetune() -> None:
    """Run finetune_main.py (`predetr-finetune`)."""
    _run("finetune_main.py")


def predict() -> None:
    """Run tools/predict.py (`predetr-predict`)."""
    _run("tools/predict.py")


def _run(script: str) -> None:
    add_to_path()
    runpy.run_path(str(ROOT / script), run_name="__main__")
