"""Text in pictures: fonts that have its characters, and what is drawn where no font has them.

Pillow's own font has ASCII only, and without a glyph it draws a rectangle. ASCII text is always drawn with it.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

from util.logger import log

SEARCH_SECONDS = 2.0  # for opening the fonts of the system
UNASSIGNED = "\U0010fffe"  # no font has it, so this is how a missing character looks
# Parts of file names of fonts with many characters, which are tried first.
LARGE_FONTS = (
    "notosanscjk", "sourcehansans", "notosanssc", "notosansjp", "notosanskr", "wqy", "msyh",
    "simhei", "pingfang", "hiragino", "arial unicode", "droidsansfallback", "unifont", "malgun",
    "msgothic", "ipag", "takao", "nanum", "dejavusans", "notosans", "freesans", "arial",
)  # fmt: skip
OTHER_STYLES = ("bold", "black", "light", "thin", "italic", "oblique", "condensed", "mono", "serif")
PLACEHOLDER_FONTS = ("lastresort", "adobeblank")  # have a glyph for every character, none legible


def one_line(text: str) -> str:
    """Return a text without line breaks and invisible characters; half of a surrogate pair becomes its code."""
    text = text.encode("utf-8", "backslashreplace").decode()
    # Joiners (U+200C, U+200D) change how Arabic and Indian letters look.
    visible = (
        character
        for character in text
        if unicodedata.category(character) != "Cf" or character in "\u200c\u200d"
    )
    spaced = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in visible)
    return "".join(spaced)


@cache
def drawable(text: str) -> str | None:
    """Return a text as it can be drawn, in Latin letters without accents if need be; None if no font has it."""
    text = one_line(text)
    if font_file(text) is not None:
        return text
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain if plain.isascii() else None


def legible(text: str) -> str:
    """Return a text as it can be drawn, with a question mark for each character that no font has."""
    found = drawable(text)
    if found is None:
        found = "".join(drawable(character) or "?" for character in one_line(text))
    return found if font_file(found) is not None else found.encode("ascii", "replace").decode()


_warned: set[str] = set()


def class_text(name: str, number: int) -> str:
    """Return the name of a class as it can be drawn, else its number. The log says so once."""
    found = drawable(name)
    if found is not None:
        return found
    text = f"(class {number})"
    if not _warned:
        _warned.add(name)
        log.warning(
            "no font on this system has the characters of class names such as '%s': pictures show '%s' instead, with "
            "its number; install a font that has them, such as Noto Sans CJK",
            one_line(name),
            text,
        )
    return text


def font_for(text: str, size: float) -> Any:
    """Return a font of Pillow for a text that `legible` or `drawable` returned. ASCII is drawn with Pillow's font."""
    file = font_file(text)
    return _open_font(file, size) if file else ImageFont.load_default(size)


@cache
def font_file(text: str) -> str | None:
    """Return the path of a font with all characters of a text, "" for Pillow's own font; None without any."""
    characters = frozenset(text) - set(" \u200c\u200d")
    if all(character.isascii() for character in characters):
        return ""
    return next((file for file in _font_files() if _has_all(file, characters)), None)


def _has_all(file: str, characters: frozenset[str]) -> bool:
    return all(_has(file, character) for character in characters)


@cache
def _has(file: str, character: str) -> bool:
    return _mask(file, character) != _mask(file, UNASSIGNED)


@cache
def _mask(file: str, character: str) -> tuple[tuple[int, int], bytes]:
    mask = _open_font(file, 20).getmask(character)
    return mask.size, bytes(mask)


@cache
def _open_font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _font_files() -> tuple[str, ...]:
    """Return the fonts of matplotlib and of the system that can be opened, those with many characters first."""
    start = time.monotonic()
    found = sorted(_installed_fonts(), key=lambda path: (_rank(path), path))
    usable = []
    for path in found:
        if time.monotonic() - start > SEARCH_SECONDS:
            break
        try:
            _mask(path, UNASSIGNED)
        except Exception:  # noqa: BLE001, S112 - a damaged or unusual font raises any type; the others are fine
            continue
        usable.append(path)
    return tuple(usable)


def _rank(path: str) -> tuple[int, bool]:
    """Return where a font comes in the search; of each family the regular one first."""
    name = os.path.basename(path).lower().replace("-", "").replace("_", "")
    place = next((i for i, part in enumerate(LARGE_FONTS) if part in name), len(LARGE_FONTS))
    return place, any(style in name for style in OTHER_STYLES)


def _installed_fonts() -> Iterator[str]:
    for folder in _font_folders():
        for parent, _, names in os.walk(folder):
            for name in names:
                is_font = name.lower().endswith((".ttf", ".otf", ".ttc"))
                if is_font and not name.lower().startswith(PLACEHOLDER_FONTS):
                    yield os.path.join(parent, name)


def _font_folders() -> Iterable[Path | str]:
    try:
        import matplotlib

        yield Path(matplotlib.get_data_path(), "fonts", "ttf")
    except ImportError:  # an extra
        pass
    home = Path(os.path.expanduser("~"))  # unlike `Path.home`, never raises
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")
    elif sys.platform == "darwin":
        yield from (home / "Library/Fonts", "/Library/Fonts", "/System/Library/Fonts")
    else:
        yield from (home / ".fonts", home / ".local/share/fonts")
        yield from ("/usr/local/share/fonts", "/usr/share/fonts")


# ---------------------------------------------------------------------------------------------------------- matplotlib


def escape(text: str) -> str:
    """Return a text that matplotlib shows as it is: $ would begin a formula, and a first _ hide it from a legend."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def set_fonts(texts: Iterable[Any]) -> None:
    """Give texts of matplotlib a font that has their characters, if its own does not have them."""
    for artist in texts:
        file = font_file(artist.get_text())
        if file and "dejavusans" not in os.path.basename(file).lower():
            size = artist.get_fontsize()
            artist.set_fontproperties(Path(file))  # also resets the size
            artist.set_fontsize(size)
