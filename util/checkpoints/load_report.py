"""What happened to each tensor when weights went into a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Names of tensors with their number of elements: loaded, left at their initial value, not used from the file."""

    loaded: dict[str, int] = field(default_factory=dict)
    reinitialised: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A short text table by top-level module: tensors and parameters loaded, re-initialised, unused."""
        columns = (self.loaded, self.reinitialised, self.unused)
        modules = list(dict.fromkeys(_top_level(key) for column in columns for key in column))
        rows = [("module", "loaded", "re-initialised", "unused")]
        rows += [(module, *(_count(column, module) for column in columns)) for module in modules]
        rows.append(("total", *(_count(column, None) for column in columns)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines + self.notes)


def _top_level(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "transformer" else parts[0]


def _count(column: Mapping[str, int], module: str | None) -> str:
    sizes = [size for key, size in column.items() if module in (None, _top_level(key))]
    return f"{len(sizes)} ({_short(sum(sizes))})" if sizes else "-"


def _short(number: int) -> str:
    return (
        f"{number / 1e6:.1f} M"
        if number >= 1e6
        else f"{number / 1e3:.1f} k"
        if number >= 1e3
        else str(number)
    )
