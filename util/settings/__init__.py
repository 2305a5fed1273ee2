"""Settings: one table of flags (`table`), the parsers made from it (`parser`), and what was given made complete
(`resolving`) into settings that nobody changes (`frozen`). What can be chosen by name is in `registry`.

From a command line:  resolve(make_parser("finetune_main.py").parse_args(["--num_queries", "50"]))
From Python:          settings(detector="conditional_detr", num_queries=50)
"""

import argparse
from collections.abc import Mapping
from typing import Any

from util.errors import UserError
from util.settings.checks import flags_read
from util.settings.frozen import Settings, nearest
from util.settings.parser import Parser, add_flags, check_right_script, make_parser
from util.settings.resolving import given_flags, resolve, usable_cores
from util.settings.table import FINETUNE, PRETRAIN, Flag, flags_of


def settings(script: str | None = None, **flags: Any) -> Settings:
    """Complete settings from the flags that differ from their defaults, by their names without dashes.

    script: `main.py` or `finetune_main.py`; by default the one that has all of these flags, fine-tuning first. None
    stands for a flag that is not given.

    Raises:
        UserError: an unknown flag, a value that it does not take, or flags that contradict each other.
    """
    script = script or (FINETUNE if set(flags) <= set(flags_of(FINETUNE)) else PRETRAIN)
    return resolve(checked_flags(script, flags), script=script)


def checked_flags(script: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are not None, each as the command line of `script` would have it.

    Raises:
        UserError: an unknown flag, or a value that it does not take.
    """
    known = flags_of(script)
    for name in flags:
        if name not in known:
            raise UserError(f"{name} is no flag of {script}{nearest(name, known)}")
    return {
        name: _checked(known[name], value) for name, value in flags.items() if value is not None
    }


def _checked(flag: Flag, value: Any) -> Any:
    """The value as the command line would have it."""
    if flag.is_switch:
        if not isinstance(value, bool):
            raise UserError(f"{flag.name}={value!r}: give True or False")
        return value
    if flag.several:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return [_converted(flag, item) for item in values]
    return _converted(flag, value)


def _converted(flag: Flag, value: Any) -> Any:
    try:
        converted = flag.type(str(value))  # type: ignore[misc]  # no switch
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{flag.name}={value!r}: {error}") from error
    if not flag.is_choice(converted):
        raise UserError(
            f"{flag.name}={value!r}: choose one of {', '.join(map(str, flag.values or ()))}"
        )
    return converted


__all__ = [
    "FINETUNE",
    "Flag",
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
