"""Where boxes of unlabelled images come from: one file a method, one line here.

A proposal method is called with (image uint8 [3, H, W], SampleRandom) and returns float32 boxes [N, 4],
(x0, y0, x1, y1) in pixels of that image, each with an area.
"""
from argparse import Namespace
from collections.abc import Callable

from torch import Tensor

from datasets.proposals.random import build_random
from util.logger import UserError
from util.random_state import SampleRandom

Proposals = Callable[[Tensor, SampleRandom], Tensor]

PROPOSALS: dict[str, Callable[[Namespace], Proposals]] = {"random": build_random}


def build_proposals(args: Namespace) -> Proposals:
    """The method that `args.proposals` names.

    Raises:
        UserError: an unknown name.
    """
    if args.proposals not in PROPOSALS:
        raise UserError(f"--proposals {args.proposals} is unknown: choose one of {', '.join(PROPOSALS)}")
    return PROPOSALS[args.proposals](args)
