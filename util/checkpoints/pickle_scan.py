"""Check a torch.save file before it is loaded: its names, and its sizes against that of the file.

`torch.load(weights_only=True)` runs no code of a file, but trusts the sizes that the file claims. The pickle is read
here as a list of instructions, without building any object.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, BinaryIO

from util.checkpoints.safe_globals import TORCH_FUNCTIONS, TORCH_TYPES, safe_globals
from util.errors import UserError

# torch.save does not compress. Programs that pack a file again may, and weights get a little smaller.
MAX_UNPACKED_RATIO = 10
MAX_UNPACKED_EXTRA = 2**26  # bytes; a small file may have any ratio
MAX_TUPLE_ENTRIES = 10**6  # with those of nested tuples: Python visits all of them to hash a key
SAVE_TENSORS = (
    "save only its tensors, torch.save({'model': model.state_dict()}, FILE), where it was created"
)
LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages

_ITEM_BYTES = {
    "Bool": 1, "Byte": 1, "Char": 1, "Untyped": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4,
    "Long": 8, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip

# Instruction -> (values taken from the stack, values put on it). Those with a mark take all down to the mark as well.
_CONSTANTS = (
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET",
)  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TAKES = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}


@dataclass
class _Value:
    """A value on the stack of the pickle machine.

    entries: of a tuple, with those of nested tuples. parts: of a short tuple. constant: a number or text. name: of a
    class or function.
    """

    entries: int = 1
    parts: list["_Value"] = field(default_factory=list)
    constant: Any = None
    name: str = ""


@dataclass(frozen=True)
class Storage:
    """The data of tensors: key in the file, and bytes that the pickle claims."""

    key: str
    num_bytes: int


def check_file(path: Path) -> None:
    """Check a torch.save file, zip or legacy. A file of another kind passes: loading it says what it is.

    Raises:
        UserError: it names an object that may run code or has any size, or claims more bytes than it has.
        Exception: it is damaged; any type.
    """
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head.startswith(b"PK"):
            _check_zip(path)
        elif head.startswith(b"\x80"):
            storages = [storage for _ in range(LEGACY_PICKLES) for storage in _scan(file, path)]
            _check_sum(path, sum({storage.key: storage.num_bytes for storage in storages}.values()))


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_sum(path, sum(record.file_size for record in records))
        sizes: dict[str, int] = {}
        for record in records:
            name = PurePosixPath(record.filename)
            if name.parent.name == "data":
                sizes[name.name] = record.file_size

        for record in records:
            if not record.filename.endswith("data.pkl"):
                continue
            with archive.open(record) as file:
                for storage in _scan(file, path):
                    if storage.num_bytes > sizes.get(storage.key, 0):
                        raise UserError(
                            f"{path}: a tensor claims {storage.num_bytes} bytes of data/{storage.key}, which has "
                            f"{sizes.get(storage.key, 0)}: it is damaged; download or save it again"
                        )


def _check_sum(path: Path, num_bytes: int) -> None:
    size = path.stat().st_size
    if num_bytes > MAX_UNPACKED_RATIO * size + MAX_UNPACKED_EXTRA:
        raise UserError(
            f"{path}: its content claims {num_bytes / 2**20:,.0f} MiB and the file has {size / 2**20:,.1f} MiB, so it "
            "is not loaded; save it again with torch.save, which does not compress, or choose another file"
        )


def _scan(file: BinaryIO | Any, path: Path) -> Iterator[Storage]:
    """Read one pickle up to its end and yield its storages. See `check_file` for errors."""
    known = {name for _, name in safe_globals()} | TORCH_FUNCTIONS
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}

    def pop_to_mark() -> list[_Value]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def pop(count: int) -> list[_Value]:
        # Never below a mark, as in the pickle machine of PyTorch.
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise UnpicklingError("a value is missing")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_Value(constant=argument))
        elif name in _TUPLES:
            stack.append(_tuple(pop(_TUPLES[name]), path))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(_tuple(pop_to_mark(), path))
        elif name in ("APPENDS", "SETITEMS"):
            pop_to_mark()
        elif name in _TAKES:
            pop(_TAKES[name])
        elif name == "GLOBAL":
            stack.append(_Value(name=_global_name(argument, known, path)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = pop(2)
            _check_call(function, arguments, known, path)
            stack.append(_Value(entries=arguments.entries))
        elif name == "BINPERSID":
            yield _storage(pop(1)[0])
            stack.append(_Value())
        elif name not in ("PROTO", "STOP"):
            raise UnpicklingError(f"the instruction {name}")


def _tuple(parts: list[_Value], path: Path) -> _Value:
    entries = 1 + sum(part.entries for part in parts)
    if entries > MAX_TUPLE_ENTRIES:
        raise UserError(
            f"{path} contains nested tuples with {entries} entries, which take too long to read; choose another file, "
            "or save only its tensors"
        )
    return _Value(entries=entries, parts=parts if len(parts) < 10 else [])


def _global_name(argument: str, known: set[str], path: Path) -> str:
    name = argument.replace(" ", ".").replace("__builtin__.", "builtins.")
    if name not in known and not TORCH_TYPES.fullmatch(name):
        reason = "is not a plain tensor" if name.startswith("torch.") else "may run code"
        raise UserError(
            f"{path}: it contains the Python object {name}, which {reason}, so it is not loaded; {SAVE_TENSORS}"
        )
    return name


def _check_call(function: _Value, arguments: _Value, known: set[str], path: Path) -> None:
    if function.name not in known:
        raise UnpicklingError(f"a call of {function.name or 'a value'}")
    # Other codecs make texts longer, again and again. This one is that of bytes in a pickle.
    if function.name == "_codecs.encode":
        codec = arguments.parts[1].constant if len(arguments.parts) == 2 else None
        if codec not in ("latin1", "latin-1"):
            raise UnpicklingError(f"text in the encoding {codec}")


def _storage(identity: _Value) -> Storage:
    """Return the storage of ("storage", type, key, device, number of elements, ...)."""
    kind, key, elements = (identity.parts[i] for i in (1, 2, 4))
    item_name = kind.name.rpartition(".")[2].removesuffix("Storage")
    # A number of quantized tensors, which have at most 4 bytes, is only compared with the size of the file.
    num_bytes = elements.constant * _ITEM_BYTES.get(item_name, 1)
    if num_bytes < 0:
        raise UnpicklingError("a storage of negative size")
    return Storage(str(key.constant), num_bytes)
