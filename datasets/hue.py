"""Shifts the hue of an image: bit-exact with torchvision, at about twice its speed on a CPU."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SECTORS = 6  # of the circle of hues; in each, one channel is the value and one the smallest


def shift_hue(image: Tensor, factor: float) -> Tensor:
    """uint8 [3, H, W] -> the same, with each pixel's hue moved by `factor` of the circle; value and saturation stay.

    As `torchvision.transforms.v2.functional.adjust_hue`. Selecting by products with masks is what makes it fast:
    gathering by index, and `torch.where` on pixels in no order, take most of the time there. Products with 0 and 1 and
    sums with 0 are exact.
    """
    pixels = F.to_dtype(image, torch.float32, scale=True)
    red, green, blue = pixels.unbind()
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    grey = spread == 0
    saturation = spread / value.masked_fill(grey, 1.0)
    is_red = value == red
    is_green = (value == green) & ~is_red
    red, green, blue = (value - pixels).div_(spread.masked_fill_(grey, 1.0)).unbind()
    hue = (blue - green).mul_(is_red)
    hue += (red + 2).sub_(blue).mul_(is_green)
    hue += (green + 4).sub_(red).mul_(~(is_red | is_green))
    hue = hue.mul_(1 / SECTORS).add_(1).frac_().add_(factor)
    return _from_hue(hue.sub_(hue.floor()), saturation, value)


def _from_hue(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """float [H, W] each, in [0, 1] -> uint8 [3, H, W]"""
    place = hue * SECTORS
    sector = place.floor()
    part, rest = saturation * place.sub_(sector), 1 - saturation
    kinds = torch.stack(
        [value, (1 - part).mul_(value), part.add_(rest).mul_(value), rest.mul_(value)]
    )
    high, falling, rising, low = F.to_dtype(kinds, torch.uint8, scale=True).unbind()
    sector = sector.to(torch.uint8)
    s1, s2, s3, s4, s5 = ((sector == i).view(torch.uint8) for i in range(1, SECTORS))
    s0 = 1 - (s1 + s2 + s3 + s4 + s5)  # also a hue that rounding made the whole circle
    return torch.stack(
        [
            high * (s0 + s5) + falling * s1 + low * (s2 + s3) + rising * s4,
            high * (s1 + s2) + falling * s3 + low * (s4 + s5) + rising * s0,
            high * (s3 + s4) + falling * s5 + low * (s0 + s1) + rising * s2,
        ]
    )
