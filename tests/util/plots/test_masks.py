"""Masks and segmentations are drawn where they are, in the colors of their objects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import _example_row
from util.masks import encode_masks
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets
from util.plots.boxes import PALETTE
from util.plots.masks import (
    BORDER_COLOR,
    MASK_ALPHA,
    distinct_color,
    draw_masks,
    draw_segments,
    masks_to_draw,
    merge_masks,
    resize_mask,
)
from util.plots.pages import detection_page, prediction_page, sample_page
from visualization import samples_to_rows

BLACK = np.zeros((100, 200, 3), np.uint8)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def rectangle(x: slice, y: slice, size_hw: tuple[int, int] = (100, 200)) -> np.ndarray:
    mask = np.zeros(size_hw, bool)
    mask[y, x] = True
    return mask


def colors_in(image: np.ndarray | Path) -> set:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = np.asarray(opened.convert("RGB"))
    return set(map(tuple, image.reshape(-1, 3).tolist()))


def test_masks_are_filled_and_outlined() -> None:
    mask = rectangle(slice(20, 120), slice(30, 80))
    drawn = draw_masks(BLACK, mask[None], [RED])
    assert BLACK.max() == 0
    assert not drawn[~mask].any()
    assert drawn[50, 70].tolist() == pytest.approx([255 * MASK_ALPHA, 0, 0], abs=2)
    for y, x in ((30, 20), (79, 119), (30, 70), (50, 20)):
        assert drawn[y, x].tolist() == list(RED)
    assert (draw_masks(BLACK, np.zeros((1, 100, 200), bool), [RED]) == BLACK).all()
    assert (draw_masks(BLACK, np.zeros((0, 100, 200), bool), []) == BLACK).all()


def test_outlines_stay_visible_under_other_masks() -> None:
    below = rectangle(slice(40, 60), slice(40, 60))
    above = rectangle(slice(0, 200), slice(0, 100))
    drawn = draw_masks(BLACK, [below, above], [RED, GREEN])
    assert drawn[40, 50].tolist() == list(RED)
    red, green, _ = drawn[50, 50].tolist()
    assert green > red > 0


def test_masks_of_other_sizes_cover_the_picture() -> None:
    mask = rectangle(slice(5, 10), slice(0, 5), (10, 20))
    expected = rectangle(slice(50, 100), slice(0, 50))
    (rle,) = encode_masks(torch.from_numpy(mask)[None])
    for resized in masks_to_draw([mask, torch.from_numpy(mask), rle], (100, 200)):
        assert resized.dtype == bool
        assert (resized == expected).all()
    ids = np.array([[-1, 7], [2**33 % 1000, 5]])
    assert resize_mask(ids, (4, 4)).tolist() == np.kron(ids, np.ones((2, 2), int)).tolist()


SEGMENTS = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}, {"id": 3, "category_id": 193}]


def test_segments_have_colors_of_their_own_and_the_names_of_their_classes() -> None:
    ids = np.zeros((100, 200), int)
    ids[:, :60], ids[:, 60:120], ids[:50, 120:] = 1, 2, 3
    names = {1: "person", 193: "grass"}
    drawn = draw_segments(BLACK, ids, SEGMENTS, names)
    assert not drawn[52:, 122:].any()  # no segment
    fills = [drawn[5, x].tolist() for x in (5, 65, 125)]
    assert len(set(map(tuple, fills))) == 3
    assert drawn[5, 59].tolist() == list(BORDER_COLOR)

    # The label is in the middle of its segment, on the segment's color.
    assert (drawn[:, :60] == distinct_color(1)).all(-1).any()
    assert (drawn[20:30, 135:190] == distinct_color(193)).all(-1).any()

    # Ids may start from 0, with -1 for no segment, and a class has the same color in all images.
    shifted = [{**segment, "id": segment["id"] - 1} for segment in SEGMENTS]
    assert (draw_segments(BLACK, ids - 1, shifted, names) == drawn).all()
    alone = draw_segments(BLACK, np.full((100, 200), 3), SEGMENTS[2:], names)
    assert alone[5, 5].tolist() == fills[2]
    assert (draw_segments(BLACK, np.zeros((100, 200), int), [], {}) == BLACK).all()


def test_colors_are_distinct() -> None:
    assert len({distinct_color(number) for number in range(250)}) > 240


def test_ground_truth_masks_become_a_segmentation() -> None:
    masks = np.stack(
        [rectangle(slice(0, 50), slice(0, 100)), rectangle(slice(50, 99), slice(0, 9))]
    )
    merged = merge_masks(masks, [3, 5])
    assert merged["segments_info"] == [{"id": 0, "category_id": 3}, {"id": 1, "category_id": 5}]
    assert (merged["ids"][0, [0, 49, 50, 98, 99]] == [0, 0, 1, 1, -1]).all()


def example(with_masks: bool) -> dict:
    """Return an example of the engine: masks of the ground truth at the image's size, predicted ones at the file's."""
    mask = torch.zeros(1, 100, 200, dtype=torch.bool)
    mask[:, 20:80, 50:150] = True
    predictions = {
        "boxes": torch.tensor([[50.0, 20, 150, 80], [0, 0, 9, 9]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.1]),
    }
    found = {
        "image": torch.zeros(3, 100, 200, dtype=torch.uint8),
        "image_id": 1,
        "boxes_cxcywh": torch.tensor([[0.5, 0.5, 0.5, 0.6]]),
        "labels": torch.tensor([1]),
        "predictions": predictions,
    }
    if with_masks:
        at_file_size = mask.repeat_interleave(3, 1).repeat_interleave(3, 2).repeat(2, 1, 1)
        predictions["masks"] = encode_masks(at_file_size)
        found["masks"] = mask
    return found


def test_page_of_predictions_shows_masks(tmp_path: Path) -> None:
    paths = []
    for with_masks in (False, True):
        path = tmp_path / f"{with_masks}.png"
        paths.append(prediction_page([_example_row(example(with_masks))], {1: "ring"}, path))
    fill = tuple(round(MASK_ALPHA * value) for value in PALETTE[0])
    near = [
        any(np.abs(np.subtract(color, fill)).max() <= 2 for color in colors_in(path))
        for path in paths
    ]
    assert near == [False, True]


def test_page_of_predictions_shows_segmentations(tmp_path: Path) -> None:
    """The cell of the segmentation is next to that of the boxes, with the ground truth only if it has masks."""
    ids = torch.full((300, 600), -1)
    ids[60:240, 150:450] = 0
    panoptic = {"ids": ids, "segments_info": [{"id": 0, "category_id": 1}]}
    widths = []
    for with_masks in (False, True):
        one = example(with_masks)
        one["predictions"]["panoptic"] = panoptic
        path = prediction_page([_example_row(one)], {1: "ring"}, tmp_path / "p.png")
        assert distinct_color(1) in colors_in(path)
        with Image.open(path) as page:
            widths.append(page.width)
    assert widths[1] - widths[0] > 280


def test_page_of_detections_shows_masks_and_segmentations(tmp_path: Path) -> None:
    row = {
        "boxes": [[10, 10, 60, 90]],
        "labels": ["ring"],
        "scores": [0.9],
        "masks": [rectangle(slice(10, 60), slice(10, 90))],
    }
    segments = {
        "ids": np.ones((100, 200), np.int32),
        "segments_info": [{"id": 1, "category_id": 1, "name": "ring"}],
    }
    widths = []
    for page_rows in ([], [("a", BLACK, row)], [("a", BLACK, {**row, "panoptic": segments})]):
        with Image.open(detection_page(page_rows, tmp_path / "d.png")) as page:
            widths.append(page.width)
    assert widths[2] > widths[1] + 280


@pytest.mark.parametrize("packed", [False, True])
def test_samples_show_their_masks(packed: bool, tmp_path: Path, monkeypatch) -> None:
    """A batch may have masks as bool or as packed bits."""
    masks = torch.zeros(2, 100, 203, dtype=torch.bool)
    masks[0, 10:50, 20:90] = True
    masks[1, 30:90, 150:203] = True
    target = {
        "boxes": torch.tensor([[0.3, 0.3, 0.3, 0.4], [0.9, 0.6, 0.2, 0.6]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.from_numpy(np.packbits(masks.numpy(), axis=-1)) if packed else masks,
        "size": torch.tensor([100, 203]),
        "image_id": torch.tensor([1]),
    }
    monkeypatch.setattr("visualization.collate", as_they_are)
    image = torch.zeros(3, 100, 203, dtype=torch.uint8)
    (row,) = samples_to_rows([(image, target)], [0.5] * 3, [0.5] * 3)
    assert row["masks"].dtype == bool
    assert (row["masks"] == masks.numpy()).all()
    with_masks = sample_page([row], {}, tmp_path / "a.png").read_bytes()
    del row["masks"]
    assert sample_page([row], {}, tmp_path / "a.png").read_bytes() != with_masks


def as_they_are(samples):
    """Return a batch of one image, whose masks are not packed (again)."""
    ((image, target),) = samples
    mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    return NestedTensor(image[None], mask, False), PackedTargets.pack([target])
