"""Training continues when a file that it does not need can't be written."""

import contextlib
from collections.abc import Iterator

from util.errors import UserError
from util.logger import log


@contextlib.contextmanager
def training_continues() -> Iterator[None]:
    """Log a UserError of the block in one line instead of raising it."""
    try:
        yield
    except UserError as error:
        log.error("training continues, but %s", error)
