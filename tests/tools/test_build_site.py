"""tools/build_site.py: the menu has every page, the reference every module, and a broken link fails."""

import re
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tools import build_site
from util.errors import UserError


def menu_pages(menu: list) -> list[str]:
    """Return the pages of a menu, in order."""
    pages = []
    for entry in menu:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += menu_pages(value) if isinstance(value, list) else [value]
    return pages


def build(output: Path) -> None:
    build_site.main(build_site.parse(["--output", str(output)]))


def test_menu_has_every_page_once() -> None:
    pages = menu_pages(build_site.navigation())
    assert len(pages) == len(set(pages))
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    generated = {build_site.api_page(title) for title in build_site.API}
    assert set(pages) == written | generated | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_modules_of_the_reference_exist() -> None:
    modules = [module for names in build_site.API.values() for module in names]
    assert len(modules) == len(set(modules))
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mkdocs", None)
    with pytest.raises(UserError, match="pip install mkdocs-material"):
        build(tmp_path)


@pytest.mark.slow
def test_site_is_complete_and_needs_no_other_site(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="requirements-dev.txt")
    build(tmp_path)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    inference = (tmp_path / "api" / "inference.html").read_text()
    assert 'id="predictor.Predictor.from_checkpoint"' in inference
    assert (
        'id="models.matcher.HungarianMatcher"'
        in (tmp_path / build_site.api_page("Matching, losses and post-processing"))
        .with_suffix(".html")
        .read_text()
    )
    for page in pages:
        text = page.read_text()
        assert not re.search(r'<(script|link rel="stylesheet"|img)[^>]*(src|href)="https?:', text)
        for source in re.findall(r'<img [^>]*src="([^"]+)"', text):
            assert (page.parent / source).exists(), f"{page}: {source}"


def test_broken_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="requirements-dev.txt")

    def stage(folder: Path) -> None:
        (folder / "index.md").write_text("# Page\n\n[no page](no.md) [no anchor](#none)\n")

    monkeypatch.setattr(build_site, "stage", stage)
    monkeypatch.setattr(build_site, "navigation", lambda: ["index.md"])
    with pytest.raises(UserError, match=r"2 warnings, the first: .*no\.md"):
        build(tmp_path / "site")
