"""One flag: a row of the table in `util.settings.table`, and its help with all defaults."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, PROPOSALS, names_of

PRETRAIN, FINETUNE = "main.py", "finetune_main.py"
SCRIPTS = (PRETRAIN, FINETUNE)


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without dashes. aliases: other spellings, with dashes.
        group: under which the help shows it. scripts: those that have it.
        help: what it means, with its unit. The default is appended; default_help replaces the general one in words.
        type: converts a value's text and refuses bad ones; None: a switch. values: what can be chosen; a registry's
            names, as they are when the parser is made.
        default: general value; None: off for a switch, otherwise none, or decided by a rule in
            `util.settings.resolving`.
        off: spelling of the switch that turns it off; it then is on by default.
        several: whether it takes a list of values.
        session: belongs to this start of a run only; a resumed run does not adopt it from its checkpoint.
        data: says where data is or which part of it is used; not adopted by a run on another kind of dataset.
        counts: what a flag of the schedule counts, `epochs` or `steps`; replaces: flags that it makes void.
        published: means the same in checkpoints of the published codebases, and is adopted from them.
        needs: (flag with value, predicate of the settings) without which nothing reads it.
        interval: of its values, as "[0, 1)".
    """

    name: str
    help: str
    type: Callable[[str], Any] | None = None
    _: KW_ONLY
    group: str = ""
    scripts: tuple[str, ...] = SCRIPTS
    aliases: tuple[str, ...] = ()
    values: Collection[Any] | None = None
    default: Any = None
    default_help: str = ""
    metavar: str | None = None
    off: str = ""
    several: bool = False
    session: bool = False
    data: bool = False
    counts: str = ""
    replaces: tuple[str, ...] = ()
    published: bool = False
    needs: tuple[str, Callable[[Mapping[str, Any]], bool]] | None = None
    interval: str = ""

    @property
    def is_switch(self) -> bool:
        return self.type is None

    def is_choice(self, value: Any) -> bool:
        """Whether a value, or each of a list, is one of `values`; always where anything can be given."""
        items = value if isinstance(value, list | tuple) else [value]
        return self.values is None or all(item in self.values for item in items)

    def general_default(self) -> Any:
        """A new list where it is one."""
        if self.is_switch:
            return bool(self.default)
        return list(self.default) if isinstance(self.default, list) else self.default

    def text(self) -> str:
        """The help with all defaults."""
        text = self.help.replace(
            "{proposals}", names_of(PROPOSALS).replace("file:NAME", "file:PATH")
        )
        if self.is_switch:
            return text
        changed = _registry_defaults(self)
        general = self.default_help or _shown(self.default)
        parts = ([general] if general else []) + [
            f"{name}: {value}" for name, value in changed.items()
        ]
        return f"{text} (default: {'; '.join(parts)})" if parts else text


def _registry_defaults(flag: Flag) -> dict[str, str]:
    """{names joined by commas: default} of the datasets, detectors and pretexts that change it."""
    registries: list[Mapping[str, Any]] = [DATASETS, DETECTORS]
    if PRETRAIN in flag.scripts:
        registries.append(PRETEXTS)
    by_value: dict[str, list[str]] = {}
    for registry in registries:
        for name, entry in registry.items():
            if entry.defaults.get(flag.name) is not None:
                by_value.setdefault(_shown(entry.defaults[flag.name]), []).append(name)
    general = _shown(flag.default)
    return {
        ", ".join(names): value
        for value, names in by_value.items()
        if value != general or flag.default_help
    }


def _shown(value: Any) -> str:
    if value is None or value == "" or isinstance(value, bool):
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def flags_in(group: str, scripts: tuple[str, ...], *flags: Flag) -> list[Flag]:
    """The flags of one group of the help."""
    return [dataclasses.replace(flag, group=group, scripts=scripts) for flag in flags]
