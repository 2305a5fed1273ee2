"""Settings that rest: every flag with its value and where the value comes from."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

GIVEN, CHECKPOINT, RULE, PRETEXT, DETECTOR, DATASET, DEFAULT = (
    "given",
    "checkpoint",
    "rule",
    "pretext",
    "detector",
    "dataset",
    "default",
)


class Settings:
    """The value of each flag by its name (`settings.num_queries`). Nobody changes them: `replace` makes others.

    `origins` tells where each value comes from: `given` by the user, adopted from a `checkpoint`, the default of the
    `pretext`, the `detector` or the `dataset`, the general `default`, or a `rule` that follows from other settings.
    `script` is the entry script that they are for.
    """

    __slots__ = ("_origins", "_values", "script")

    def __init__(self, script: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        object.__setattr__(self, "script", script)
        object.__setattr__(self, "_values", dict(sorted(values.items())))
        object.__setattr__(self, "_origins", dict(origins))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return _own(self._values[name])
        except KeyError:
            raise AttributeError(
                f"there is no setting {name}{nearest(name, self._values)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"settings do not change: {name} stays as it is; settings.replace({name}=...) makes others"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]  # values may be lists

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, (self.script, self._values, self._origins)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={self._values[name]!r}" for name in self.names_from(GIVEN))
        return f"Settings({self.script}: {given})"

    @property
    def origins(self) -> dict[str, str]:
        """Name -> given, checkpoint, rule, pretext, detector, dataset or default."""
        return dict(self._origins)

    def names_from(self, *origins: str) -> list[str]:
        """Names of the settings with one of these origins, sorted."""
        return sorted(name for name, origin in self._origins.items() if origin in origins)

    def was_given(self, name: str) -> bool:
        """Whether the user or a resumed checkpoint chose the value, rather than a default."""
        return self._origins.get(name) in (GIVEN, CHECKPOINT)

    def replace(self, **changes: Any) -> "Settings":
        """The same settings but for `changes`, which count as given. Nothing else follows from them.

        Raises:
            AttributeError: a name that is no setting.
        """
        _check_names(changes, self._values)
        return Settings(
            self.script,
            {**self._values, **changes},
            {**self._origins, **dict.fromkeys(changes, GIVEN)},
        )

    def as_dict(self) -> dict[str, Any]:
        """Name -> value with the script, as plain values: for printing, JSON and checkpoints."""
        return {
            **{name: _own(value) for name, value in self._values.items()},
            "script": self.script,
        }


def _own(value: Any) -> Any:
    """Of a list a copy: who appends to it changes no settings."""
    return list(value) if isinstance(value, list) else value


def _check_names(names: Iterable[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise AttributeError(f"there is no setting {name}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
