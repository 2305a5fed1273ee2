"""Render HTML pages from Jinja2 templates. Each page is one file with its images embedded."""

import base64
import io
import itertools
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from util.logger import format_seconds

SHARED = Path(__file__).parent  # has base.html.j2, which the pages extend, and macros.html.j2

# A page has up to eight pictures and stays below 3 MB; base64 takes a third more.
MAX_PNG_BYTES = 150_000
MAX_PICTURE_BYTES = 250_000
MAX_PICTURE_WIDTH, MAX_PICTURE_HEIGHT = 1800, 8000  # pixels; the page is 1180 wide
PICTURE_SCALES, JPEG_QUALITIES = (1.0, 0.8, 0.65, 0.5, 0.35, 0.2), (85, 70, 55)


def data_uri(path: Path) -> str:
    """Return a PNG file as a data URI, for the `src` of an image.

    Large ones become JPEG, smaller and of lower quality until they have at most MAX_PICTURE_BYTES: a page is one file
    that people send each other.
    """
    content = path.read_bytes()
    if len(content) <= MAX_PNG_BYTES:
        return _uri(content, "png")
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((MAX_PICTURE_WIDTH, MAX_PICTURE_HEIGHT))
    width, height = picture.size
    for scale, quality in itertools.product(PICTURE_SCALES, JPEG_QUALITIES):
        picture.thumbnail((round(width * scale), round(height * scale)))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MAX_PICTURE_BYTES:
            break
    return _uri(buffer.getvalue(), "jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def slug(title: str) -> str:
    """Return the anchor of a heading: `AP per class` -> `ap-per-class`."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


FILTERS = {"data_uri": data_uri, "clock": format_seconds, "shell": shlex.join, "slug": slug}


def render(template: Path, **values: Any) -> str:
    """Render a template. Values are HTML-escaped; an undefined name is an error."""
    return _environment(template.parent).get_template(template.name).render(values)


@cache  # it keeps compiled templates: a run renders its page many times
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment
