"""HTML pages from Jinja2 templates: each is one file, with its pictures inside."""

import base64
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from util.logger import format_seconds

SHARED = Path(__file__).parent  # base.html.j2, which the pages extend, and macros.html.j2


def data_uri(path: Path) -> str:
    """The content of a PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


FILTERS = {"data_uri": data_uri, "clock": format_seconds, "shell": shlex.join}


def render(template: Path, **values: Any) -> str:
    """The page of a template with these values, which are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template.name).render(values)
