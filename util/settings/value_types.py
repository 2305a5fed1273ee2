"""Types of flag values: each converts text and rejects bad values with argparse.ArgumentTypeError."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from util.settings.registry import PROPOSALS, list_names

AUTO = "auto"  # --batch_size: the largest that fits
STRATEGIES = ("topk", "random", "mc")
# DETReg's spellings of the same strategies.
STRATEGY_ALIASES = {
    "random_sample": "random",
    **dict.fromkeys(("mc_1", "mc_2", "mc_3", "mc_4"), "mc"),
}


def positive(number_type: Callable = int) -> Callable:
    """Return a type for numbers above 0."""
    return _bounded(number_type, lambda value: 0 < value < math.inf, "above 0")


def non_negative(number_type: Callable = int) -> Callable:
    """Return a type for numbers of 0 or more."""
    return _bounded(number_type, lambda value: 0 <= value < math.inf, "0 or more")


def _bounded(number_type: Callable, is_allowed: Callable[[Any], bool], what: str) -> Callable:
    def convert(text: str):
        value = number_type(text)
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    convert.__name__ = number_type.__name__  # argparse prints it: "invalid int value"
    return convert


def batch_size(text: str) -> int | str:
    """Accept a number above 0, or auto."""
    return AUTO if text == AUTO else positive()(text)


finite = _bounded(float, math.isfinite, "a finite number")


def fraction(text: str) -> float:
    """Convert a number above 0 and at most 1, or -1, which means "all" as in DETReg."""
    value = float(text)
    if not 0 < value <= 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}: 10 % is 0.1")
    return value


def proposal_method(text: str) -> str:
    """Accept the name of a proposal method, or file:PATH."""
    if text not in PROPOSALS and not text.startswith("file:"):
        raise argparse.ArgumentTypeError(
            f"{text} is unknown: choose one of {list_names(PROPOSALS)}"
        )
    return text


def strategy(text: str) -> str:
    """Convert topk, random or mc, also in DETReg's spellings."""
    if text == "topk_edgebox":  # in DETReg the strategy also names the proposal method
        raise argparse.ArgumentTypeError("topk_edgebox is --strategy topk --proposals edge_boxes")
    name = STRATEGY_ALIASES.get(text, text)
    if name not in STRATEGIES:
        raise argparse.ArgumentTypeError(
            f"{text} is unknown: choose {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}"
        )
    return name


def device(text: str) -> str:
    """Accept cuda, cuda:N or cpu. Whether the GPU exists is checked when the run starts."""
    import torch  # here, so that --help does not wait for it

    try:
        is_known = torch.device(text).type in ("cuda", "cpu")
    except RuntimeError:
        is_known = False
    if not is_known:
        raise argparse.ArgumentTypeError(f"{text} is not supported: use cuda, cuda:N or cpu")
    return text


def voc_image_set(text: str) -> str:
    """Accept year and image list of VOC, such as 2007_trainval."""
    if not re.fullmatch(r"\d{4}_\w+", text):
        raise argparse.ArgumentTypeError(
            f"{text} must be a year and a list in ImageSets/Main, such as 2012_trainval"
        )
    return text
