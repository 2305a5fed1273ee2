"""Report of what happened to each tensor when weights were loaded into a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Tensors of a model and of the loaded file: name -> number of elements.

    loaded: from the file. reinitialized: parameters of the model that keep their initial values. unused: tensors of the
    file that the model does not have. notes: lines to show below the table.
    """

    loaded: dict[str, int] = field(default_factory=dict)
    reinitialized: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return a text table: number of tensors and of elements per top-level module, and the notes."""
        columns = (self.loaded, self.reinitialized, self.unused)
        modules = list(dict.fromkeys(_top_level(key) for column in columns for key in column))

        rows = [("module", "loaded", "re-initialized", "unused")]
        rows += [(module, *(_count(column, module) for column in columns)) for module in modules]
        rows.append(("total", *(_count(column, None) for column in columns)))

        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines + self.notes)


def _top_level(key: str) -> str:
    # `transformer.encoder` and `transformer.decoder` are two rows: together they are most of a detector.
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "transformer" else parts[0]


def _count(column: Mapping[str, int], module: str | None) -> str:
    """Return "tensors (elements)" of a module, or of all modules for None."""
    sizes = [size for key, size in column.items() if module in (None, _top_level(key))]
    return f"{len(sizes)} ({_abbreviate(sum(sizes))})" if sizes else "-"


def _abbreviate(number: int) -> str:
    if number >= 1e6:
        return f"{number / 1e6:.1f} M"
    if number >= 1e3:
        return f"{number / 1e3:.1f} k"
    return str(number)
