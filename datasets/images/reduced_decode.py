"""Reduced-size decoding of JPEG files (`--reduced_decode`): at 1/2, 1/4 or 1/8 of each side, by a smaller inverse DCT.

Pretexts resize images to a few hundred pixels, so that of a photo of many megapixels most pixels are decoded only to be
averaged. Draws, boxes and sizes stay those of the whole image; pixels differ by a little. No part of the image is
decoded at fewer pixels than a transform makes of it, so nothing is enlarged that was not before.

Shapes: N boxes; a size is (H, W) in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datasets.transforms import FULL_SIZE, Size, Target, size_hw

REDUCTIONS = (8, 4, 2)  # that libjpeg can decode at


@dataclass(frozen=True)
class ReducedImage:
    """A decoded image, perhaps of a reduced size.

    Attributes:
        image: uint8 [3, h, w].
        scale: of its sides, 1 or less: boxes of the whole image times this are boxes in `image`.
        target: what the target of a reduced image has in addition, for the transforms.
    """

    image: Tensor
    scale: float = 1.0
    target: Target = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedImage:
    """An image whose pixels may be decoded later, when it is known how many are needed.

    Attributes:
        whole: uint8 [3, H, W]; zeros without memory if it is not decoded yet (`without_pixels`).
        read: decodes it at 1 / reduction of each side. None: `whole` is decoded.
    """

    whole: Tensor
    read: Callable[[int], Tensor] | None = None

    @property
    def size(self) -> Size:
        """The size of the whole image."""
        return size_hw(self.whole)

    def decode(
        self, resized: Size | None, boxes_xyxy_abs: Tensor | None = None, patch_size: int = 0
    ) -> ReducedImage:
        """Decode as many pixels as are needed.

        Args:
            resized: the largest size that the image is resized to. None: it is not.
            boxes_xyxy_abs: boxes [N, 4] whose crops are resized to `patch_size`.

        Raises:
            BadImageError: it can't be decoded.
        """
        if self.read is None:
            return ReducedImage(self.whole)
        reduction = choose_reduction(self.size, resized or self.size, boxes_xyxy_abs, patch_size)
        image = self.read(reduction)
        if size_hw(image) == self.size:
            return ReducedImage(image)
        return ReducedImage(image, 1 / reduction, {FULL_SIZE: self.size})


def without_pixels(size: Size) -> Tensor:
    """Return zeros uint8 [3, H, W] that share one byte: for what reads only the size of an image."""
    return torch.zeros((), dtype=torch.uint8).expand(3, *size)


def choose_reduction(
    size: Size, resized: Size, boxes_xyxy_abs: Tensor | None = None, patch_size: int = 0
) -> int:
    """Return the largest reduction, 1, 2, 4 or 8, at which nothing is enlarged; see `OpenedImage.decode`."""
    limits = [side / needed for side, needed in zip(size, resized, strict=True)]
    if boxes_xyxy_abs is not None and len(boxes_xyxy_abs):
        shortest = float((boxes_xyxy_abs[:, 2:] - boxes_xyxy_abs[:, :2]).min())
        # Crops are rounded to whole pixels of the reduced image, so that they may be a pixel smaller.
        limits.append(shortest / (patch_size + 1))
    return next((reduction for reduction in REDUCTIONS if reduction <= min(limits)), 1)
