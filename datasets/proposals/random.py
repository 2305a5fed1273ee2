"""UP-DETR's random boxes (Dai et al., CVPR 2021, section 3): any size and aspect ratio, regardless of the image."""

import torch
from torch import Tensor

from datasets.sample import BadImageError
from util.random_state import SampleRNG
from util.settings import Settings
from util.settings.registry import PRETEXTS

MIN_BOX_SIDE = 8  # pixels


class RandomProposals:
    """`num_boxes` boxes with sides uniform in [8, image side - 8] pixels, anywhere in the image."""

    reads_pixels = False

    def __init__(self, num_boxes: int) -> None:
        self.num_boxes = num_boxes

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        """Draw boxes for an image [3, H, W]: float32 [num_boxes, 4], (x0, y0, x1, y1) in whole pixels.

        Raises:
            BadImageError: a side of the image is shorter than 16 pixels.
        """
        height, width = image.shape[-2:]
        if min(height, width) < 2 * MIN_BOX_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels; random boxes need {2 * MIN_BOX_SIDE} on each side"
            )
        boxes = [self._draw(rng, width, height) for _ in range(self.num_boxes)]
        return torch.tensor(boxes, dtype=torch.float32)

    @staticmethod
    def _draw(rng: SampleRNG, width: int, height: int) -> tuple[int, int, int, int]:
        # The published order of draws: width, height, x, y. `randint` excludes its upper limit.
        randint = rng.numpy.randint
        w = randint(MIN_BOX_SIDE, width - MIN_BOX_SIDE + 1)
        h = randint(MIN_BOX_SIDE, height - MIN_BOX_SIDE + 1)
        x = randint(0, width - w)
        y = randint(0, height - h)
        return x, y, x + w, y + h


def build_random(settings: Settings) -> RandomProposals:
    """Build a method with as many boxes as the pretext uses: `max_prop` if it reads that flag, else `num_patches`."""
    pretext = PRETEXTS.get(settings.pretext)
    reads_max_prop = pretext is not None and "max_prop" in pretext.flags
    return RandomProposals(settings.max_prop if reads_max_prop else settings.num_patches)
