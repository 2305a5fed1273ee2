"""Proposal methods: boxes for unlabelled images. Each method is one file here and one line in `util.settings.registry`.

A proposal method is a callable (image uint8 [3, H, W], SampleRNG, name) -> float32 boxes [N, 4], (x0, y0, x1, y1) in
pixels of that image. Each box has an area; N may be 0 and may differ between images. `name` is the image's path
relative to the image folder, the key in proposal caches.

Boxes come best first if the method has scores, otherwise in a new random order at each call. The same image, random
state and name give the same boxes in the same order in any process.

Methods whose boxes depend on the image alone subclass `datasets.proposals.base.CacheableProposals`: their `propose`
also returns scores, and `tools/cache_proposals.py` can cache their boxes. `SelectedProposals` and `FixedNumProposals`
wrap a method and choose some of its boxes.

A method that reads nothing of the image but its size has `reads_pixels = False`: only with it an image can be decoded
at a reduced size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.sample import TooFewProposalsError
from util.errors import UserError
from util.random_state import SampleRNG
from util.settings import Settings
from util.settings.registry import PROPOSALS, import_object, lookup
from util.settings.table import PRETRAIN, all_flags
from util.settings.value_types import STRATEGIES

if TYPE_CHECKING:
    from datasets.images.image_folder import ImageFiles

Proposals = Callable[[Tensor, SampleRNG, str], Tensor]
MC_NUM_RANKS = 300  # importance sampling considers this many of the first boxes
METHOD_FLAGS = {  # flag -> the only method that it has an effect on
    "edge_model": "edge_boxes",
    "ss_resize": "selective_search",
    "ss_rank": "selective_search",
}
MAX_JITTER = 0.1  # of the width or height of a box, for each of its coordinates


def build_proposals(settings: Settings, images: "ImageFiles | None" = None) -> Proposals:
    """Build the proposal method of `settings.proposals`, read from the cache `settings.cache_path` if that is given.

    Args:
        images: the images of the run; a cache or file must have boxes for all of them.

    Raises:
        UserError: an unknown name, a cache or file that does not fit, or a flag of another method.
    """
    flags = all_flags(PRETRAIN)
    for flag, owner in METHOD_FLAGS.items():
        if getattr(settings, flag) != flags[flag].default and settings.proposals != owner:
            raise UserError(
                f"--{flag} has no effect with --proposals {settings.proposals}; omit it or use --proposals {owner}"
            )

    key = "file:" if settings.proposals.startswith("file:") else settings.proposals
    method = import_object(lookup(PROPOSALS, "--proposals", key))(settings)
    if settings.cache_path:
        from datasets.proposals.cache import CachedProposals

        method = CachedProposals.open(settings.cache_path, method, settings.proposals)
    if settings.reduced_decode and getattr(method, "reads_pixels", True):
        raise UserError(
            f"--reduced_decode: --proposals {settings.proposals} searches the whole image; cache its boxes with "
            "tools/cache_proposals.py and give --cache_path, or omit --reduced_decode"
        )
    if images is not None and hasattr(method, "check"):
        method.check(images)
    return method


def select_indices(count: int, strategy: str, max_prop: int, rng: SampleRNG) -> Tensor:
    """Select some of `count` boxes, given in the order of their method (DETReg, section 3.1).

    Strategies:
        topk: the first `max_prop` boxes.
        random: `max_prop` boxes at random.
        mc: importance sampling. Box i (from 1) is kept with probability -ln(i / 301) * max_prop / 300, at most 1, and
            never beyond the 300th. With 300 boxes or more, about `max_prop` are kept on average.

    Returns:
        Indices int64 [K], in increasing order for topk and mc.

    Raises:
        UserError: an unknown strategy.
    """
    if strategy == "topk":
        return torch.arange(min(count, max_prop))
    if strategy == "random":
        return torch.from_numpy(rng.numpy.permutation(count)[:max_prop].astype(np.int64))
    if strategy != "mc":
        raise UserError(f"--strategy {strategy} is unknown; choose one of {', '.join(STRATEGIES)}")

    # DETReg's code has -ln(i / 301) / 10, for its 30 proposals: the same for max_prop = 30.
    ranks = np.arange(1, min(count, MC_NUM_RANKS) + 1)
    probabilities = -np.log(ranks / (MC_NUM_RANKS + 1)) * max_prop / MC_NUM_RANKS
    kept = rng.numpy.rand(len(ranks)) < probabilities
    return torch.from_numpy(np.flatnonzero(kept))


class SelectedProposals:
    """The boxes of a method that `select_indices` chooses."""

    def __init__(self, proposals: Proposals, strategy: str, max_prop: int) -> None:
        self.proposals = proposals
        self.strategy = strategy
        self.max_prop = max_prop

    def __call__(self, image: Tensor, rng: SampleRNG, name: str) -> Tensor:
        boxes = self.proposals(image, rng, name)  # [N, 4]
        return boxes[select_indices(len(boxes), self.strategy, self.max_prop, rng)]  # [K, 4]


class FixedNumProposals:
    """The first `count` boxes of a method, filled up by `pad_with_jittered_boxes` if there are fewer."""

    def __init__(self, proposals: Proposals, count: int) -> None:
        self.proposals = proposals
        self.count = count

    def __call__(self, image: Tensor, rng: SampleRNG, name: str) -> Tensor:
        """Return boxes [count, 4].

        Raises:
            TooFewProposalsError: the method has no box for this image.
        """
        boxes = self.proposals(image, rng, name)  # [N, 4]
        if not len(boxes):
            raise TooFewProposalsError(0, 1)
        if len(boxes) >= self.count:
            return boxes[: self.count]
        return pad_with_jittered_boxes(boxes, self.count, tuple(image.shape[-2:]), rng)


def pad_with_jittered_boxes(
    boxes_xyxy_abs: Tensor, count: int, size_hw: tuple[int, int], rng: SampleRNG
) -> Tensor:
    """Append jittered copies to N > 0 boxes until there are `count`: [N, 4] -> [count, 4].

    Boxes are copied in turn. As in Siamese DETR's code, each coordinate of a copy moves by (2 sigmoid(z) - 1) / 10 of
    the box's width or height, z standard normal, so by at most 10 %. Copies are clipped to an image of `size_hw`.
    """
    num_boxes = len(boxes_xyxy_abs)
    copies = boxes_xyxy_abs[torch.arange(num_boxes, count) % num_boxes]  # [count - N, 4]
    shift = (2 * torch.sigmoid(torch.randn(copies.shape, generator=rng.torch)) - 1) * MAX_JITTER
    sides = (copies[:, 2:] - copies[:, :2]).repeat(1, 2)  # (w, h, w, h)

    height, width = size_hw
    limits = copies.new_tensor([width, height, width, height])
    copies = torch.minimum((copies + shift * sides).clamp(min=0), limits)
    return torch.cat([boxes_xyxy_abs, copies])
