"""Render HTML pages from Jinja2 templates. Each page is one file with its images embedded."""

import base64
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from util.logger import format_seconds

SHARED = Path(__file__).parent  # has base.html.j2, which the pages extend, and macros.html.j2


def data_uri(path: Path) -> str:
    """Return a PNG file as a data URI, for the `src` of an image."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


FILTERS = {"data_uri": data_uri, "clock": format_seconds, "shell": shlex.join}


def render(template: Path, **values: Any) -> str:
    """Render a template. Values are HTML-escaped; an undefined name is an error."""
    return _environment(template.parent).get_template(template.name).render(values)


@cache  # it keeps compiled templates: a run renders its page after every epoch
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
