"""`--tensorboard`: the values of log.txt and log_steps.txt for TensorBoard."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from util.coco import BBOX_METRICS
from util.runs.log import log_entries, step_entries

FOLDER = "tensorboard"


class TensorBoard:
    """Writes log values to `tensorboard/` in a run's folder: per epoch below `epoch/`, per step below `step/`.

    A start of the run writes the folder again from the logs, so that it has each epoch and step once, also those of
    starts without `--tensorboard`.

    Args:
        folder: of the run.
        epoch: the epoch that is trained next; later lines of the log are not written.
        steps_per_epoch: of one rank. Step s of epoch e stands at e * steps_per_epoch + s.
    """

    def __init__(self, folder: Path, epoch: int, steps_per_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self.writer = SummaryWriter(str(folder / FOLDER))
        self.steps_per_epoch = steps_per_epoch
        for entry in log_entries(folder):
            if entry["epoch"] < epoch:
                self.add_epoch(entry)
        for entry in step_entries(folder):
            self.add_step(entry)

    def add_epoch(self, record: Mapping[str, Any]) -> None:
        """Write a line of log.txt."""
        self._add("epoch", record, record["epoch"])

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Write a line of log_steps.txt."""
        self._add("step", record, record["epoch"] * self.steps_per_epoch + record["step"])

    def _add(self, kind: str, record: Mapping[str, Any], position: int) -> None:
        for name, value in scalars(record):
            if name not in ("epoch", "step"):
                self.writer.add_scalar(f"{kind}/{name}", value, position)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of all numbers in a log line. COCO's metrics have their names, as in coco_eval_bbox/AP50."""
    for name, value in record.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, list):
            # Not strict: VOC has fewer metrics than COCO.
            yield from scalars(
                {f"{name}/{m}": v for m, v in zip(BBOX_METRICS, value, strict=False)}
            )
        elif isinstance(value, Mapping):
            yield from scalars({f"{name}/{key}": item for key, item in value.items()})
