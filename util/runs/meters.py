"""Numbers of an epoch: averages, and losses that are read without making the device wait."""

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from util.distributed import all_gather_object, all_reduce_sum, get_world_size
from util.errors import NonFinite
from util.logger import log

NUM_MATCHES = "matched_pairs"


class NonFiniteLoss(NonFinite):
    """A loss is NaN or infinite; the message names the losses and the images."""


def to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Named scalars of this process alone, in one copy."""
    return dict(
        zip(
            values,
            torch.stack([value.detach().float() for value in values.values()]).tolist(),
            strict=True,
        )
    )


class BadImages:
    """Bad images that the loader replaced: each is reported once with its path, all are counted.

    Also the boxes that it dropped, since they are outside an image whose size the annotations do not list.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.count = 0
        self.dropped_boxes: dict[str, int] = {}  # path -> number of boxes
        self.num_reported = 0  # images of `dropped_boxes`

    def add(self, problems: list[tuple[str, str]]) -> None:
        """problems: (path, reason) of each image that was replaced by the next one."""
        for path, reason in problems:
            self.count += 1
            if path not in self.seen:
                self.seen.add(path)
                log.warning("skipped %s: %s (the next image takes its place)", path, reason)

    def add_dropped_boxes(self, dropped: list[tuple[str, int]]) -> None:
        """dropped: (path, number of boxes) of each image."""
        self.dropped_boxes.update(dropped)

    def warn_of_dropped_boxes(self) -> None:
        """Log the number of dropped boxes, again only if more images have some."""
        if len(self.dropped_boxes) > self.num_reported:
            log.warning(
                "box outside file: %d in %d images without a listed size are skipped, the first image is %s",
                sum(self.dropped_boxes.values()),
                len(self.dropped_boxes),
                next(iter(self.dropped_boxes)),
            )
            self.num_reported = len(self.dropped_boxes)

    def warn_of_missed_objects(self) -> None:
        """At the end of an evaluation, whose metrics go by image."""
        if self.count:
            log.warning(
                "%d images of the evaluation can't be used: their objects count as missed",
                self.count,
            )


class LossReader:
    """Averages named scalars over the processes and brings them to the host while the device runs the backward
    pass.

    Make it after the criterion and before `backward()`; `read()` afterwards, before the optimizer's step. One copy for
    all values; `flags` of the processes (such as "stop asked for") are added up in the same collective.
    """

    def __init__(self, values: dict[str, Tensor], flag: float = 0.0) -> None:
        self.names = sorted(values)
        stacked = torch.stack([values[name].detach().float() for name in self.names])
        if get_world_size() > 1:
            stacked = torch.cat([stacked / get_world_size(), stacked.new_full((1,), flag)])
            all_reduce_sum(stacked)
        else:
            self.flag = flag
        self.ready = None
        if stacked.is_cuda:
            self.host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self.host.copy_(stacked, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()
        else:
            self.host = stacked

    def read(self) -> dict[str, float]:
        """The averaged values; `self.flag` is the sum of the processes' flags from then on."""
        if self.ready is not None:
            self.ready.synchronize()
        values = self.host.tolist()
        if get_world_size() > 1:
            self.flag = values.pop()
        return dict(zip(self.names, values, strict=True))


def check_finite(losses: dict[str, float], image_ids: Iterable[int]) -> None:
    """
    Raises:
        NonFiniteLoss: one of the losses is NaN or infinite.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        images = list(dict.fromkeys(image_ids))  # once each, whatever the views
        raise NonFiniteLoss(
            f"{', '.join(bad[:4])} not finite on images {images[:16]}; the weights were not changed by it. "
            "Look at these images' boxes, lower --lr, or use --amp no; --resume continues from the last checkpoint"
        )


def check_gradient(norm: Tensor | None) -> None:
    """norm: of the last step's gradient, None where there is none; it is read from the device.

    Raises:
        NonFiniteLoss: it is NaN or infinite.
    """
    if norm is not None and not math.isfinite(norm):
        raise NonFiniteLoss(
            "the gradient of the last step was not finite, and the weights are spoiled: lower --lr, or use --amp no; "
            "--resume continues from the last checkpoint, which is from before it"
        )


def weight_class_error(losses: dict[str, Tensor], pairs: int) -> dict[str, Tensor]:
    """`class_error` as a sum over matched pairs, and their number: so batches and processes with more pairs count
    more.
    """
    error = losses["class_error"].detach()
    return {
        **losses,
        "class_error": error * pairs,
        NUM_MATCHES: error.new_full((), float(pairs)),
    }  # a fill does not wait for the device


def average_class_error(losses: dict[str, float]) -> dict[str, float]:
    """Of what `weight_class_error` gave: `class_error` for a pair again, and none where nothing was matched."""
    if NUM_MATCHES not in losses:
        return losses
    pairs = losses[NUM_MATCHES]
    mean = {"class_error": losses["class_error"] / pairs} if pairs else {}
    return {**{name: value for name, value in losses.items() if name != "class_error"}, **mean}


class Averages:
    """Sums and counts by name; `state()` goes into checkpoints, so that a resumed epoch reports the whole epoch."""

    def __init__(self, state: dict[str, list[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = {
            name: list(pair) for name, pair in (state or {}).items()
        }

    def add(self, values: dict[str, float], weight: float = 1.0) -> None:
        """NUM_MATCHES among the values is no value, but the weight of `class_error`."""
        pairs = values.get(NUM_MATCHES, weight)
        for name, value in values.items():
            if name != NUM_MATCHES:
                count = pairs if name.startswith("class_error") else weight
                pair = self.sums.setdefault(name, [0.0, 0.0])
                pair[0] += value * count
                pair[1] += count

    def merged(self) -> "Averages":
        """Over all processes."""
        total = Averages()
        for sums in all_gather_object(self.sums):
            for name, (value, weight) in sums.items():
                pair = total.sums.setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += weight
        return total

    def means(self) -> dict[str, float]:
        return {name: value / max(weight, 1e-12) for name, (value, weight) in self.sums.items()}

    def state(self) -> dict[str, list[float]]:
        return {name: list(pair) for name, pair in self.sums.items()}


def peak_host_memory() -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
