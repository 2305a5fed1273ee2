"""Build the documentation as a site: all pages of docs/, README and CONTRIBUTING, and an API reference from docstrings.

    python tools/build_site.py --output site
    python tools/build_site.py --serve

Links are checked; a broken one is an error. The site opens from its folder, site/index.html; its search needs a server,
such as --serve. Nothing is fetched from other sites.
`bash tools/docs.sh` installs what it needs (mkdocs-material and mkdocstrings, in requirements-dev.txt) and builds it.
"""

import argparse
import logging
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import UserError
from util.logger import log
from util.runs.session import run_script

ROOT = Path(__file__).resolve().parent.parent

# What the pages link to, with the folders of the repository, so that the links work as they are.
LINKED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "LICENSE", "NOTICE",
          "CITATION.cff", "docs", "configs", "scripts")  # fmt: skip
INDEX = "docs/README.md"

# Page of the API reference -> modules.
API = {
    "Inference": ("predictor", "predetr", "hubconf"),
    "Models": (
        "models",
        "models.detector",
        "models.detr",
        "models.conditional_detr",
        "models.deformable_detr",
        "models.segmentation",
        "models.backbone",
        "models.position_encoding",
        "models.ms_deform_attn",
    ),
    "Matching, losses and post-processing": (
        "models.matcher",
        "models.criterion",
        "models.classification",
        "models.postprocess",
        "models.segmentation_postprocess",
    ),
    "Pretexts": (
        "models.trainable",
        "models.pretext",
        "models.pretext.random_query_patch",
        "models.pretext.region_prior",
        "models.pretext.siamese",
        "datasets.pretext.random_query_patch",
        "datasets.pretext.region_prior",
        "datasets.pretext.siamese",
    ),
    "Datasets": (
        "datasets",
        "datasets.sample",
        "datasets.labelled.coco",
        "datasets.labelled.custom",
        "datasets.labelled.voc",
        "datasets.labelled.annotations",
        "datasets.labelled.coco_parser",
        "datasets.images.image_folder",
        "datasets.proposals.base",
        "datasets.transforms",
    ),
    "Settings and registries": ("util.settings", "util.settings.registry", "util.errors"),
    "Training and evaluation": ("trainer", "engine", "evaluation", "memory", "visualization"),
    "Checkpoints and boxes": (
        "util.checkpoints.checkpoint",
        "util.checkpoints.loading",
        "util.box_ops",
        "util.nested_tensor",
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/build_site.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "site",
        metavar="DIR",
        help="folder of the site (default: site)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="show the site at http://127.0.0.1:8000, and update it (default: off)",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        import mkdocs.commands.build
        import mkdocs.commands.serve
        from mkdocs.config import load_config
        from mkdocs.exceptions import Abort, ConfigurationError
    except ImportError as error:
        raise UserError(
            f"the site needs {error.name}: pip install mkdocs-material 'mkdocstrings[python]' (in requirements-dev.txt)"
        ) from error

    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        stage(pages)
        options = {"docs_dir": folder, "nav": navigation(), "strict": True}
        handler = _ShowWarnings()
        logging.getLogger("mkdocs").addHandler(handler)
        try:
            if args.serve:
                mkdocs.commands.serve.serve(str(ROOT / "mkdocs.yml"), **options)
                return
            config = load_config(
                str(ROOT / "mkdocs.yml"), site_dir=str(args.output.absolute()), **options
            )
            mkdocs.commands.build.build(config)
        except (Abort, ConfigurationError) as error:
            first = handler.messages[0] if handler.messages else str(error)
            raise UserError(
                f"the site is not complete: {len(handler.messages)} warnings, the first: {first}"
            ) from error
        finally:
            logging.getLogger("mkdocs").removeHandler(handler)
    log.info("wrote %s", args.output / "index.html")


class _ShowWarnings(logging.Handler):
    """Logs mkdocs' warnings, such as broken links, and keeps them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split()))
        log.warning("%s", self.messages[-1])


def stage(folder: Path) -> None:
    """Fill a folder with links to the pages and to what they link to, and with the pages of the API reference."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "api").mkdir()
    for title, modules in API.items():
        text = "".join(f"\n\n::: {module}" for module in modules)
        (folder / api_page(title)).write_text(f"# {title}{text}\n")


def api_page(title: str) -> str:
    return f"api/{re.sub(r'[^a-z]+', '_', title.lower())}.md"


def navigation() -> list[Any]:
    """Return the menu: the sections of docs/README.md with their pages, further pages of docs/, and the API.

    A page that exists is in the menu, listed or not, so that nobody has to keep a second list.
    """
    sections: dict[str, list[str]] = {}
    for line in (ROOT / INDEX).read_text().splitlines():
        if line.startswith("## "):
            sections[line[3:]] = []
        elif match := re.search(r"\]\(([^)#]+\.md)\)$", line):
            sections[list(sections)[-1]].append(posixpath.normpath(f"docs/{match[1]}"))
    listed = {INDEX, *(name for names in sections.values() for name in names)}
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    others = [name for name in pages if name not in listed]
    menu: list[Any] = [{"Overview": "README.md"}, {"Documentation": INDEX}]
    menu += [{title: names} for title, names in sections.items()]
    menu += [{"Details": others}] if others else []
    return [*menu, {"API": [{title: api_page(title)} for title in API]}]


if __name__ == "__main__":
    run_script(main, parse)
