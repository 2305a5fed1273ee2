"""Build the parsers of both entry scripts and of the tools from the table of flags."""

import argparse
import difflib
import sys
from collections.abc import Collection
from typing import Any

from util.settings.help import HelpFormatter
from util.settings.table import (
    FINETUNE,
    GROUPS,
    PRETRAIN,
    SCRIPTS,
    UNSUPPORTED_FLAGS,
    Flag,
    flags_of,
)

SUGGESTION_CUTOFF = 0.65  # similarity of difflib, 0 to 1, below which no flag is suggested

# `python -m torch.distributed.launch` without --use_env passes the rank by one of these. It also sets LOCAL_RANK, which
# is what this project reads.
LOCAL_RANK_FLAGS = ("--local-rank", "--local_rank")

HELP_FLAGS = frozenset({"-h", "--help"})
HELP_FOOTER = (
    "A default after a name applies to that detector, pretext or dataset. If several apply, the "
    "pretext's wins over the detector's, and the detector's over the dataset's. A name in front of a "
    "description means that only this detector, pretext or dataset reads the flag."
)


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors that suggest the nearest flag.

    Flags can't be abbreviated: `--num_q` would silently become another flag when one that starts like it is added.
    """

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        # Spellings of all flags. Set first: the parent class adds `--help` and the parents' flags by `add_argument`.
        self.spellings: set[str] = set()

        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        if prog in SCRIPTS:
            # argparse would print all flags twice: first in a usage of forty lines, then with their help.
            kwargs.setdefault("usage", "%(prog)s [flags]")
            kwargs.setdefault("epilog", HELP_FOOTER)
        super().__init__(prog, **kwargs)

        for parent in kwargs.get("parents", ()):
            self.spellings |= getattr(parent, "spellings", set())

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        self.spellings |= {name for name in names if name.startswith("-")}
        return super().add_argument(*names, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_message(unknown[0]))
        return parsed

    def _unknown_message(self, word: str) -> str:
        flag = word.split("=")[0]
        other = FINETUNE if self.prog == PRETRAIN else PRETRAIN
        if flag in spellings(other):
            return f"{flag} is a flag of {other}, not of {self.prog}"
        if word.endswith(".tar"):
            return f"unknown argument {word}: quote a pattern of tar files, or the shell expands it"

        nearest = difflib.get_close_matches(
            flag, sorted(self.spellings), n=1, cutoff=SUGGESTION_CUTOFF
        )
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
        return f"unknown argument {word}; {hint}"

    def error(self, message: str):
        # argparse would print the whole usage before the message.
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def full_parser(script: str, doc: str) -> Parser:
    """Return the parser of one entry script with `--help`. doc: the script's docstring, whose first line is shown."""
    return Parser(script, parents=[make_parser(script)], description=doc.splitlines()[0])


def print_help(script: str, doc: str) -> None:
    """Print the help of an entry script and leave, if its command line asks for it.

    A script calls this before it imports PyTorch and the models, which takes seconds.
    """
    if not HELP_FLAGS.isdisjoint(sys.argv[1:]):
        full_parser(script, doc).parse_args(["--help"])


def make_parser(script: str) -> Parser:
    """Return the parser of one entry script, without `--help`, so that it can be the parent of another parser."""
    parser = Parser(script, add_help=False)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for flag in flags_of(script).values():
        _add_flag(groups[flag.group], flag, script)

    for name, (takes_value, reason) in UNSUPPORTED_FLAGS.items():
        parser.add_argument(
            name,
            action=_UnsupportedFlag,
            reason=reason,
            nargs=None if takes_value else 0,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    parser.add_argument(
        *LOCAL_RANK_FLAGS, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )

    # Flags in groups don't pass through `Parser.add_argument`.
    parser.spellings |= spellings(script)
    parser.set_defaults(script=script)
    return parser


def add_flags(parser: Parser, script: str, names: Collection[str]) -> None:
    """Add some flags of an entry script to the parser of a tool."""
    for name in names:
        flag = flags_of(script)[name]
        _add_flag(parser, flag, script)
        parser.spellings |= _flag_spellings(flag)


def spellings(script: str) -> set[str]:
    """Return all spellings of a script's flags, with dashes, including unsupported ones."""
    return set(UNSUPPORTED_FLAGS).union(*map(_flag_spellings, flags_of(script).values()))


def _flag_spellings(flag: Flag) -> set[str]:
    return {flag.off_switch or f"--{flag.name}", *flag.aliases}


def _add_flag(group: Any, flag: Flag, script: str) -> None:
    """Add one flag to a parser or group.

    The default is always None, which means "not given": `util.settings.resolving` fills in the real default, because it
    depends on other flags and on the checkpoint.
    """
    help_text = flag.help_text(script)
    if flag.is_switch:
        group.add_argument(
            flag.off_switch or f"--{flag.name}",
            *flag.aliases,
            dest=flag.name,
            action="store_false" if flag.off_switch else "store_true",
            default=None,
            help=help_text,
        )
        return

    options: dict[str, Any] = {"type": flag.type, "help": help_text}
    if flag.choices is not None:
        options["choices"] = tuple(flag.choices)
    if flag.metavar:
        options["metavar"] = flag.metavar
    if flag.multiple:
        options["nargs"] = "+"
    if flag.overrides:
        options.update(action=_ScheduleFlag, overrides=flag.overrides)
    group.add_argument(f"--{flag.name}", *flag.aliases, **options)


class _UnsupportedFlag(argparse.Action):
    """Reject a flag of a published codebase and say why."""

    def __init__(self, *args: Any, reason: str = "", **kwargs: Any) -> None:
        self.reason = reason
        super().__init__(*args, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string} has no effect: {self.reason}")


class _ScheduleFlag(argparse.Action):
    """Set one flag of the schedule and reset those that it overrides.

    The last one on the command line wins, so flags after a config file replace its schedule.
    """

    def __init__(self, *args: Any, overrides: tuple[str, ...] = (), **kwargs: Any) -> None:
        self.overrides = overrides
        super().__init__(*args, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for name in self.overrides:
            setattr(namespace, name, None)
        setattr(namespace, self.dest, values)
