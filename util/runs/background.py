"""Writing a file in the background while training continues: the copy on the host, and the thread that writes it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from util.runs.optional_files import training_continues

THREAD_NAME = "checkpoint writer"


class BackgroundWriter:
    """Runs one write at a time in a thread. As a context manager it waits for the last one at the end.

    A write that fails is logged in one line by the next `start` or `wait`: training continues, since the files of
    earlier writes are intact and the next write may succeed.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Wait for the write before, and start this one."""
        self.wait()
        # A daemon: a second Ctrl-C must not wait for the disk. An unfinished file has not got its name yet.
        self.thread = threading.Thread(
            target=self._run, args=(write,), name=THREAD_NAME, daemon=True
        )
        self.thread.start()

    def wait(self) -> None:
        """Wait until nothing is written any more.

        Raises:
            Exception: an error of a write other than a UserError, which is logged.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        with training_continues():
            if error is not None:
                raise error

    def _run(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - raised by `wait`, in the thread that trains
            self.error = error

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # not KeyboardInterrupt, which ends at once
            self.wait()


def copy_to_host(value: Any, copies: dict[tuple, Tensor] | None = None) -> Any:
    """Return a copy of nested containers whose tensors are copies on the host, which training does not change.

    Tensors that are the same memory, such as a head that decoder layers share, are one tensor in the copy too.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        memory = value.untyped_storage().data_ptr(), value.storage_offset()
        key = (*memory, value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the attributes of a state dict
        for name, entry in value.items():
            copied[name] = copy_to_host(entry, copies)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(entry, copies) for entry in value)
    return value
