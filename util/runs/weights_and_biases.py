"""`--wandb`: the values of both logs for Weights & Biases."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import to_json, write_text
from util.runs.boards import Board
from util.runs.folder import WANDB_RUN, read_json_object

PROJECT = "predetr"


class WeightsAndBiases(Board):
    """Sends to W&B, or with WANDB_MODE=offline writes to `wandb/` in a run's folder.

    `wandb_run.json` has the id of the W&B run and what it has got. Every start of a run continues the same W&B run, and
    sends what the logs have in addition, also of starts without `--wandb`. After a kill in the middle of an epoch, its
    steps are sent again.

    Args:
        folder: of the run. Its name is the run's, unless WANDB_NAME is set.
        steps_per_epoch: see `Board`.
        config: settings of the run.

    Raises:
        UserError: W&B can't start the run, for example without a login.
    """

    def __init__(self, folder: Path, steps_per_epoch: int, config: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(steps_per_epoch)
        self.path = folder / WANDB_RUN
        before = read_json_object(self.path)
        self.positions: dict[str, int] = {"epoch": -1, "step": -1, **before.get("positions", {})}
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=before.get("id"),
                resume="allow",
                dir=folder,
                config=dict(config),
                reinit="create_new",  # leaves a W&B run that the program has open alone
                settings=wandb.Settings(console="off"),  # log.txt has what the console shows
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline to send it later by `wandb sync`"
            ) from error
        for kind in self.positions:
            self.run.define_metric(kind, hidden=True)
            self.run.define_metric(f"{kind}/*", step_metric=kind)
        self._save()

    def write(self, kind: str, values: Mapping[str, float], position: int) -> None:
        if position <= self.positions[kind]:
            return
        self.run.log({kind: position, **values})
        self.positions[kind] = position
        if kind == "epoch":  # not after each step: the file is synced to the disk
            self._save()

    def close(self) -> None:
        self._save()
        self.run.finish()

    def _save(self) -> None:
        write_text(self.path, to_json({"id": self.run.id, "positions": self.positions}) + "\n")
