"""Many strings in two arrays: worker processes share them, where a list of strings would be copied page by page."""

import bisect
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np


class PackedStrings:
    """A sequence of strings, such as file names. A string is made when it is asked for."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Of the two arrays that `arrays` gave, which may lie on disk."""
        packed = cls.__new__(cls)
        packed._bytes, packed._ends = data, ends
        return packed

    @classmethod
    def joined(cls, prefixes: Sequence[str], parts: Sequence["PackedStrings"]) -> "PackedStrings":
        """All strings of all parts, each behind the prefix of its part; without a Python object for each."""
        data, ends, total = [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)], 0
        for prefix, part in zip(prefixes, parts, strict=True):
            front = np.frombuffer(os.fsencode(prefix), dtype=np.uint8)
            part_ends = part._ends + len(front) * np.arange(1, len(part) + 1)
            starts = np.concatenate([[0], part_ends])[:-1]
            is_front = np.zeros(len(part._bytes) + len(front) * len(part), dtype=bool)
            is_front[(starts[:, None] + np.arange(len(front))).ravel()] = True
            strings = np.empty(len(is_front), dtype=np.uint8)
            strings[is_front], strings[~is_front] = np.tile(front, len(part)), part._bytes
            data.append(strings)
            ends.append(part_ends + total)
            total += len(strings)
        return cls.of_arrays(np.concatenate(data), np.concatenate(ends))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(all bytes uint8, end of each string int64)."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def find(self, string: str) -> int | None:
        """Index of a string, None where it is not there; only where the strings are sorted."""
        index = bisect.bisect_left(self, string)
        return index if index < len(self) and self[index] == string else None

    def digest(self) -> str:
        """Hex digest of all strings and their borders."""
        digest = hashlib.sha256(np.ascontiguousarray(self._bytes))
        digest.update(np.ascontiguousarray(self._ends))
        return digest.hexdigest()
