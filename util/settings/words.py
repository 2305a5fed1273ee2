"""Flags as words of a command line."""

from collections.abc import Mapping
from typing import Any


def to_words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as words of a command line: {"lr": 1e-4, "pre_norm": True} -> --lr 0.0001 --pre_norm.

    Args:
        flags: values by flag name without dashes. True: the flag alone. None or False: no words. A list or tuple:
            several words.
    """
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list | tuple) else [value]
            words += [_to_word(item) for item in values]
    return words


def _to_word(value: Any) -> str:
    """Return a value as text, a float without trailing zeros and without loss."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
