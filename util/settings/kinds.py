"""What the text of a flag's value becomes, and which values are refused (by argparse.ArgumentTypeError)."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from util.settings.registry import PROPOSALS, names_of

STRATEGIES = ("topk", "random", "mc")
# DETReg's spellings of the same strategies.
STRATEGY_ALIASES = {
    "random_sample": "random",
    **dict.fromkeys(("mc_1", "mc_2", "mc_3", "mc_4"), "mc"),
}


def positive(kind: Callable = int) -> Callable:
    """A number above 0."""
    return _bounded(kind, lambda value: 0 < value < math.inf, "above 0")


def at_least_zero(kind: Callable = int) -> Callable:
    """A number of 0 or more."""
    return _bounded(kind, lambda value: 0 <= value < math.inf, "0 or more")


def _bounded(kind: Callable, allowed: Callable[[Any], bool], what: str) -> Callable:
    def convert(text: str):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    convert.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return convert


finite = _bounded(float, math.isfinite, "a finite number")


def fraction(text: str) -> float:
    """A number above 0, at most 1; -1, DETReg's default, means all."""
    value = float(text)
    if not 0 < value <= 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}: 10 % is 0.1")
    return value


def proposal_method(text: str) -> str:
    """A proposal method of the registry, or file:PATH."""
    if text not in PROPOSALS and not text.startswith("file:"):
        raise argparse.ArgumentTypeError(f"{text} is unknown: choose one of {names_of(PROPOSALS)}")
    return text


def strategy(text: str) -> str:
    """topk, random or mc; in DETReg's spellings too."""
    name = STRATEGY_ALIASES.get(text, text)
    if text == "topk_edgebox":
        raise argparse.ArgumentTypeError("topk_edgebox is --strategy topk --proposals edge_boxes")
    if name not in STRATEGIES:
        raise argparse.ArgumentTypeError(
            f"{text} is unknown: choose {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}"
        )
    return name


def device(text: str) -> str:
    """cuda, cuda:N or cpu."""
    try:
        known = torch.device(text).type in ("cuda", "cpu")
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(
            f"{text} is no device of this project: use cuda, cuda:N or cpu"
        )
    return text


def voc_set(text: str) -> str:
    """Year and image list of VOC, such as 2007_trainval."""
    if not re.fullmatch(r"\d{4}_\w+", text):
        raise argparse.ArgumentTypeError(
            f"{text} must be a year and a list in ImageSets/Main, such as 2012_trainval"
        )
    return text
