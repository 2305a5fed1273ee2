"""Many strings in two arrays, which dataloader workers share.

Python objects would be copied page by page after a fork, because each access changes their reference count.

Shapes: S strings, T bytes of all strings together.
"""

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class PackedStrings:
    """An immutable sequence of strings, such as file names. An item is decoded when it is accessed."""

    def __init__(self, strings: Iterable[str]) -> None:
        # fsencode: file names on Linux are bytes and need not be valid UTF-8.
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)  # [S]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)  # [T]

    @classmethod
    def from_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Build from the two arrays of `arrays`, which may be memory-mapped."""
        packed = cls.__new__(cls)
        packed._bytes, packed._ends = data, ends
        return packed

    @classmethod
    def concatenate(
        cls, prefixes: Sequence[str], parts: Sequence["PackedStrings"]
    ) -> "PackedStrings":
        """Concatenate all parts, with `prefixes[i]` in front of each string of `parts[i]`.

        Works on arrays and never makes a Python object per string.
        """
        data = [np.zeros(0, np.uint8)]
        ends = [np.zeros(0, np.int64)]
        total = 0
        for prefix, part in zip(prefixes, parts, strict=True):
            front = np.frombuffer(os.fsencode(prefix), dtype=np.uint8)
            part_ends = part._ends + len(front) * np.arange(1, len(part) + 1)  # [S of the part]
            starts = np.concatenate([[0], part_ends])[:-1]

            # Mark the bytes of the prefixes, then fill prefixes and strings in two assignments.
            is_front = np.zeros(len(part._bytes) + len(front) * len(part), dtype=bool)
            is_front[(starts[:, None] + np.arange(len(front))).ravel()] = True
            strings = np.empty(len(is_front), dtype=np.uint8)
            strings[is_front] = np.tile(front, len(part))
            strings[~is_front] = part._bytes

            data.append(strings)
            ends.append(part_ends + total)
            total += len(strings)
        return cls.from_arrays(np.concatenate(data), np.concatenate(ends))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (bytes of all strings, uint8 [T]; end of each string, int64 [S])."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        view = memoryview(self._bytes)
        start = 0
        for end in self._ends.tolist():
            yield os.fsdecode(view[start:end].tobytes())
            start = end

    def find(self, string: str) -> int | None:
        """Return the index of a string, or None. The strings must be sorted."""
        index = bisect.bisect_left(self, string)
        return index if index < len(self) and self[index] == string else None

    def digest(self) -> str:
        """Return a hex digest of all strings."""
        digest = hashlib.sha256(np.ascontiguousarray(self._bytes))
        # The ends too: without them ["a", "b"] and ["ab"] would have the same digest.
        digest.update(np.ascontiguousarray(self._ends))
        return digest.hexdigest()
