"""Training steps whose loss or gradient is NaN or infinite: skip them, keep their batches, and end a run of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoints.checkpoint import Checkpoint, save_checkpoint
from util.distributed import BATCH_NORMS, all_gather_object, get_rank
from util.errors import NonFiniteLoss, UserError
from util.logger import log
from util.packed_images import PackedImages
from util.packed_targets import PackedTargets
from util.runs.meters import LossReader

FOLDER = "nonfinite"  # in a run's folder
MAX_FILES = 5  # that one process writes: each has the weights
MAX_NAMED = 16  # images in a message
ENTRY = "nonfinite"  # of a dumped checkpoint, see `NonFiniteGuard.dump`


@dataclass
class Batch:
    """A batch as the dataloader made it, before augmentation and normalization on the device.

    Attributes:
        step: optimizer steps done before it.
        mean_targets: see `engine.Accumulation`.
        random_states: PyTorch's generators before its forward pass: `cpu`, and on a GPU `cuda`.
        losses: averaged over processes, or those of this process if they are not finite.
    """

    samples: PackedImages
    targets: PackedTargets
    step: int = 0
    mean_targets: float | None = None
    random_states: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


class NonFiniteGuard:
    """Counts steps with a NaN or infinite loss or gradient, and writes their batches to files.

    Losses are averaged over processes, and so are gradients: all processes see the same step as not finite. The host
    has the losses before the optimizer step. It reads the gradient norm one step later, and the optimizer decides on
    the device (`util.runs.optimizer.step_if_finite`), so that no step waits for it.

    Attributes:
        limit: number of such steps in a row after which training ends.
        folder: where batches are written; None: nowhere.
        describe: returns a checkpoint with weights and settings, to be written with a batch.
        in_a_row: number of such steps without a good one between them.
        batch_is_finite, step_is_finite: whether the losses of the current batch, and of all batches of its step, are
            finite.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        device: torch.device | None = None,
        limit: int = 1,
    ) -> None:
        self.device, self.limit = device or torch.device("cpu"), limit
        self.folder: Path | None = None
        self.describe: Callable[[], Checkpoint] | None = None
        self.in_a_row = 0
        self.batch_is_finite = self.step_is_finite = True
        self.last_report = ""
        self.batches: list[Batch] = []  # of the current step
        self.previous: list[Batch] = []  # of the step before, whose gradient norm is not known yet
        # A forward pass with NaN spoils running statistics for good.
        norms = [module for root in modules for module in root.modules()]
        norms = [module for module in norms if isinstance(module, BATCH_NORMS)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.statistics_before = [buffer.clone() for buffer in self.statistics]

    # ------------------------------------------------------------------------------------------- in each step

    def add(self, batch: Batch, is_first: bool) -> None:
        """Remember a batch of the dataloader until its gradient norm is known. is_first: in its optimizer step."""
        if is_first:
            self.previous, self.batches = self.batches, []
        self.batches.append(batch)

    def before_forward(self, is_first: bool) -> None:
        self.batch_is_finite = True
        self.step_is_finite = self.step_is_finite or is_first
        if self.statistics:
            torch._foreach_copy_(self.statistics_before, self.statistics)
        if self.batches:
            self.batches[-1].random_states = _random_states(self.device)

    def check_gradient(self, norm: float, of_current: bool = False) -> None:
        """Take a gradient norm. Collective if it is not finite.

        of_current: of the step that ended last. By default the next one has begun, with its first batch.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self._report("gradient", self.batches if of_current else self.previous, is_mine=True)

    def check_losses(self, values: dict[str, float], reader: LossReader) -> None:
        """Take the losses of the current batch, averaged over processes. Collective if they are not finite."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if self.batches:
            self.batches[-1].losses = values
        if not bad:
            return
        if self.statistics:
            torch._foreach_copy_(self.statistics, self.statistics_before)
        is_first_of_step = self.step_is_finite
        self.batch_is_finite = self.step_is_finite = False
        if not is_first_of_step:
            return
        self.in_a_row += 1
        own = {name: value for name, value in reader.read_own().items() if name in values}
        if self.batches:
            self.batches[-1].losses = own
        is_mine = not all(map(math.isfinite, own.values()))
        self._report(", ".join(bad[:4]), self.batches[-1:], is_mine)

    def check_limit(self) -> None:
        """Call it after a step.

        Raises:
            NonFiniteLoss: too many steps in a row were not finite. The weights are those before them.
        """
        if self.in_a_row >= self.limit:
            raise NonFiniteLoss(
                f"{self.last_report} in {self.in_a_row} steps in a row (--max_nonfinite); the weights were not changed "
                "by them. Check the boxes of these images, lower --lr, or use --amp no"
            )

    # ------------------------------------------------------------------------------------------- reports

    def _report(self, what: str, batches: list[Batch], is_mine: bool) -> None:
        """Log a step that is skipped, and write its batches to a file. Collective.

        is_mine: False if the cause is in a batch of another process.
        """
        own = [image_id for batch in batches for image_id in image_ids(batch) if is_mine]
        of_all = list(dict.fromkeys(i for ids in all_gather_object(own) for i in ids))
        counts = all_gather_object([_count_targets(batch) for batch in batches])
        num_targets = [sum(of_ranks) / len(of_ranks) for of_ranks in zip(*counts, strict=True)]
        images = f" on images {of_all[:MAX_NAMED]}" if of_all else ""
        self.last_report = f"{what} not finite{images}"
        path = self._dump(what, batches, num_targets) if (batches and is_mine) else None
        paths = [path for path in all_gather_object(path) if path is not None]
        kept = f"; to try it again: python tools/replay.py {paths[0]}" if paths else ""
        log.warning(
            "step skipped, the weights are unchanged: %s (%d in a row, --max_nonfinite %d)%s",
            self.last_report,
            self.in_a_row,
            self.limit,
            kept,
        )

    def _dump(self, what: str, batches: list[Batch], num_targets: list[float]) -> Path | None:
        """Write weights, settings and batches to a checkpoint file. An error is logged, and training continues."""
        if self.folder is None or self.describe is None:
            return None
        if len(list(self.folder.glob(f"step_*_rank_{get_rank()}.pth"))) >= MAX_FILES:
            return None
        path = self.folder / f"step_{batches[0].step:06d}_rank_{get_rank()}.pth"
        entry = {
            "reason": f"{what} not finite",
            "step": batches[0].step,
            "batches": [
                {
                    "images": dataclasses.asdict(batch.samples),
                    "targets": batch.targets.tensors,
                    "counts": batch.targets.counts,
                    "image_ids": image_ids(batch),
                    "boxes": box_extremes(batch),
                    "losses": batch.losses,
                    "num_targets": number,
                    "random_states": batch.random_states,
                }
                for batch, number in zip(batches, num_targets, strict=True)
            ],
        }
        try:
            save_checkpoint(dataclasses.replace(self.describe(), extra={ENTRY: entry}), path)
        except UserError as error:
            log.warning("%s", error)
            return None
        return path


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _count_targets(batch: Batch) -> float:
    if batch.mean_targets is not None:
        return batch.mean_targets
    return float(sum(batch.targets.counts["labels"]))


def image_ids(batch: Batch) -> list[int]:
    """Return the image ids of a batch; two views of an image have the same."""
    ids = batch.targets.tensors.get("image_id")
    return [] if ids is None else list(dict.fromkeys(ids.flatten().tolist()))


def box_extremes(batch: Batch) -> list[dict[str, Any]]:
    """Return per image its `objects`, and `min` and `max` of its boxes: (cx, cy, w, h), relative to the image."""
    found = []
    for boxes_cxcywh in batch.targets.tensors["boxes"].split(batch.targets.counts["boxes"]):
        extremes: dict[str, Any] = {"objects": len(boxes_cxcywh)}
        if len(boxes_cxcywh):
            extremes["min"] = boxes_cxcywh.amin(0).tolist()
            extremes["max"] = boxes_cxcywh.amax(0).tolist()
        found.append(extremes)
    return found
