"""Boards that show a run while it trains: the interface of TensorBoard and Weights & Biases, and what they get."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from util.coco import BBOX_METRICS
from util.runs.log import log_entries, step_entries


class Board:
    """Gets the values of log.txt below `epoch/` and those of log_steps.txt below `step/`. On rank 0.

    Args:
        steps_per_epoch: of one rank. Step s of epoch e stands at e * steps_per_epoch + s.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch

    def write(self, kind: str, values: Mapping[str, float], position: int) -> None:
        """Show values at a position of their axis. kind: `epoch` or `step`."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def add_epoch(self, record: Mapping[str, Any]) -> None:
        """Show a line of log.txt."""
        self._add("epoch", record, record["epoch"])

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Show a line of log_steps.txt."""
        self._add("step", record, record["epoch"] * self.steps_per_epoch + record["step"])

    def add_logs(self, folder: Path, epoch: int) -> None:
        """Show both logs of a folder, those of earlier starts.

        epoch: the one that is trained next; later lines of the log are left out.
        """
        for entry in log_entries(folder):
            if entry["epoch"] < epoch:
                self.add_epoch(entry)
        for entry in step_entries(folder):
            self.add_step(entry)

    def _add(self, kind: str, record: Mapping[str, Any], position: int) -> None:
        values = {
            f"{kind}/{name}": value
            for name, value in scalars(record)
            if name not in ("epoch", "step")
        }
        self.write(kind, values, position)


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
