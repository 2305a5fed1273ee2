"""Heat maps and sampling points: the brightest pixels are where the weights are highest."""

import numpy as np
import torch

from util.plots.attention import (
    draw_colored_maps,
    draw_heat,
    draw_numbered_points,
    draw_samples,
    fit_image,
    resize_map,
)

GRAY = np.full((60, 90, 3), 128, np.uint8)


def test_heat_is_brightest_at_the_highest_weight() -> None:
    weights = torch.full((2, 3), 0.01)
    weights[1, 2] = 0.95
    drawn = draw_heat(GRAY, weights).astype(int)
    assert drawn.shape == GRAY.shape
    assert drawn[45, 75].sum() > drawn[15, 15].sum() + 200, (
        "the cell (1, 2) covers x 60..90, y 30..60"
    )
    assert resize_map(weights, (60, 90))[45, 75] > 0.9
    assert not np.isnan(draw_heat(GRAY, torch.zeros(2, 3))).any()


def test_maps_have_the_colors_of_their_objects() -> None:
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    drawn = draw_colored_maps(GRAY, [left, right], [(255, 0, 0), (0, 0, 255)]).astype(int)
    assert drawn[30, 10, 0] > drawn[30, 10, 2] + 100
    assert drawn[30, 80, 2] > drawn[30, 80, 0] + 100
    assert draw_colored_maps(GRAY, [], []).max() < 128


def test_samples_are_drawn_by_weight_and_the_cross_on_top() -> None:
    points = torch.tensor([[20.0, 20.0], [60.0, 40.0], [500.0, -3.0]])
    drawn = draw_samples(GRAY, points, torch.tensor([0.9, 0.05, 0.05]), torch.tensor([45.0, 50.0]))
    brightness = drawn.astype(int).sum(-1)
    assert brightness[20, 20] > brightness[40, 60] + 100
    assert drawn[50, 45, 1] > 150 > drawn[50, 45, 0], "a green cross"


def test_points_and_scaling() -> None:
    image, factor = fit_image(GRAY, 300)
    assert image.shape == (200, 300, 3)
    assert factor == 300 / 90
    drawn = draw_numbered_points(image, np.array([[150.0, 100.0]]), [7], [(255, 0, 0)])
    assert drawn[100, 150].tolist() == [255, 0, 0]
