"""`Settings`: the immutable values of all flags, each with its origin."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# Origins of a value. GIVEN: by the user. CHECKPOINT: adopted from a resumed checkpoint. PRETEXT, DETECTOR, DATASET:
# a default of that entry in the registry. DEFAULT: the general default. RULE: derived from other settings.
GIVEN = "given"
CHECKPOINT = "checkpoint"
RULE = "rule"
PRETEXT = "pretext"
DETECTOR = "detector"
DATASET = "dataset"
DEFAULT = "default"


class Settings:
    """Value of each flag as an attribute, such as `settings.num_queries`. Immutable; `replace` returns changed ones.

    Attributes:
        script: Entry script that the settings are for.
        origins: Name -> where the value comes from, one of the constants of this module.
    """

    __slots__ = ("_origins", "_values", "script")

    def __init__(self, script: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        # `__setattr__` of this class refuses assignment.
        object.__setattr__(self, "script", script)
        object.__setattr__(self, "_values", dict(sorted(values.items())))
        object.__setattr__(self, "_origins", dict(origins))

    def __getattr__(self, name: str) -> Any:
        # Private names are no settings. On an instance without `_values` yet, the lookup below would recurse.
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return _copy_list(self._values[name])
        except KeyError:
            raise AttributeError(
                f"there is no setting {name}{did_you_mean(name, self._values)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"settings do not change: can't set {name}; settings.replace({name}=...) returns changed settings"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]  # values may be lists

    def __reduce__(self) -> tuple[Any, ...]:
        # Dataloader workers get the settings by pickle, which would set the slots one by one.
        return Settings, (self.script, self._values, self._origins)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={self._values[name]!r}" for name in self.names_from(GIVEN))
        return f"Settings({self.script}: {given})"

    @property
    def origins(self) -> dict[str, str]:
        """Name -> given, checkpoint, rule, pretext, detector, dataset or default."""
        return dict(self._origins)

    def names_from(self, *origins: str) -> list[str]:
        """Return the names of the settings with one of these origins, sorted."""
        return sorted(name for name, origin in self._origins.items() if origin in origins)

    def was_given(self, name: str) -> bool:
        """Return whether the user or a resumed checkpoint chose the value, rather than a default."""
        return self._origins.get(name) in (GIVEN, CHECKPOINT)

    def replace(self, **changes: Any) -> "Settings":
        """Return settings with changed values, whose origin is then `given`. Rules and checks don't run again.

        Raises:
            AttributeError: A name is not a setting.
        """
        for name in changes:
            if name not in self._values:
                raise AttributeError(
                    f"there is no setting {name}{did_you_mean(name, self._values)}"
                )
        return Settings(
            self.script,
            {**self._values, **changes},
            {**self._origins, **dict.fromkeys(changes, GIVEN)},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return name -> value, including `script`, as plain values for printing, JSON and checkpoints."""
        values = {name: _copy_list(value) for name, value in self._values.items()}
        return {**values, "script": self.script}


def _copy_list(value: Any) -> Any:
    """Copy lists: appending to what was returned must not change the settings."""
    return list(value) if isinstance(value, list) else value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the most similar known name, or "" if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
