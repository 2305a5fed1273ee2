"""Runs from Python: `pretrain` and `finetune`, the two entry scripts as functions.

    from predetr import finetune, pretrain

    pretrained = pretrain(images="photos", output_dir="outputs/pretrain", detector="conditional_detr")
    run = finetune(data="data/MSCoco", pretrain=pretrained, output_dir="outputs/coco")
    print(run.predictor()("image.jpg").names)

A call is the run of a script: same parser, defaults, checks, files and resume. Every flag is a keyword.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_main
import main as pretrain_main
from evaluation import METRICS_FILE
from predictor import Predictor
from util.checkpoints.checkpoint import BEST, LATEST
from util.errors import UserError
from util.runs.folder import read_json_object
from util.runs.log import log_entries
from util.runs.page import PAGE
from util.runs.session import run_in_program
from util.settings import FINETUNE, PRETRAIN, arguments
from util.settings.registry import DATASETS, lookup
from util.settings.table import flags_of

FilePath = str | Path


@dataclass(frozen=True)
class FinishedRun:
    """What a run has written to its output folder; read from there when it is asked for.

    Attributes:
        output_dir: the folder.
        class_agnostic: the run pre-trained, so its boxes have no classes.
    """

    output_dir: Path
    class_agnostic: bool = False

    @property
    def checkpoint(self) -> Path | None:
        """The latest checkpoint; None if the run has written none, as an evaluation."""
        return self._existing(LATEST)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best epoch, or the latest one of a run without evaluation."""
        return self._existing(BEST) or self.checkpoint

    @property
    def log(self) -> list[dict[str, Any]]:
        """The values of each epoch, oldest first, with the keys of docs/outputs.md."""
        return log_entries(self.output_dir)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation; {} without one."""
        metrics = read_json_object(self.output_dir / METRICS_FILE)
        return metrics or read_json_object(self.output_dir / "metrics.json")

    @property
    def page(self) -> Path | None:
        """The run's page, one HTML file."""
        return self._existing(PAGE)

    def predictor(self, **options: Any) -> Predictor:
        """Load the best checkpoint for inference.

        options: see `Predictor.from_checkpoint`. After pre-training the boxes are class-agnostic.

        Raises:
            UserError: the run has written no checkpoint.
        """
        if self.best_checkpoint is None:
            raise UserError(f"{self.output_dir} has no checkpoint: the run did not train")
        options = {"class_agnostic": self.class_agnostic, **options}
        return Predictor.from_checkpoint(self.best_checkpoint, **options)

    def _existing(self, name: str) -> Path | None:
        path = self.output_dir / name
        return path if path.is_file() else None


def pretrain(
    images: FilePath | None = None,
    *,
    output_dir: FilePath,
    detector: str | None = None,
    pretext: str | None = None,
    **flags: Any,
) -> FinishedRun:
    """Pre-train a detector without labels, as `python main.py` does.

    Args:
        images: unlabelled images, see `--imagenet_path`: a folder tree, a text file of paths, or tar files. Without it
            the images of a labelled dataset, such as `coco_path`.
        output_dir: where the run is saved.
        detector, pretext: see docs/flags.md; by default `detr` and `random_query_patch`.
        flags: any other flag of main.py by its name, such as `epochs=20` or `resume="auto"`.

    Raises:
        UserError: a flag is unknown or wrong, or anything else that the user can fix.
        StopRequested: an interrupt or SIGTERM stopped the training; the run is saved, and `resume="auto"` continues it.
    """
    given = {"imagenet_path": images, "detector": detector, "pretext": pretext}
    return _run(pretrain_main.main, PRETRAIN, output_dir, given, flags)


def finetune(
    data: FilePath | None = None,
    *,
    pretrain: FilePath | FinishedRun | None = None,
    output_dir: FilePath,
    **flags: Any,
) -> FinishedRun:
    """Train, fine-tune or evaluate a detector with labels, as `python finetune_main.py` does.

    Args:
        data: folder of the dataset: COCO, or the one of `dataset_file`. A custom dataset has no single folder: give
            `dataset_file="custom"`, `train_images` and the other flags of docs/custom_dataset.md.
        pretrain: what `pretrain` returned, or a checkpoint, see `--pretrain`.
        output_dir: where the run is saved.
        flags: any other flag of finetune_main.py by its name.

    Raises:
        UserError: as `pretrain`.
        StopRequested: as `pretrain`.
    """
    source = _checkpoint_of(pretrain) if isinstance(pretrain, FinishedRun) else pretrain
    given: dict[str, Any] = {"pretrain": source}
    if data is not None:
        given[_path_flag(flags.get("dataset_file"))] = data
    return _run(finetune_main.main, FINETUNE, output_dir, given, flags)


def _run(
    main: Callable[[Any], None],
    script: str,
    output_dir: FilePath,
    given: dict[str, Any],
    flags: dict[str, Any],
) -> FinishedRun:
    """Run a script with the flags of the function's own arguments and with the others."""
    twice = [name for name in flags if given.get(name) is not None]
    if twice:
        raise UserError(f"{twice[0]}={flags[twice[0]]!r}: the first argument already says it")
    run_in_program(main, arguments(script, {**given, **flags, "output_dir": output_dir}))
    return FinishedRun(Path(output_dir), class_agnostic=script == PRETRAIN)


def _checkpoint_of(run: FinishedRun) -> Path:
    if run.checkpoint is None:
        raise UserError(f"pretrain: {run.output_dir} has no checkpoint; give a run that trained")
    return run.checkpoint


def _path_flag(dataset_file: str | None) -> str:
    """Return the flag that takes the folder of a kind of dataset.

    Raises:
        UserError: there is no such flag.
    """
    name = dataset_file or flags_of(FINETUNE)["dataset_file"].default
    path_flags = lookup(DATASETS, "dataset_file", name).path_flags
    folders = [flag for flag in path_flags if flag.endswith("_path")]
    if not folders:
        wanted = ", ".join(path_flags) or "the dataset's own flags"
        raise UserError(f"data: dataset_file={name!r} has no single folder; give {wanted}")
    return folders[0]
