"""A pause of Python's garbage collector, for code that creates millions of objects that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's garbage collector of reference cycles.

    While millions of objects are created, the collector visits all of them again and again, and JSON has no cycles. For
    COCO with its polygons this takes three quarters of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
