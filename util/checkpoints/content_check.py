"""Check the content of a weight file once it is loaded, before anything walks through it or copies a tensor."""

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError

MAX_DEPTH = 50  # of nested containers; a resumable checkpoint has about six
MAX_ENTRIES = 5 * 10**6  # a list that occurs twice counts twice, because copying it makes it two
MAX_EXPANDED_BYTES = 2**24  # of a tensor that repeats its data (stride 0)
_CONTAINERS = (Mapping, list, tuple, set, Namespace)


def check_content(content: Any, source: str | os.PathLike) -> None:
    """Check that containers are finite and that tensors are plain, with data of their own.

    Raises:
        UserError: a container contains itself or nests too deeply, there are too many entries, or a tensor is sparse,
            quantized, without data, or much larger than its data.
    """
    counts: dict[int, int] = {}  # finished containers, with all entries below them
    open_ones: set[int] = set()
    # Each container twice: before its entries, and after them. A loop, since the nesting may exceed Python's limit.
    stack: list[tuple[Any, bool]] = [(content, False)]
    while stack:
        value, is_after = stack.pop()
        if isinstance(value, Tensor):
            _check_tensor(value, source)
            continue
        key = id(value)
        if not _is_container(value) or key in counts:
            continue
        entries = _entries(value)
        if is_after:
            open_ones.remove(key)
            counts[key] = 1 + sum(counts.get(id(entry), 1) for entry in entries)
            if counts[key] > MAX_ENTRIES:
                raise UserError(
                    f"{source} has more than {MAX_ENTRIES:,} entries, which is no checkpoint: choose another file"
                )
            continue
        if key in open_ones:
            raise UserError(
                f"{source} has a {_kind(value)} that contains itself: choose another file"
            )
        open_ones.add(key)
        if len(open_ones) > MAX_DEPTH:
            raise UserError(
                f"{source} has containers nested {MAX_DEPTH} deep, which is no checkpoint: choose another file"
            )
        stack.append((value, True))
        stack += [(entry, False) for entry in entries]


def _is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or (
        isinstance(value, np.ndarray) and value.dtype.hasobject
    )


def _entries(value: Any) -> list[Any]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, np.ndarray):
        return list(value.flat)
    return list(value)


def _kind(value: Any) -> str:
    return "dict" if isinstance(value, Mapping) else type(value).__name__


def _check_tensor(value: Tensor, source: str | os.PathLike) -> None:
    kinds = {
        "sparse": value.layout != torch.strided,
        "quantized": value.is_quantized,
        "nested": value.is_nested,
        "meta (without data)": value.is_meta,
    }
    kind = next((kind for kind, found in kinds.items() if found), None)
    if kind:
        raise UserError(
            f"{source} has a {kind} tensor: save it as a plain one, or choose another file"
        )
    num_bytes = value.numel() * value.element_size()
    if num_bytes > max(value.untyped_storage().nbytes(), MAX_EXPANDED_BYTES):
        raise UserError(
            f"{source} has a tensor {list(value.shape)} of {num_bytes / 2**20:,.0f} MiB that repeats "
            f"{value.untyped_storage().nbytes() / 2**20:,.1f} MiB of data: save it with .contiguous(), or choose "
            "another file"
        )
