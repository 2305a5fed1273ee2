"""The parsers of both entry scripts and of the tools, made from the table of flags."""

import argparse
import difflib
import itertools
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

from util.errors import UserError
from util.settings.table import FINETUNE, GROUPS, PRETRAIN, REFUSED_FLAGS, Flag, flags_of


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags in one line that names the nearest known one; flags are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.spellings: set[str] = (
            set()
        )  # of all flags; before the parent, whose own flags are added there
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
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
            return f"unknown argument {word}: quote a pattern of tar files, or the shell makes several words of it"
        nearest = difflib.get_close_matches(flag, sorted(self.spellings), n=1, cutoff=0.65)
        return f"unknown argument {word}" + (
            f"; did you mean {nearest[0]}?" if nearest else "; see --help"
        )

    def error(self, message: str):
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def make_parser(script: str) -> Parser:
    """The parser of one entry script, without `--help`, so that it can be a parent of another."""
    parser = Parser(script, add_help=False)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for flag in flags_of(script).values():
        _add(groups[flag.group], flag)
    for name, (takes_value, why) in REFUSED_FLAGS.items():
        nargs = None if takes_value else 0
        parser.add_argument(
            name,
            action=_Refuse,
            why=why,
            nargs=nargs,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    parser.spellings |= spellings(script)
    parser.set_defaults(script=script)
    return parser


def add_flags(parser: Parser, script: str, names: Collection[str]) -> None:
    """Adds some flags of an entry script to the parser of a tool."""
    for name in names:
        flag = flags_of(script)[name]
        _add(parser, flag)
        parser.spellings |= _spellings(flag)


def spellings(script: str) -> set[str]:
    """All spellings of the flags of a script, with dashes; refused ones too."""
    return set(REFUSED_FLAGS).union(*map(_spellings, flags_of(script).values()))


def _spellings(flag: Flag) -> set[str]:
    return {flag.off or f"--{flag.name}", *flag.aliases}


def _add(group: Any, flag: Flag) -> None:
    """Flags that are not given become None: what they then are, `util.settings.resolving` says."""
    if flag.off:
        group.add_argument(
            flag.off, dest=flag.name, action="store_false", default=None, help=flag.text()
        )
        return
    if flag.is_switch:
        group.add_argument(
            f"--{flag.name}", *flag.aliases, action="store_true", default=None, help=flag.text()
        )
        return
    options: dict[str, Any] = {"type": flag.type, "help": flag.text()}
    if flag.values is not None:
        options["choices"] = tuple(flag.values)
    if flag.metavar:
        options["metavar"] = flag.metavar
    if flag.several:
        options["nargs"] = "+"
    if flag.replaces:
        options.update(action=_Schedule, replaces=flag.replaces)
    group.add_argument(f"--{flag.name}", *flag.aliases, **options)


class _Refuse(argparse.Action):
    def __init__(self, *args: Any, why: str = "", **kwargs: Any) -> None:
        self.why = why
        super().__init__(*args, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string} has no effect: {self.why}")


class _Schedule(argparse.Action):
    """The last flag decides what a schedule counts, so that flags after a config win."""

    def __init__(self, *args: Any, replaces: tuple[str, ...] = (), **kwargs: Any) -> None:
        self.replaces = replaces
        super().__init__(*args, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for name in self.replaces:
            setattr(namespace, name, None)
        setattr(namespace, self.dest, values)


# ------------------------------------------------------------------------------------------------- the right script


def check_right_script(argv: Sequence[str]) -> None:
    """Refuses, with the exact command to use, to pre-train with flags that only make sense for `finetune_main.py`.

    Raises:
        UserError: `--eval`, `--masks`, `--frozen_weights`, or `--coco_path` or `--dataset coco` (voc, airbus) without
            `--pretext`.
    """
    flags = {word.split("=")[0] for word in argv}
    pretext = {"--eval"} if "--pretext" in flags else set()  # evaluates a pre-trained model
    wrong: list[str] = [
        flag for flag in ("--eval", "--masks", "--frozen_weights") if flag in flags - pretext
    ]
    if "--coco_path" in flags and not {"--pretext", "--imagenet_path"} & flags:
        wrong.append("--coco_path without --pretext")
    for name in (
        ("coco", "voc", "airbus") if "--pretext" not in flags else ()
    ):  # DETReg's names of labelled images
        if f"--dataset={name}" in argv or ("--dataset", name) in itertools.pairwise(argv):
            wrong.append(f"--dataset {name} without --pretext")
    if wrong:
        pretrain = "\nTo pre-train on the images of that folder, add: --pretext random_query_patch"
        raise UserError(
            f"{wrong[0]}: {PRETRAIN} pre-trains without labels; nothing was started. To train or evaluate with labels:"
            f"\n  python {FINETUNE} {shlex.join(_for_finetuning(argv))}"
            + (pretrain if wrong[0].endswith("--pretext") else "")
        )


def _for_finetuning(argv: Sequence[str]) -> list[str]:
    """The words of a command line without the flags, and their values, that `finetune_main.py` does not take."""
    known = spellings(FINETUNE) - set(REFUSED_FLAGS)
    kept, keeps = [], True
    for word in argv:
        if word.startswith("--"):
            keeps = word.split("=")[0] in known
        if keeps:
            kept.append(word)
    return kept
