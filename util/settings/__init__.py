"""Settings of a run, from the command line or from Python.

`table` lists the flags, `parser` builds the command line from them, `resolving` fills in defaults and checks, and
`frozen` has the immutable result. `registry` lists detectors, pretexts, datasets, proposal methods and backbones.

    From a command line:  resolve(make_parser("finetune_main.py").parse_args(["--num_queries", "50"]))
    From Python:          settings(detector="conditional_detr", num_queries=50)
"""

import argparse
from collections.abc import Mapping
from typing import Any

from util.errors import UserError
from util.settings.checks import flags_read
from util.settings.frozen import Settings, did_you_mean
from util.settings.help import HelpFormatter
from util.settings.parser import Parser, add_flags, make_parser
from util.settings.resolving import given_flags, resolve, usable_cores
from util.settings.right_script import check_right_script
from util.settings.table import FINETUNE, PRETRAIN, Flag, flags_of


def settings(script: str | None = None, **flags: Any) -> Settings:
    """Return complete settings from the flags that differ from their defaults.

    Args:
        script: `main.py` or `finetune_main.py`. Default: the one that has all of these flags, fine-tuning first.
        flags: Values by flag name without dashes. None means that a flag is not given.

    Raises:
        UserError: A flag is unknown, a value is invalid, or flags contradict each other.
    """
    if script is None:
        script = FINETUNE if set(flags) <= set(flags_of(FINETUNE)) else PRETRAIN
    return resolve(checked_flags(script, flags), script=script)


def checked_flags(script: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that are not None, each with the value that the command line of `script` would give it.

    Raises:
        UserError: A flag is unknown or a value is invalid.
    """
    known = flags_of(script)
    for name in flags:
        if name not in known:
            raise UserError(f"{name} is no flag of {script}{did_you_mean(name, known)}")
    return {
        name: _checked_value(known[name], value)
        for name, value in flags.items()
        if value is not None
    }


def _checked_value(flag: Flag, value: Any) -> Any:
    if flag.is_switch:
        if not isinstance(value, bool):
            raise UserError(f"{flag.name}={value!r}: give True or False")
        return value
    if flag.multiple:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return [_converted(flag, item) for item in values]
    return _converted(flag, value)


def _converted(flag: Flag, value: Any) -> Any:
    """Pass a value through its text, so that Python and the command line accept exactly the same."""
    try:
        converted = flag.type(str(value))  # type: ignore[misc]  # not a switch, so it has a type
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{flag.name}={value!r}: {error}") from error
    if not flag.is_choice(converted):
        choices = ", ".join(map(str, flag.choices or ()))
        raise UserError(f"{flag.name}={value!r}: choose one of {choices}")
    return converted


__all__ = [
    "FINETUNE",
    "Flag",
    "HelpFormatter",
    "PRETRAIN",
    "Parser",
    "Settings",
    "add_flags",
    "checked_flags",
    "check_right_script",
    "flags_of",
    "flags_read",
    "given_flags",
    "make_parser",
    "resolve",
    "settings",
    "usable_cores",
]
