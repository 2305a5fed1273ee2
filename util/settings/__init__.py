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
from util.settings.parser import Parser, add_flags, full_parser, make_parser, print_help
from util.settings.resolving import given_flags, resolve, usable_cores
from util.settings.right_script import check_right_script
from util.settings.table import FINETUNE, PRETRAIN, UNSUPPORTED_FLAGS, Flag, flags_of


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


def arguments(script: str, flags: Mapping[str, Any]) -> argparse.Namespace:
    """Return what the parser of `script` would return for these flags.

    Raises:
        UserError: A flag is unknown or a value is invalid.
    """
    parsed = vars(make_parser(script).parse_args([]))
    return argparse.Namespace(**{**parsed, **checked_flags(script, flags)})


def checked_flags(script: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that are not None, each with the value that the command line of `script` would give it.

    Args:
        flags: Values by flag name without dashes. Other spellings of the command line are known too: `load_backbone`,
            `no_aux_loss=True` for `aux_loss=False`.

    Raises:
        UserError: A flag is unknown or a value is invalid.
    """
    checked: dict[str, Any] = {}
    for keyword, value in flags.items():
        flag = _flag_of_keyword(script, keyword)
        if value is None:
            continue
        if flag.name in checked:
            raise UserError(f"{keyword} and {flag.name} are the same flag: give one of them")
        checked[flag.name] = _checked_value(flag, value)
        if keyword != flag.name and f"--{keyword}" == flag.off_switch:
            checked[flag.name] = not checked[flag.name]
    return checked


def _flag_of_keyword(script: str, keyword: str) -> Flag:
    """Return the flag that has this name or spelling, without dashes.

    Raises:
        UserError: The script has no such flag. The message has the reason, or the nearest flag.
    """
    known = flags_of(script)
    if keyword in known:
        return known[keyword]
    spelling = f"--{keyword}"
    for flag in known.values():
        if spelling in (flag.off_switch, *flag.aliases):
            return flag

    message = f"{keyword} is no flag of {script}"
    if spelling in UNSUPPORTED_FLAGS:
        raise UserError(f"{message}: {UNSUPPORTED_FLAGS[spelling][1]}")
    other = FINETUNE if script == PRETRAIN else PRETRAIN
    if keyword in flags_of(other):
        raise UserError(f"{message}, but of {other}")
    raise UserError(f"{message}{did_you_mean(keyword, known)}")


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
    "arguments",
    "checked_flags",
    "check_right_script",
    "flags_of",
    "flags_read",
    "full_parser",
    "given_flags",
    "make_parser",
    "print_help",
    "resolve",
    "settings",
    "usable_cores",
]
