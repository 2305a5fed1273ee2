"""What the pickle in a weight file may name: classes and functions that only store data.

PyTorch allows a few by itself. The others are those in `args` and `meta` of published checkpoints, most of them under
the name of the original but replaced by a function of this module: NumPy's own trust the sizes that a file claims.
"""

import argparse
import math
import pathlib
import re
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np

# Of those that PyTorch allows. The others make tensors of any size without data, or tensors that no model here has.
TORCH_FUNCTIONS = frozenset(
    {
        "_codecs.encode",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
    }
)
# Types of storages and elements, which a pickle names but never calls.
TORCH_TYPES = re.compile(
    r"torch\.(cuda\.)?(\w+Storage|storage\.(Typed|Untyped)Storage)"
    r"|torch\.(bool|u?int\d+|bfloat16|float\w+|complex\d+)"
)

MAX_TEXT = 2**16  # characters of a NumPy string; those in settings are short
_DTYPE = re.compile(r"[<>|=]?(?:[?bhilqBHILQefd]|[biuf][1248]|([SU])(\d{1,9})|O8?)")


def safe_globals() -> list[tuple[Callable, str]]:
    """Return what to allow besides PyTorch's own, for `torch.serialization.safe_globals`: (stand-in, name)."""
    allowed: list[tuple[Callable, str]] = [(argparse.Namespace, "argparse.Namespace")]
    allowed += [(stand_in, name) for name, stand_in in numpy_stand_ins().items()]

    # As str: a WindowsPath can't be created on Linux, nor a PosixPath on Windows. Python 3.13 has pathlib._local.
    for module in ("pathlib", "pathlib._local"):
        allowed += [
            (_posix_path_to_str, f"{module}.{name}")
            for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")
        ]
        allowed += [
            (_windows_path_to_str, f"{module}.{name}")
            for name in ("WindowsPath", "PureWindowsPath")
        ]

    # defaultdict, and the types that it may have as its factory.
    allowed += [(_empty_dict, "collections.defaultdict")]
    for module in ("builtins", "__builtin__"):
        allowed.append((_empty_bytes, f"{module}.bytes"))  # of an empty array
        allowed += [
            (_never_called, f"{module}.{name}") for name in ("list", "dict", "int", "float", "str")
        ]
    return allowed


def numpy_stand_ins() -> dict[str, Callable]:
    """Return name -> stand-in of what the pickle of a NumPy array or number names."""
    stand_ins: dict[str, Callable] = {"numpy.ndarray": PickledArray, "numpy.dtype": PickledDtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # NumPy 1 and 2
        stand_ins |= {f"{module}.scalar": _scalar, f"{module}._reconstruct": _reconstruct}
    return stand_ins


def encode_latin1(text: str, codec: str) -> bytes:
    """Stand-in for `_codecs.encode`, by which older pickles store bytes."""
    if codec not in ("latin1", "latin-1"):  # others make a text longer, again and again
        raise UnpicklingError(f"text in the encoding {str(codec)[:20]}")
    return text.encode(codec)


class PickledDtype:
    """Stand-in for `numpy.dtype` in a pickle: a plain type and its byte order, and nothing that a file could forge.

    Raises:
        UnpicklingError: it is not bool, integer, float, text or object.
    """

    def __init__(self, code: str, *_align_and_copy: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        match = _DTYPE.fullmatch(code) if isinstance(code, str) else None
        if match is None or int(match[2] or 0) > MAX_TEXT:
            raise UnpicklingError(f"a NumPy array of type {str(code)[:20]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray(np.ndarray):
    """Stand-in for `numpy.ndarray` in a pickle, whose shape must match its data."""

    def __new__(cls, *_shape_and_type: Any) -> "PickledArray":
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        shape = tuple(shape)
        if not isinstance(dtype, PickledDtype) or not all(
            type(side) is int and side >= 0 for side in shape
        ):
            raise UnpicklingError("a damaged NumPy array")
        dtype, count = dtype.dtype, math.prod(shape)
        if count == 0:
            shape = (0,)  # [0, 10^9] would become a list of 10^9 empty lists
        if not isinstance(data, list if dtype.hasobject else bytes):
            raise UnpicklingError("a damaged NumPy array")
        if len(data) != (count if dtype.hasobject else count * dtype.itemsize):
            raise UnpicklingError("a NumPy array of another size than its data")
        super().__setstate__((1, shape, dtype, bool(is_fortran), data))


def _reconstruct(*_type_shape_code: Any) -> PickledArray:
    return PickledArray()


def _scalar(dtype: PickledDtype, data: Any = None) -> Any:
    if dtype.dtype.hasobject:
        return data
    if not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise UnpicklingError("a NumPy number of another size than its data")
    return np.frombuffer(data, dtype.dtype)[0] if data else dtype.dtype.type()


def _posix_path_to_str(*parts: str) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _windows_path_to_str(*parts: str) -> str:
    return str(pathlib.PureWindowsPath(*parts))


def _empty_dict(*_factory: Any) -> dict:
    return {}


def _empty_bytes() -> bytes:
    return b""


def _never_called(*_arguments: Any) -> None:
    # `str` of nested lists, for example, could take any time and memory.
    raise UnpicklingError("a call of a built-in type")
