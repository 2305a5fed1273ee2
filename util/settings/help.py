"""How `--help` looks, for both entry scripts and the tools: every flag shows its default."""

import argparse
import shutil
import textwrap
from typing import Any

MAX_COLUMNS = 120  # longer lines are hard to read, however wide the terminal


def format_default(value: Any) -> str:
    """Return a default in words: on or off, `not set` without a value, small numbers as papers write them (1e-4)."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == "":
        return "not set"
    if isinstance(value, list | tuple):
        return " ".join(map(format_default, value)) or "none"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


class HelpFormatter(argparse.HelpFormatter):
    """Append the default to each flag's help, unless the help names one, and write a metavar once for all aliases."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, MAX_COLUMNS)
        kwargs.setdefault("width", columns - 2)
        kwargs.setdefault("max_help_position", 24 if columns < 100 else 32)
        super().__init__(prog, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "(default" in text or action.required or not action.option_strings:
            return text
        if action.default is argparse.SUPPRESS:  # --help, and flags that are refused
            return text
        # A switch that stores False shows its own state, not the value that it changes.
        default = "off" if action.nargs == 0 else format_default(action.default)
        return f"{text} (default: {default.replace('%', '%%')})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        # argparse would break names at their hyphens, such as airbus-ship-detection.
        return textwrap.wrap(
            " ".join(text.split()), width, break_on_hyphens=False, break_long_words=False
        )
