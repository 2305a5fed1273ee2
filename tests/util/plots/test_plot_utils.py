"""Logs are read as they are written; curves, boxes and pages show what they get."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.errors import UserError
from util.plots import boxes, curves
from util.plots.boxes import draw_boxes
from util.plots.curves import curve, plot_curves, plot_logs
from util.plots.fonts import font_for
from util.plots.pages import FONT_SIZE, _fit_title, patch_page, prediction_page, sample_page
from util.runs.log import read_log

BLACK = np.zeros((100, 200, 3), np.uint8)


def write_log(folder: Path, lines: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return folder


def entry(epoch: int, **values) -> dict:
    return {"epoch": epoch, "train_loss": 5.0 - epoch, "train_class_error": 50.0, **values}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colors_in(image: np.ndarray) -> set:
    return set(map(tuple, image.reshape(-1, 3).tolist()))


def test_read_log(tmp_path: Path) -> None:
    run = write_log(
        tmp_path, [entry(0), entry(1), entry(1, train_loss=1.5), "\n", '{"epoch": 2, "train_l']
    )
    assert [e["train_loss"] for e in read_log(run)] == [5.0, 1.5]
    assert read_log(run / "log.txt") == read_log(run)


def test_bad_logs_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such log"):
        read_log(tmp_path)
    run = write_log(tmp_path, [entry(0), "nonsense\n", entry(1)])
    with pytest.raises(UserError, match="line 2"):
        read_log(run)


def test_curve_skips_epochs_without_a_value() -> None:
    entries = [
        entry(0),
        entry(1, test_coco_eval_bbox=[0.1, 0.3]),
        entry(2, train_loss=float("nan")),
        entry(3),
    ]
    assert curve(entries, "test_coco_eval_bbox", 1) == ([2], [0.3])
    assert curve(entries, "train_loss") == ([1, 2, 4], [5.0, 4.0, 2.0])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are drawn."""
    pytest.importorskip("matplotlib")
    made, original = [], curves.figure_classes

    def spy():
        figure_class, canvas = original()

        class Figure(figure_class):
            def __init__(self, *args, **kwargs) -> None:
                super().__init__(*args, **kwargs)
                made.append(self)

        return Figure, canvas

    monkeypatch.setattr(curves, "figure_classes", spy)
    return made


def test_plot_logs_draws_training_and_evaluation(tmp_path: Path, figures: list) -> None:
    bbox = [0.2, 0.4] + [0.0] * 10
    run = write_log(
        tmp_path / "run",
        [entry(0, test_loss=6.0), entry(1, test_loss=5.5, test_coco_eval_bbox=bbox)],
    )
    out = plot_logs(run, ("loss", "loss_of_nobody", "mAP"), tmp_path / "curves.png")
    assert picture(out).std() > 0
    loss, ap = figures[0].axes
    assert loss.get_ylim()[1] > 1.04 * 6.0, "markers of the highest value are not cut"
    assert ap.get_ylim() == (0, 1.02)
    faces = [line.get_markerfacecolor() for line in loss.lines]
    # After one epoch there are no lines, only markers.
    assert [isinstance(face, str) and face == "white" for face in faces] == [False, True]
    assert {line.get_label(): list(line.get_ydata()) for line in loss.lines} == {
        "training": [5.0, 4.0],
        "evaluation": [6.0, 5.5],
    }
    assert {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ap.lines
    } == {
        "AP": ([2], [0.2]),
        "AP50": ([2], [0.4]),
    }


def test_plot_curves_shows_several_runs(tmp_path: Path, figures: list) -> None:
    bbox = [0.2, 0.4] + [0.0] * 10
    runs = {
        name: write_log(tmp_path / name, [entry(0, test_coco_eval_bbox=bbox)])
        for name in ("first", "second")
    }
    plot_curves(runs, tmp_path / "both.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["loss", "AP", "AP50"]
    ap50 = figures[0].axes[2]
    assert [line.get_label() for line in ap50.lines] == ["first", "second"]
    assert ap50.lines[0].get_color().tolist() != ap50.lines[1].get_color().tolist()


def test_an_empty_log_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert picture(plot_logs(write_log(tmp_path / "run", []), out_png=tmp_path / "x.png")).size


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_logs(write_log(path.parent / "run", [entry(0)]), ("loss",), path),
        lambda path: prediction_page([], {}, path),
    ],
)
def test_a_full_disk_gives_one_line_and_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.write_text("old")

    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.png: disk full"):
        draw(path)
    assert path.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} <= {"a.png", "run"}


def test_draw_boxes_draws_at_the_coordinates() -> None:
    red = (255, 0, 0)
    drawn = draw_boxes(BLACK, [[20, 30, 120, 80]], colors=[red])
    assert BLACK.max() == 0
    rows, columns = np.nonzero((drawn == red).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 80, 20, 120)
    assert drawn[50, 70].tolist() == [0, 0, 0]


def test_draw_boxes_takes_tensors_and_invalid_boxes() -> None:
    boxes = torch.tensor([[-50.0, -50.0, 500.0, 500.0], [90, 40, 30, 20], [float("nan")] * 4])
    drawn = draw_boxes(BLACK, boxes, torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.25, 1.0]))
    assert drawn.shape == BLACK.shape
    assert drawn.max() > 0
    assert (draw_boxes(BLACK, torch.zeros(0, 4)) == BLACK).all()


def test_a_label_does_not_cover_another() -> None:
    red, green = (255, 0, 0), (0, 255, 0)
    both = [[20, 40, 120, 90], [24, 40, 100, 80]]  # the second label is drawn last

    def label_pixels(image: np.ndarray, color: tuple) -> int:
        return int((image[:39] == color).all(-1).sum())  # above both boxes

    alone = draw_boxes(BLACK, both[:1], ["ring 0.57"], None, [red])
    found = draw_boxes(BLACK, both, ["ring 0.57", "disc"], None, [red, green])
    assert label_pixels(found, red) == label_pixels(alone, red) > 100
    assert label_pixels(found, green) > 100
    # Without room on the right it stays at its box.
    narrow = draw_boxes(BLACK[:, :80], both, ["ring 0.57", "disc"], None, [red, green])
    assert (narrow[30, 24:30] == green).all()


def test_a_title_that_is_cut_says_so() -> None:
    title = "classification (20): image 7, IoU 0.57"
    assert _fit_title(title, 300) == title
    cut = _fit_title(title, 100)
    assert cut.endswith("...")
    assert title.startswith(cut[:-3])
    assert len(cut) > 8
    assert font_for(cut, FONT_SIZE).getlength(cut) <= 100
    assert _fit_title(title, 1) == ""


def test_an_image_of_one_line_is_drawn(tmp_path: Path) -> None:
    nothing = {"boxes": [], "labels": [], "scores": []}
    line = np.zeros((1, 2000, 3), np.uint8)
    page = picture(prediction_page([(line, nothing, nothing)], {}, tmp_path / "page.png"))
    assert page.shape[1] > 2 * 640


def test_boxes_without_classes_have_no_label(tmp_path: Path) -> None:
    row = {"image": BLACK, "boxes": [[20, 40, 60, 90]], "labels": [1], "patches": [], "title": ""}
    pages = [
        picture(sample_page([row], names, tmp_path / "page.png"))
        for names in (None, {}, {1: "cat"})
    ]
    colored = [int((page == boxes.label_color(1)).all(-1).sum()) for page in pages]
    assert 0 < colored[0] < min(colored[1:]), "the frame, and the background of the labels"


def test_a_label_has_the_same_color_in_all_images() -> None:
    first = colors_in(draw_boxes(BLACK, [[10, 10, 90, 90]], [3]))
    assert first == colors_in(draw_boxes(BLACK, [[10, 10, 90, 90], [100, 10, 190, 90]], [3, 3]))
    assert first != colors_in(draw_boxes(BLACK, [[10, 10, 90, 90]], [4]))


def test_prediction_page_draws_confident_predictions(tmp_path: Path) -> None:
    ground_truth = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    found = {
        "boxes": torch.tensor([[20.0, 20, 150, 90]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.6]),
    }
    pages = [
        picture(
            prediction_page(
                [(BLACK, found, ground_truth)] * 3,
                {1: "ring"},
                tmp_path / "p.png",
                score_threshold=threshold,
            )
        )
        for threshold in (0.5, 0.7)
    ]
    assert boxes.PALETTE[0] in colors_in(pages[0])
    assert boxes.PALETTE[0] not in colors_in(pages[1])


def test_a_page_without_confident_predictions_shows_one_per_ground_truth_box(
    tmp_path: Path,
) -> None:
    found = {"boxes": [[20, 20, 150, 90], [30, 30, 60, 60]], "labels": [1, 2], "scores": [0.2, 0.1]}
    for count, shown in ((1, {0}), (2, {0, 1}), (0, set())):
        ground_truth = {"boxes": [[0, 0, 9, 9]] * count, "labels": [3] * count}
        colors = colors_in(
            picture(prediction_page([(BLACK, found, ground_truth)], {}, tmp_path / "p.png"))
        )
        assert {i for i in range(2) if boxes.PALETTE[i] in colors} == shown, count
    confident = {**found, "scores": [0.9, 0.8]}
    ground_truth = {"boxes": [[0, 0, 9, 9]], "labels": [3]}
    assert boxes.PALETTE[1] in colors_in(
        picture(prediction_page([(BLACK, confident, ground_truth)], {}, tmp_path / "p.png"))
    )


def test_prediction_page_without_images_and_with_unknown_classes(tmp_path: Path) -> None:
    assert picture(prediction_page([], {}, tmp_path / "none.png")).size
    found = {"boxes": [[1, 1, 5, 5]], "labels": [77], "scores": [0.9]}
    assert picture(prediction_page([(BLACK, found, found)], {}, tmp_path / "unknown.png")).size


def test_patch_page_has_one_color_per_patch(tmp_path: Path) -> None:
    patches = [np.full((30, 20, 3), value, np.uint8) for value in (40, 80, 120)]
    patch_boxes = [[10, 10, 60, 60], [70, 20, 130, 80], [140, 10, 190, 90]]
    page = picture(
        patch_page(
            [(BLACK, patches, patch_boxes, {"boxes": patch_boxes, "scores": [0.1, 0.2, 0.3]})],
            tmp_path / "q.png",
        )
    )
    assert set(boxes.PALETTE[:3]) <= colors_in(page)
    only = {"boxes": patch_boxes[:1], "scores": [0.9], "patches": [2]}
    assert picture(patch_page([(BLACK, patches, patch_boxes, only)], tmp_path / "r.png")).size


def test_missing_matplotlib_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_logs(write_log(tmp_path / "run", [entry(0)]), out_png=tmp_path / "x.png")
