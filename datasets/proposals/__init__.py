"""Where boxes of unlabelled images come from: one file a method, one line in `util.registry`.

A proposal method is called with (image uint8 [3, H, W], SampleRandom) and returns float32 boxes [N, 4],
(x0, y0, x1, y1) in pixels of that image, each with an area.
"""
from argparse import Namespace
from collections.abc import Callable

from torch import Tensor

from util.random_state import SampleRandom
from util.registry import PROPOSALS, choose, load

Proposals = Callable[[Tensor, SampleRandom], Tensor]


def build_proposals(args: Namespace) -> Proposals:
    """The method that `args.proposals` names.

    Raises:
        UserError: an unknown name.
    """
    return load(choose(PROPOSALS, "--proposals", args.proposals))(args)
