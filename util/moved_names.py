"""Import errors that name the new place of what published notebooks import."""

from collections.abc import Callable
from typing import NoReturn


def raise_with_place(module: str, places: dict[str, str]) -> Callable[[str], NoReturn]:
    """Return a module's `__getattr__`, which raises ImportError for each name.

    Args:
        places: old name -> new name with its module, or what to do instead.
    """

    def find(name: str) -> NoReturn:
        if name.startswith("__"):  # Python itself asks for some of these
            raise AttributeError(name)
        place = places.get(
            name, "not part of this project; docs/python_api.md shows its Python API"
        )
        raise ImportError(f"{module}.{name}: {place}")

    return find
