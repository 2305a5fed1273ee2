"""Names in pictures: no formula, no rectangles, no traceback, and one line in the log where a font is missing."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from tests.tiny import captured_log
from util.plots import curves, fonts
from util.plots.boxes import draw_boxes
from util.plots.fonts import class_text, drawable, escape, font_for, legible, one_line
from util.plots.pages import detection_page, prediction_page

IMAGE = np.full((120, 200, 3), 128, np.uint8)
BOXES = {"boxes": [[10, 40, 60, 90.0]], "labels": [0], "scores": [0.9]}


@pytest.fixture
def only_ascii(monkeypatch: pytest.MonkeyPatch):
    """A system without fonts."""
    monkeypatch.setattr(fonts, "_font_files", tuple)
    monkeypatch.setattr(fonts, "_warned", set())
    for function in (fonts.drawable, fonts.font_file):
        function.cache_clear()
    yield
    for function in (fonts.drawable, fonts.font_file):
        function.cache_clear()


def test_one_line() -> None:
    assert one_line("a\nb\tc\0") == "a b c "
    assert one_line("100 \ud83d") == "100 \\ud83d"
    assert one_line("\ufeffa\u200bb") == "ab"
    assert one_line("é 安 😀") == "é 安 😀"


def test_text_without_a_font(only_ascii) -> None:
    assert drawable("Müller café") == "Muller cafe"
    assert drawable("安全帽") is None
    assert legible("安1.jpg") == "?1.jpg"
    with captured_log() as lines:
        assert [class_text(name, i) for i, name in enumerate(("car", "安全帽", "ヘルメット"))] == [
            "car",
            "(class 1)",
            "(class 2)",
        ]
    (line,) = lines
    assert "安全帽" in line
    assert "(class 1)" in line


def test_font_of_the_system_is_found() -> None:
    pytest.importorskip("matplotlib")  # brings one for European scripts
    fonts.font_file.cache_clear()
    assert drawable("über Жук") == "über Жук"
    assert isinstance(font_for("Жук", 20), ImageFont.FreeTypeFont)
    latin = draw_boxes(IMAGE, BOXES["boxes"], ["??????"])
    assert not np.array_equal(draw_boxes(IMAGE, BOXES["boxes"], ["über Ж"]), latin)


@pytest.mark.parametrize("name", ["$$", "100 \ud83d", "安全帽", "a\nb", "a\\$b$", "😀" * 300, ""])
def test_pages_take_any_class_name(name: str, only_ascii, tmp_path: Path) -> None:
    prediction_page([(IMAGE, BOXES, BOXES)], {0: name}, tmp_path / "a.png")
    detection_page([(f"{name}.jpg", IMAGE, {**BOXES, "labels": [name]})], tmp_path / "b.png")


def test_names_in_curves_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert escape("$$ a$b") == r"\$\$ a\$b"
    runs = {}
    for name in ("$x", "$\\frac{$", "_hidden", "安全帽"):
        runs[name] = tmp_path / str(len(runs))
        runs[name].mkdir()
        (runs[name] / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    figures = []
    real = curves.figure_classes()
    monkeypatch.setattr(
        curves,
        "figure_classes",
        lambda: (lambda **k: figures.append(real[0](**k)) or figures[-1], real[1]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        curves.plot_curves(runs, tmp_path / "a.png", ["loss"])
    assert len(figures[0].axes[0].get_legend().get_texts()) == 4
