"""`--tensorboard`: the values of both logs for TensorBoard."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from util.runs.boards import Board

FOLDER = "tensorboard"


class TensorBoard(Board):
    """Writes to `tensorboard/` in a run's folder.

    A start of the run writes the folder again from the logs, so that it has each epoch and step once, also those of
    starts without `--tensorboard`.

    Args:
        folder: of the run.
        steps_per_epoch: see `Board`.
    """

    def __init__(self, folder: Path, steps_per_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(steps_per_epoch)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self.writer = SummaryWriter(str(folder / FOLDER))

    def write(self, kind: str, values: Mapping[str, float], position: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, position)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
