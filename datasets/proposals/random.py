"""UP-DETR's random boxes (Dai et al., CVPR 2021, section 3): any size and aspect, whatever the image shows."""

import torch
from torch import Tensor

from datasets.sample import BadImageError
from util.random_state import SampleRNG
from util.settings import Settings
from util.settings.registry import PRETEXTS

MIN_BOX_SIDE = 8


class RandomProposals:
    """`num_boxes` boxes with sides uniform in [8, image side - 8] pixels, anywhere in the image."""

    def __init__(self, num_boxes: int) -> None:
        self.num_boxes = num_boxes

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        """Image [3, H, W] -> float32 [num_boxes, 4], (x0, y0, x1, y1) in whole pixels.

        Raises:
            BadImageError: a side is below 16 pixels.
        """
        height, width = image.shape[-2:]
        if min(height, width) < 2 * MIN_BOX_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels: random boxes need {2 * MIN_BOX_SIDE} on each side"
            )
        return torch.tensor(
            [self._draw(rng, width, height) for _ in range(self.num_boxes)], dtype=torch.float32
        )

    @staticmethod
    def _draw(rng: SampleRNG, width: int, height: int) -> tuple[int, int, int, int]:
        draw = rng.numpy.randint
        w, h = (
            draw(MIN_BOX_SIDE, width - MIN_BOX_SIDE + 1),
            draw(MIN_BOX_SIDE, height - MIN_BOX_SIDE + 1),
        )
        x, y = draw(0, width - w), draw(0, height - h)
        return x, y, x + w, y + h


def build_random(settings: Settings) -> RandomProposals:
    """As many boxes as the pretext takes: `settings.max_prop` where it reads that, else `settings.num_patches`."""
    pretext = PRETEXTS.get(settings.pretext)
    return RandomProposals(
        settings.max_prop if pretext and "max_prop" in pretext.flags else settings.num_patches
    )
