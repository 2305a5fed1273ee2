"""Random damage to the content of a file, which depends on the random generator alone."""

import copy
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np

NUMBERS = (
    0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e39, 1e308, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "",
    " ",
    "0",
    "-1",
    "NaN",
    "1e999",
    "nan",
    "\x00",
    "\ud800",
    "\u202e",
    "../../x",
    "/etc/passwd",
    "a" * 5000,
    "%s{0}\n",
)
XML_TOKENS = (
    b"<", b">", b"&", b"&amp;", b"&a;", b"]]>", b"<![CDATA[", b"<!--", b"<object>", b"</object>", b"<a>" * 3000,
    b'<?xml version="1.0" encoding="UTF-16"?>', b'<?xml version="1.0" encoding="none"?>',
    b'<!DOCTYPE a [<!ENTITY a "x"><!ENTITY b "&a;&a;&a;">]>',
    b"<!DOCTYPE a [" + b'<!ENTITY a0 "xxxxxxxxxx">'
    + b"".join(b'<!ENTITY a%d "%b">' % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 12))
    + b"]><annotation>&a11;</annotation>",
    b'<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation>&a;</annotation>',
    b"1e400", b"-1e30", b"nan", b"inf", b"9" * 5000, b"0x10", b"1_0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00",
)  # fmt: skip
CSV_TOKENS = (
    b",", b";", b"\t", b'"', b'""', b"\n", b"\r", b"\r\n", b" ", b"-1 5", b"0 1", b"1", b"1 2 3",
    b"99999999999999999999 1",
    b"1 99999999", b"1e3 2", b"nan", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"ImageId,EncodedPixels\n",
    b"..", b"/",
    b"1 1 " * 2000, "\u0661 \u0662".encode(),
)  # fmt: skip
PICKLE_TOKENS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"X\x08\x00\x00\x00echo ran\x85R",
    b"cos\nsystem\nX\x08\x00\x00\x00echo ran\x85R",
    b"(", b"t", b"R", b"b", b"\x81", b"}", b"]", b"a", b"e", b"s", b"u", b"0", b"2", b"h\x00", b"q\x00", b"Q", b"N",
    b"K\x00",
    b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\xff", b"X\xff\xff\xff\xff", b"\x8b",
    b"\x96",
    b"c__builtin__\nbytearray\n", b"ctorch\nFloatTensor\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"\x80\x04", b".",
)  # fmt: skip


def mutate_bytes(content: bytes, rng: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Return the content with one to eight changes: bits, bytes, blocks that are cut, doubled or filled, and tokens."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 4, 8, 64, len(data) // 4 + 1))
        end = min(place + length, len(data))
        kind = rng.randrange(9 if tokens else 7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[place:end]
        elif kind == 3:
            data[place:place] = data[place:end]
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            data[place:end] = bytes([rng.choice((0, 0xFF))]) * (end - place)
        elif kind == 6:
            data[place:place] = rng.randbytes(length % 100)
        elif kind == 7:
            data[place:place] = rng.choice(tokens)
        elif kind == 8:
            data[place:end] = rng.choice(tokens)
    return bytes(data)


def mutate_numbers(content: bytes, rng: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Return a text with some of its numbers replaced by others, and sometimes further changes."""
    matches = list(re.finditer(rb"\d+", content))
    for match in sorted(
        rng.sample(matches, min(len(matches), rng.randint(1, 3))), key=lambda m: -m.start()
    ):
        number = str(rng.choice(NUMBERS)).encode()
        content = content[: match.start()] + number + content[match.end() :]
    return mutate_bytes(content, rng, tokens) if rng.random() < 0.2 else content


def mutate_xml(content: bytes, rng: Random) -> bytes:
    """Return valid XML with changed texts, tags and nesting, in one of several encodings, or with damaged bytes."""
    if rng.random() < 0.3:
        mutate = mutate_numbers if rng.random() < 0.4 else mutate_bytes
        return mutate(content, rng, XML_TOKENS)
    root = ElementTree.fromstring(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _mutate_element(root, rng)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "gbk", "shift_jis"))
    text = ElementTree.tostring(root, encoding="unicode")
    return f"<?xml version='1.0' encoding='{encoding}'?>\n{text}".encode(encoding, "replace")


def _mutate_element(root: ElementTree.Element, rng: Random) -> None:
    """Change one element below the root, or the root, in place."""
    elements = list(root.iter())
    parent, other = (
        rng.choice([each for each in elements if len(each)] or elements),
        rng.choice(elements),
    )
    child = rng.choice(list(parent) or [parent])
    kind = rng.randrange(8)
    if kind < 3:
        child.text = str(rng.choice((*NUMBERS, *TEXTS, other.text or "")))
    elif kind == 3 and child is not parent:
        parent.remove(child)
    elif kind == 4:
        parent.append(copy.deepcopy(rng.choice((child, other))))
    elif kind == 5:
        child.tag = rng.choice((other.tag, child.tag.upper(), "{http://x}" + other.tag, "objects"))
    elif kind == 6:  # one level deeper
        child.append(copy.deepcopy(other))
    else:
        child.set(rng.choice(("x", "id", "encoding")), rng.choice(("1", "\u202e", "")))


def mutate_csv(content: bytes, rng: Random, cells: Sequence[str]) -> bytes:
    """Return a CSV file with changed cells, rows and columns, delimiters and quotes, or with damaged bytes.

    cells: further texts to put into a cell.
    """
    if rng.random() < 0.3:
        mutate = mutate_numbers if rng.random() < 0.4 else mutate_bytes
        return mutate(content, rng, CSV_TOKENS)
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rng.choice(rows[1:] if rng.random() < 0.9 else rows)
        kind = rng.randrange(8)
        if kind < 4 and row:
            row[rng.randrange(len(row))] = str(rng.choice((*NUMBERS, *TEXTS, *cells)))
        elif kind == 4:
            row.insert(rng.randrange(len(row) + 1), rng.choice(cells))
        elif kind == 5 and row:
            row.pop(rng.randrange(len(row)))
        elif kind == 6:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        else:
            for each in rows:  # another order of columns
                each.reverse()
    file = io.StringIO()
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.writer(file, delimiter=rng.choice(",,,;\t"), quoting=quoting, lineterminator="\n")
    writer.writerows(rows)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    return file.getvalue().encode(encoding, "replace")


def mutate_array(array: np.ndarray, rng: Random) -> np.ndarray:
    """Return an array with changed values, type, shape or order."""
    array = array.copy()
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(6)
        if kind < 2 and array.size and array.dtype.kind in "iuf":
            with np.errstate(all="ignore"):
                value = np.float64(rng.choice(NUMBERS[:7] + NUMBERS[9:])).astype(array.dtype)
            flat = array.reshape(-1)  # a copy if the order is Fortran's
            flat[rng.randrange(flat.size)] = value
            array = flat.reshape(array.shape)
        elif kind == 2 and array.dtype.kind in "biuf":
            with np.errstate(all="ignore"):
                array = array.astype(
                    rng.choice(("?", "i1", ">i4", "u8", "f2", "<f8", "c8", "U5", "O"))
                )
        elif kind == 3:
            shapes = [(-1,), (1, -1), (*array.shape, 1), array.shape[::-1]]
            array = array.reshape(rng.choice(shapes))
        elif kind == 4 and array.ndim:
            array = array[: rng.randrange(len(array) + 1)]
        else:
            array = np.concatenate([array, array]) if array.ndim else np.asfortranarray(array.T)
    return array


def mutate_json(content: bytes, rng: Random) -> bytes:
    """Return JSON with changed values, types, keys and nesting, or with damaged bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(
            content,
            rng,
            (b"[" * 50_000, b"NaN", b"1e999", b"9" * 5000, b'"\\ud800"', b"{", b"}", b","),
        )
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = mutate_value(value, rng, JSON_REPLACEMENTS)
    text = json.dumps(value)
    if rng.random() < 0.02:
        text = '{"x":' + text + "," + text[1:] if text.startswith("{") else text
    encoded = text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16")))
    return mutate_bytes(encoded, rng) if rng.random() < 0.1 else encoded


def mutate_value(
    value: Any, rng: Random, replacements: Sequence[Callable[[Any, Random], Any]]
) -> Any:
    """Return a copy of nested dicts and lists with one change at a random depth.

    replacements: functions of a value and a random generator.
    """
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, changed = rng.choice(keys), copy.copy(value)
        kind = rng.random()
        if kind < 0.8:
            changed[key] = mutate_value(value[key], rng, replacements)
        elif kind < 0.9:
            del changed[key]
        elif isinstance(changed, list):
            changed.append(changed[key])
        else:
            changed[rng.choice((*TEXTS, *keys))] = changed.pop(key)
        return changed
    return rng.choice(replacements)(value, rng)


JSON_REPLACEMENTS: tuple[Callable[[Any, Random], Any], ...] = (
    lambda value, rng: rng.choice(NUMBERS),
    lambda value, rng: rng.choice(NUMBERS),
    lambda value, rng: rng.choice(TEXTS),
    lambda value, rng: rng.choice(
        (None, True, False, [], {}, [[]], {"a": 1}, [None], [1, 2, 3, 4])
    ),
    lambda value, rng: [value],
    lambda value, rng: {"x": value},
    lambda value, rng: str(value),
    lambda value, rng: -value if isinstance(value, int | float) else [value, value],
    lambda value, rng: _nested(rng.choice((10, 200))),
)


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_zip(content: bytes, rng: Random, mutate: Callable[[str, bytes], bytes]) -> bytes:
    """Return a zip file with one damaged record that has a right checksum, or with damaged bytes.

    mutate: gets the name and content of a record.
    """
    if rng.random() < 0.3:
        return mutate_bytes(
            content, rng, (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\xff\xff\xff\xff")
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in records if records[name]])
    records[name] = mutate(name, records[name])
    if rng.random() < 0.05:
        records.pop(rng.choice(list(records)))
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return written.getvalue()
