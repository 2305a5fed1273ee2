"""Find the image files that annotations mean by a name that is spelled a little differently.

Programs write the same name in many ways: with backslashes, with %20, with decomposed accents (NFD), in capitals, with
their own folder in front, or without extension. Nothing here is called while all files exist.
"""

import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote

from datasets.images.image_folder import image_extensions
from datasets.images.listing import list_folder
from util.errors import UserError

# Extensions of the same format.
_SAME_EXTENSION = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}
SAMPLE_SIZE = 1000  # missing files that are looked up at first, and that get a suggestion
_HASH_PREFIX = re.compile(r"^[0-9a-f]{8,}[-_]")  # Label Studio's 1a2b3c4d-name.jpg


def spellings(name: str) -> list[str]:
    """Return a name with slashes, without spaces or quotes around it, and the same with %20 and the like decoded."""
    plain = [name.strip().strip("\"'").strip(), unquote(name).strip()]
    paths = [posixpath.normpath(text.replace("\\", "/")) for text in plain]
    return list(dict.fromkeys(path.lstrip("/") for path in paths))


def composed(name: str) -> str:
    """Return a name with composed accents (NFC), without spaces around it."""
    if name.isascii():
        return name.strip()
    return unicodedata.normalize("NFC", name).strip()


def folded(name: str) -> str:
    """Return what names share that differ in case, accents' encoding or between .jpeg and .jpg."""
    name = composed(name).casefold()
    stem, extension = os.path.splitext(name if name.isascii() else composed(name))
    return stem + _SAME_EXTENSION.get(extension, extension)


def has_image_extension(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def folded_stem(name: str) -> str:
    """Return the folded name without the extension of an image; other dots are part of the name."""
    name = composed(name)
    return (
        folded(os.path.splitext(name)[0] + ".") if has_image_extension(name) else folded(f"{name}.")
    )


class ImageIndex:
    """The image files of a folder tree, by name.

    Args:
        folder: a folder that can't be read counts as empty.

    Attributes:
        names: sorted paths relative to the folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        try:
            self.names = list(list_folder(folder, image_extensions()).images)
        except UserError:
            self.names = []

    @cached_property
    def files(self) -> set[str]:
        return set(self.names)

    @cached_property
    def _folded(self) -> list[str]:
        return [folded(name) for name in self.names]

    @cached_property
    def _by_composed(self) -> dict[str, list[str]]:
        return _group(self.names, map(composed, self.names))

    @cached_property
    def _by_folded(self) -> dict[str, list[str]]:
        return _group(self.names, self._folded)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """By `folded_stem`: all names have the extension of an image."""
        return _group(self.names, (f"{os.path.splitext(name)[0]}." for name in self._folded))

    @cached_property
    def _by_base_name(self) -> dict[str, list[str]]:
        return _group(self.names, (name.rpartition("/")[2].strip() for name in self._folded))

    @cached_property
    def _own_name(self) -> str:
        return folded(os.path.basename(os.path.abspath(self.folder)))

    def match(self, listed: str) -> str | None:
        """Return the only file that can be meant by a name, None if there is none or more than one.

        The names differ in slashes, spaces around them, URL encoding, accents' encoding, case or between .jpeg and
        .jpg; or the listed one has no extension, or begins with the image folder's own name.
        """
        if listed in self.files:
            return listed
        variants = spellings(listed)
        for found in self._stages(variants):
            candidates = {name for names in found for name in names}
            if candidates:
                return candidates.pop() if len(candidates) == 1 else None
        return None

    def _stages(self, variants: list[str]) -> Iterator[list[list[str]]]:
        """Yield the files that spellings of a name can mean, the surest first."""
        yield [self._by_composed.get(composed(name), []) for name in variants]
        yield [self._by_folded.get(folded(name), []) for name in variants]
        inside = [name for variant in variants for name in self._without_own_folder(variant)]
        yield [self._by_folded.get(folded(name), []) for name in inside]
        bare = [name for name in (*variants, *inside) if not has_image_extension(name)]
        yield [self._by_stem.get(folded_stem(name), []) for name in bare]

    def _without_own_folder(self, name: str) -> Iterator[str]:
        """Yield train/a.jpg and data/train/a.jpg as a.jpg, if the image folder is called train."""
        parts = name.split("/")
        for i, part in enumerate(parts[:-1], start=1):
            if folded(part) == self._own_name:
                yield "/".join(parts[i:])

    def with_stem(self, path: str) -> list[str]:
        """Return the files with this path, apart from their extension."""
        return self._by_stem.get(folded(f"{path}."), [])

    def suggest(self, listed: str) -> str | None:
        """Return a file that may be meant by a name that `match` does not decide: the same name elsewhere in the tree,
        without a prefix of hexadecimal digits, or with another extension.
        """
        bases = [posixpath.basename(variant) for variant in spellings(listed)]
        bases += [_HASH_PREFIX.sub("", base) for base in bases]
        for base in bases:
            if found := self._by_base_name.get(folded(base)):
                return found[0]
        for name in (*spellings(listed), *bases):
            if found := self._by_stem.get(folded_stem(name)):
                return found[0]
        return None


def _group(names: Sequence[str], keys: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, key in zip(names, keys, strict=True):
        groups[key].append(name)
    return groups


@dataclass
class Matches:
    """What `match_files` found.

    Attributes:
        files: index of a listed name -> the file that it means.
        suggestions: index of a listed name without a file -> a file that it may mean; for SAMPLE_SIZE names.
        example: one of the files in the folder; empty if there is none.
    """

    files: dict[int, str] = field(default_factory=dict)
    suggestions: dict[int, str] = field(default_factory=dict)
    example: str = ""


def match_files(
    names: Sequence[str], missing: Sequence[int], folder: str, others: Iterable[str] = ()
) -> Matches:
    """Find the files of names that don't exist in an image folder.

    A file is only used if no other name means it.

    Args:
        names: all listed names.
        missing: indices of those without a file.
        others: names that are listed, too, and whose files must not be used.
    """
    index = ImageIndex(folder)
    matches = Matches(example=index.names[0] if index.names else "")
    if not index.names:
        return matches

    meant: dict[str, list[int]] = defaultdict(list)
    # If none of a sample has a file, the files are really absent. Looking all of them up could take minutes.
    sample = [missing[i] for i in range(0, len(missing), max(len(missing) // SAMPLE_SIZE, 1))]
    found = {i: index.match(names[i]) for i in sample}
    if any(found.values()):
        found = {i: index.match(names[i]) for i in missing}
    for i, file in found.items():
        if file:
            meant[file].append(i)
    taken = _files_of_others(names, missing, others) if meant else set()
    for file, rows in meant.items():
        same_entry = len({names[i] for i in rows}) == 1
        if same_entry and file not in taken:
            matches.files.update(dict.fromkeys(rows, file))

    left = [i for i in missing if i not in matches.files]
    for i in left[:SAMPLE_SIZE]:
        if suggestion := found.get(i) or index.suggest(names[i]):
            matches.suggestions[i] = suggestion
    return matches


def _files_of_others(
    names: Sequence[str], missing: Sequence[int], others: Iterable[str]
) -> set[str]:
    """Return all listed names, as listed and normalized."""
    # Names without a file are among them, but none of these is spelled like a file of the folder.
    without_file = set(missing)
    taken = {*names, *others}
    return taken | {os.path.normpath(name) for i, name in enumerate(names) if i not in without_file}


def remedy(suggestion: str | None, example: str, instead: str) -> str:
    """Return the end of a message on a missing file: the name that may be meant, else what the folder contains.

    Args:
        instead: what to do if nothing similar exists.
    """
    if suggestion:
        return f"did you mean {suggestion}? correct the name, or {instead}"
    return f"{instead}; the folder has {example}, for example" if example else instead
