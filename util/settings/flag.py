"""One flag: a row of the table in `util.settings.table`, and its help with all defaults."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from util.settings.help import format_default
from util.settings.registry import BACKBONES, DATASETS, DETECTORS, PRETEXTS, PROPOSALS, list_names

PRETRAIN, FINETUNE = "main.py", "finetune_main.py"
SCRIPTS = (PRETRAIN, FINETUNE)


@dataclass(frozen=True)
class Flag:
    """One flag of the entry scripts.

    Attributes:
        name: Name without dashes.
        help: Meaning and unit. `help_text` adds who reads the flag and its defaults.
        type: Converts the text of a value and rejects bad ones; None for a switch.
        group: Heading in `--help`.
        scripts: Entry scripts that have the flag.
        aliases: Other spellings, with dashes.
        choices: Allowed values. A registry is read when the parser is built, so later entries count too.
        default: General default. None means off for a switch; otherwise not set, or decided by a rule in
            `util.settings.resolving`.
        default_help: Replaces the general default in the help, in words: one text, or one per script.
        metavar: Kind or unit of the value in `--help`.
        off_switch: Spelling of a switch that turns the setting off. The setting is then on by default.
        multiple: Takes one or more values.
        per_launch: Applies to this launch only. A resumed run does not adopt it from its checkpoint.
        data_specific: Selects data. A run on another type of dataset does not adopt it.
        schedule_unit: What a schedule flag counts, `epochs` or `steps`.
        overrides: Flags that this one resets when it comes later on the command line.
        published: Has the same meaning in checkpoints of the published codebases and is adopted from them.
        requires: (flag with value, predicate of the settings) without which nothing reads this flag.
        value_range: Interval of allowed values such as "[0, 1)".
    """

    name: str
    help: str
    type: Callable[[str], Any] | None = None
    _: KW_ONLY
    group: str = ""
    scripts: tuple[str, ...] = SCRIPTS
    aliases: tuple[str, ...] = ()
    choices: Collection[Any] | None = None
    default: Any = None
    default_help: str | Mapping[str, str] = ""
    metavar: str | None = None
    off_switch: str = ""
    multiple: bool = False
    per_launch: bool = False
    data_specific: bool = False
    schedule_unit: str = ""
    overrides: tuple[str, ...] = ()
    published: bool = False
    requires: tuple[str, Callable[[Mapping[str, Any]], bool]] | None = None
    value_range: str = ""

    @property
    def is_switch(self) -> bool:
        return self.type is None

    def is_choice(self, value: Any) -> bool:
        """Return whether a value, or each item of a list, is one of `choices`; always true without choices."""
        items = value if isinstance(value, list | tuple) else [value]
        return self.choices is None or all(item in self.choices for item in items)

    def general_default(self) -> Any:
        """Return the default before datasets, detectors and pretexts change it; a list is a new one each time."""
        if self.is_switch:
            return bool(self.default)
        return list(self.default) if isinstance(self.default, list) else self.default

    def help_text(self, script: str) -> str:
        """Return the help of `script`: who reads the flag, its meaning, and every default.

        Example: "deformable_detr: number of feature levels (default: 4)".
        """
        text = self.help.format(
            proposals=list_names(PROPOSALS).replace("file:NAME", "file:PATH"),
            backbones=list_names(BACKBONES),
        )
        readers = self._readers(script)
        if readers:
            text = f"{', '.join(readers)}: {text}"
        return f"{text} (default: {'; '.join(self._defaults(script, readers))})"

    def _readers(self, script: str) -> list[str]:
        """Names of the only detectors, datasets or pretexts that read the flag; empty if all of them do."""
        names = []
        for registry in _registries(script):
            readers = [name for name, entry in registry.items() if self.name in entry.flags]
            if len(readers) < len(registry):
                names += readers
        return names

    def _defaults(self, script: str, readers: list[str]) -> list[str]:
        """The general default, then "names: value" for the datasets, detectors and pretexts that change it."""
        in_words = self.default_help
        if not isinstance(in_words, str):
            in_words = in_words[script]
        # The switch --no_aux_loss is off by default, although its setting `aux_loss` is on.
        if in_words:
            general = in_words
        elif self.is_switch:
            general = "off"
        else:
            general = format_default(self.default)

        names_by_value: dict[str, list[str]] = {}
        for registry in _registries(script):
            for name, entry in registry.items():
                # None in a registry: a rule decides, which `default_help` explains.
                if entry.defaults.get(self.name) is not None:
                    value = format_default(entry.defaults[self.name])
                    names_by_value.setdefault(value, []).append(name)
        if len(readers) == 1 and names_by_value:
            return list(names_by_value)  # the only reader's own default

        changed = [
            f"{', '.join(names)}: {value}"
            for value, names in names_by_value.items()
            if value != general
        ]
        return [general, *changed]


def _registries(script: str) -> list[Mapping[str, Any]]:
    """The registries whose entries have flags and defaults. Only pre-training has pretexts."""
    registries: list[Mapping[str, Any]] = [DATASETS, DETECTORS]
    return [*registries, PRETEXTS] if script == PRETRAIN else registries


def flags_in(group: str, scripts: tuple[str, ...], *flags: Flag) -> list[Flag]:
    """Return the flags with their heading in `--help` and the scripts that have them."""
    return [dataclasses.replace(flag, group=group, scripts=scripts) for flag in flags]
