"""The installed commands. Each runs an entry script of the project's folder, on the paths of the current directory."""

import runpy

from predetr import ROOT, add_to_path


def pretrain() -> None:
    _run("main.py")


def finetune() -> None:
    _run("finetune_main.py")


def predict() -> None:
    _run("tools/predict.py")


def _run(script: str) -> None:
    add_to_path()
    runpy.run_path(str(ROOT / script), run_name="__main__")
