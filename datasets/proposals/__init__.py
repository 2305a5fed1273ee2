"""Where boxes of unlabelled images come from: one file a method, one line in `util.settings.registry`.

A proposal method is called with (image uint8 [3, H, W], SampleRNG, name) and returns float32 boxes [N, 4], (x0, y0,
x1, y1) in pixels of that image, each with an area; N may be 0 and may differ between images. `name` is the image's path
relative to the data set's folder, by which stored boxes are found. The order is the method's: best first where it has
scores, else redrawn at each call. The same image, random state and name give the same boxes in the same order in any
process.

Methods that search the image are a `datasets.proposals.base.CacheableProposals`, whose `propose` also returns scores, and whose
boxes `tools/cache_proposals.py` can store. `SelectedProposals` takes some of the boxes of a method, `FixedNumProposals` always as
many.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.sample import BadImageError
from util.errors import UserError
from util.random_state import SampleRNG
from util.settings import Settings
from util.settings.registry import PROPOSALS, import_object, lookup
from util.settings.table import PRETRAIN, all_flags
from util.settings.value_types import STRATEGIES

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

Proposals = Callable[[Tensor, SampleRNG, str], Tensor]
MC_NUM_RANKS = 300  # importance sampling draws from as many of the first boxes
MAX_JITTER = 0.1  # share of its width and height by which a corner of a repeated box moves at most


def build_proposals(settings: Settings, images: "ImageFiles | None" = None) -> Proposals:
    """The method that `settings.proposals` names, from the store `settings.cache_path` where that is given.

    images: the data set, of which stored boxes must know every image.

    Raises:
        UserError: an unknown name; a store or file that does not fit; a flag of another method.
    """
    is_file, flags = settings.proposals.startswith("file:"), all_flags(PRETRAIN)
    for flag, owner in (("edge_model", "edge_boxes"), ("ss_resize", "selective_search")):
        if getattr(settings, flag) != flags[flag].default and settings.proposals != owner:
            raise UserError(
                f"--{flag} means nothing to --proposals {settings.proposals}: omit it or use --proposals {owner}"
            )
    method = import_object(
        lookup(PROPOSALS, "--proposals", "file:" if is_file else settings.proposals)
    )(settings)
    if settings.cache_path:
        from datasets.proposals.cache import CachedProposals

        method = CachedProposals.open(settings.cache_path, method, settings.proposals)
    if images is not None and hasattr(method, "check"):
        method.check(images)
    return method


def select_indices(count: int, strategy: str, max_prop: int, rng: SampleRNG) -> Tensor:
    """Which of `count` boxes, in the order of their method, a sample gets: indices int64 [K] in increasing order for
    topk and mc (Bar et al., CVPR 2022, section 3.1).

    topk: the first `max_prop`. random: as many at random, from all. mc, importance sampling: box i (from 1) with
    probability -ln(i / 301) max_prop / 300, at most 1, and none behind the 300th; `max_prop` is the mean number where
    there are 300 boxes.
    """
    if strategy == "topk":
        return torch.arange(min(count, max_prop))
    if strategy == "random":
        return torch.from_numpy(rng.numpy.permutation(count)[:max_prop].astype(np.int64))
    if strategy != "mc":
        raise UserError(f"--strategy {strategy} is unknown: choose one of {', '.join(STRATEGIES)}")
    ranks = np.arange(1, min(count, MC_NUM_RANKS) + 1)
    keep = -np.log(ranks / (MC_NUM_RANKS + 1)) * max_prop / MC_NUM_RANKS
    return torch.from_numpy(np.flatnonzero(rng.numpy.rand(len(ranks)) < keep))


class SelectedProposals:
    """What `select_indices` takes from the boxes of a method."""

    def __init__(self, proposals: Proposals, strategy: str, max_prop: int) -> None:
        self.proposals, self.strategy, self.max_prop = proposals, strategy, max_prop

    def __call__(self, image: Tensor, rng: SampleRNG, name: str) -> Tensor:
        boxes = self.proposals(image, rng, name)
        return boxes[select_indices(len(boxes), self.strategy, self.max_prop, rng)]


class FixedNumProposals:
    """The first `count` boxes of a method; where it has fewer, `pad_with_jittered_boxes` fills up."""

    def __init__(self, proposals: Proposals, count: int) -> None:
        self.proposals, self.count = proposals, count

    def __call__(self, image: Tensor, rng: SampleRNG, name: str) -> Tensor:
        """
        Raises:
            BadImageError: the method has no box for this image.
        """
        boxes = self.proposals(image, rng, name)
        if not len(boxes):
            raise BadImageError("no proposals")
        return (
            boxes[: self.count]
            if len(boxes) >= self.count
            else pad_with_jittered_boxes(boxes, self.count, tuple(image.shape[-2:]), rng)
        )


def pad_with_jittered_boxes(
    boxes_xyxy_abs: Tensor, count: int, size_hw: tuple[int, int], rng: SampleRNG
) -> Tensor:
    """N > 0 boxes and as many jittered copies, taken in turn, that there are `count`, as in Siamese DETR's code: each
    coordinate moves by up to 10 % of the box's width or height, (2 sigmoid(z) - 1) / 10 of it with z normal, inside the
    image.
    """
    copies = boxes_xyxy_abs[torch.arange(len(boxes_xyxy_abs), count) % len(boxes_xyxy_abs)]
    shift = (2 * torch.sigmoid(torch.randn(copies.shape, generator=rng.torch)) - 1) * MAX_JITTER
    height, width = size_hw
    sides = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)
    copies = torch.minimum(
        (copies + shift * sides).clamp(min=0), copies.new_tensor([width, height, width, height])
    )
    return torch.cat([boxes_xyxy_abs, copies])
