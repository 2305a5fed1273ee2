"""Averages of an epoch's losses, and reading losses from the device without making the host wait."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from util.distributed import all_gather_object, all_reduce_sum, get_world_size
from util.logger import log
from util.packed_targets import TOO_FEW_PROPOSALS

NUM_PAIRS_KEY = "matched_pairs"  # key of the number of matched pairs among the losses


def to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Copy named scalars of this process to the host, all in one transfer."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


class BadImages:
    """Counts the bad images that the dataloader replaced, and logs each path once.

    Attributes:
        seen: paths of the images that can't be used.
        count: how often one of them was replaced.
        boxless_seen, boxless_count: the same of images with too few proposals for the pretext. Only the first is
            reported: with sparse proposals, half of a dataset may be of this kind.
        dropped_boxes: path -> number of objects that loading the image dropped.
        num_reported: images of `dropped_boxes` that were reported.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.count = 0
        self.boxless_seen: set[str] = set()
        self.boxless_count = 0
        self.dropped_boxes: dict[str, int] = {}  # path -> number of boxes
        self.num_reported = 0  # images of `dropped_boxes`

    def add(self, problems: list[tuple[str, str]]) -> None:
        """Add a batch's bad images.

        Args:
            problems: (path, reason) of each image that was replaced by the next one.
        """
        for path, reason in problems:
            if reason.startswith(TOO_FEW_PROPOSALS):
                is_reported = bool(self.boxless_seen)
                self.boxless_count += 1
                self.boxless_seen.add(path)
            else:
                is_reported = path in self.seen
                self.count += 1
                self.seen.add(path)
            if not is_reported:
                log.warning("skipped %s: %s (the next image takes its place)", path, reason)

    def warn_of_epoch(self, num_before: int, num_boxless_before: int) -> None:
        """Log how many images were replaced since the counts had these values."""
        if self.count > num_before:
            log.warning(
                "%d unreadable or tiny images were replaced in this epoch (%d distinct ones in this run)",
                self.count - num_before,
                len(self.seen),
            )
        if self.boxless_count > num_boxless_before:
            log.warning(
                "%d images with too few proposals were replaced by the next image in this epoch (%d distinct ones in "
                "this run): their neighbors are seen more often; leave them out, or use other --proposals",
                self.boxless_count - num_boxless_before,
                len(self.boxless_seen),
            )
        self.warn_of_dropped_boxes()

    def add_dropped_boxes(self, dropped: list[tuple[str, int]]) -> None:
        """dropped: (path, number of boxes) of each image."""
        self.dropped_boxes.update(dropped)

    def warn_of_dropped_boxes(self) -> None:
        """Log the number of dropped boxes, again only if more images have some."""
        if len(self.dropped_boxes) > self.num_reported:
            log.warning(
                "objects skipped: %d in %d images (boxes outside an image without a listed size, or segments that the "
                "PNG lacks), the first image is %s",
                sum(self.dropped_boxes.values()),
                len(self.dropped_boxes),
                next(iter(self.dropped_boxes)),
            )
            self.num_reported = len(self.dropped_boxes)

    def warn_of_missed_objects(self) -> None:
        """Warn at the end of an evaluation, where bad images lower the metrics."""
        if self.count:
            log.warning(
                "%d images of the validation set can't be used: their objects count as missed",
                self.count,
            )


class LossReader:
    """Averages named scalars over processes and copies them to the host during the backward pass.

    Create it after the criterion and before `backward()`. Call `read()` after `backward()` and before the optimizer
    step. All values travel in one all-reduce and one copy. The all-reduce also sums `flags` over processes, such as
    "stop requested", so that they need no collective of their own.

    Attributes:
        flags: after `read()`, the sum of each flag over all processes.
        own: the values of this process, on the device, in the order of `names`.
    """

    def __init__(self, values: dict[str, Tensor], flags: Sequence[float] = ()) -> None:
        # Sorted: the order of the losses must be the same on every rank. L is their number.
        self.names = sorted(values)
        stacked = torch.stack([values[name].detach().float() for name in self.names])  # [L]
        self.own, self.flags = stacked, list(flags)
        if get_world_size() > 1:
            # new_full fills on the device; a tensor of all flags would be copied from the host, which waits.
            own_flags = [stacked.new_full((1,), flag) for flag in flags]
            stacked = torch.cat([stacked / get_world_size(), *own_flags])  # [L + F]
            all_reduce_sum(stacked)

        self.event = None
        if stacked.is_cuda:
            # Only a copy to pinned memory is asynchronous. The event tells when it has finished.
            self.host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self.host.copy_(stacked, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = stacked

    def read(self) -> dict[str, float]:
        """Wait for the copy and return the averaged values by name."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        if get_world_size() > 1:
            self.flags = values[len(self.names) :]
        return dict(zip(self.names, values, strict=False))

    def read_own(self) -> dict[str, float]:
        """Return the values of this process by name. On a GPU the host waits for its own copy of them."""
        return dict(zip(self.names, self.own.tolist(), strict=True))


def weight_class_error(losses: dict[str, Tensor], num_pairs: int) -> dict[str, Tensor]:
    """Return the losses with `class_error` as a sum over matched pairs, and the number of pairs under NUM_PAIRS_KEY.

    Averaged over batches and processes, each pair then has the same weight, however many its batch has.
    """
    error = losses["class_error"].detach()
    # new_full fills on the device; torch.tensor(num_pairs) would copy from the host and wait.
    weight = error.new_full((), float(num_pairs))
    return {**losses, "class_error": error * num_pairs, NUM_PAIRS_KEY: weight}


def average_class_error(losses: dict[str, float]) -> dict[str, float]:
    """Undo `weight_class_error`: return `class_error` per pair, or without it if nothing was matched."""
    if NUM_PAIRS_KEY not in losses:
        return losses
    num_pairs = losses[NUM_PAIRS_KEY]
    others = {name: value for name, value in losses.items() if name != "class_error"}
    return {**others, "class_error": losses["class_error"] / num_pairs} if num_pairs else others


class Averages:
    """Weighted averages by name. `state()` goes into checkpoints, so that a resumed epoch averages all its steps."""

    def __init__(self, state: dict[str, list[float]] | None = None) -> None:
        # name -> [sum of value * weight, sum of weights]
        self.sums: dict[str, list[float]] = {
            name: list(pair) for name, pair in (state or {}).items()
        }

    def add(self, values: dict[str, float], weight: float = 1.0) -> None:
        """Add the values of a step. NUM_PAIRS_KEY among them is the weight of `class_error`, not a value."""
        num_matches = values.get(NUM_PAIRS_KEY, weight)
        for name, value in values.items():
            if name == NUM_PAIRS_KEY:
                continue
            value_weight = num_matches if name.startswith("class_error") else weight
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += value * value_weight
            pair[1] += value_weight

    def merged(self) -> "Averages":
        """Return the averages over all processes. Collective."""
        total = Averages()
        for sums in all_gather_object(self.sums):
            for name, (value, weight) in sums.items():
                pair = total.sums.setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += weight
        return total

    def means(self) -> dict[str, float]:
        """Return name -> average."""
        return {name: value / max(weight, 1e-12) for name, (value, weight) in self.sums.items()}

    def state(self) -> dict[str, list[float]]:
        """Return a copy of the sums in plain containers."""
        return {name: list(pair) for name, pair in self.sums.items()}


def peak_host_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux kibibytes
