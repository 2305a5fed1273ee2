"""Color augmentation of images: jitter, grayscale and blur, drawn for each image on its own.

One implementation serves two places. A dataloader worker augments one image after the other as NumPy arrays: on a CPU
their operations on small planes are faster than those of PyTorch. A device augments a batch at once
(`--device_augment`), with a few operations for all images that a step of the jitter treats alike.

Pixels equal torchvision's v2 functions on uint8 images up to one gray level, in rare cases of rounding: here sums have
another order and the blur is separable.

Shapes: N images [N, 3, H, W], or one image without the axis N. Pixels are float32 whole numbers in [0, 255].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # np.ndarray or Tensor: `_library` has functions for both
Size = tuple[int, int]

JITTER = ("brightness", "contrast", "saturation", "hue")
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue, as in torchvision

# The hue circle has six sectors: red at 0, green at 2, blue at 4. Going around it, a channel is full within one sector
# of its color, and falls to nothing within the next one. Red is written by its distance to cyan, at 3.
HUE_SECTORS = 6
_CENTERS, _SLOPES, _OFFSETS = (3.0, 2.0, 4.0), (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0)
_TO_UINT8 = 255.999 / 255  # torchvision converts hues back to uint8 with this factor

# Mirrors the borders of a blurred axis: (pixels, reach, axis) -> pixels with `reach` more on both sides of the axis.
Mirror = Callable[[Array, int, int], Array]


class ColorParameters(NamedTuple):
    """The color augmentation of one image. As drawn by `datasets.transforms.ColorAugmentation`.

    jitter: (name in JITTER, factor) in the order of application; all four or none.
    grayscale: whether the image becomes gray.
    radius: standard deviation of the blur in pixels; None without blur.
    """

    jitter: list[tuple[str, float]]
    grayscale: bool
    radius: float | None

    def encode(self) -> Tensor:
        """Return the parameters as float64 [10], so that they can be sent with a sample."""
        jitter = [value for name, factor in self.jitter for value in (JITTER.index(name), factor)]
        jitter = jitter or [-1, 0] * len(JITTER)
        radius = 0 if self.radius is None else self.radius
        return torch.tensor([*jitter, self.grayscale, radius], dtype=torch.float64)

    @classmethod
    def decode(cls, code: Sequence[float]) -> "ColorParameters":
        """Return the parameters of a code [10], see `encode`."""
        *jitter, grayscale, radius = code
        pairs = zip(jitter[::2], jitter[1::2], strict=True)
        named = [(JITTER[int(name)], factor) for name, factor in pairs if name >= 0]
        return cls(named, bool(grayscale), radius or None)


# Entries of a target whose colors are left to the device: of each patch, and of each view.
PATCH_COLORS, VIEW_COLORS = "patch_colors", "view_colors"

NO_COLORS = ColorParameters([], False, None)


def encode_colors(parameters: Iterable[ColorParameters]) -> Tensor:
    """Return the parameters of N images as float64 [N, 10]."""
    codes = [one.encode() for one in parameters]
    return torch.stack(codes) if codes else torch.zeros(0, 2 * len(JITTER) + 2).double()


# ------------------------------------------------------------------------------------------------------ on the CPU


def augment_image(image: Tensor, parameters: ColorParameters) -> Tensor:
    """Augment one uint8 image [3, H, W] on the CPU. The input is not modified."""
    jitter, grayscale, radius = parameters
    if not (jitter or grayscale or radius):
        return image
    # Decoded images are channels-last, but the functions work plane by plane.
    pixels = np.array(image.numpy(), np.float32, order="C")
    for name, factor in jitter:
        pixels = _FUNCTIONS[name](pixels, factor)
    if grayscale:
        pixels = _to_gray(pixels)
    if radius is not None:
        reach = blur_reach(radius, image.shape[-2:])
        pixels = _blur(pixels, gaussian_weights(radius, reach), _mirror)
    # NumPy's cast is eight times as fast as PyTorch's.
    return torch.from_numpy(pixels.astype(np.uint8))


# --------------------------------------------------------------------------------------------------- on the device


def augment_batch(images: Tensor, codes: Tensor, sizes: Sequence[Size] | None = None) -> Tensor:
    """Augment uint8 images [N, 3, H, W] on their device; the result is uint8 [N, 3, H, W].

    Args:
        codes: float64 [N, 10] on the CPU, from `encode_colors`.
        sizes: (height, width) of each image without its padding at the bottom and the right, which is not read and has
            any values in the result. None: there is no padding.
    """
    parameters = [ColorParameters.decode(code) for code in codes.tolist()]
    if sizes is None:
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)

    for step in range(len(JITTER)):
        for name in JITTER:
            factors = {
                i: one.jitter[step][1]
                for i, one in enumerate(parameters)
                if one.jitter and one.jitter[step][0] == name
            }
            _update(pixels, factors, sizes, _FUNCTIONS[name])
    gray = {i: 1.0 for i, one in enumerate(parameters) if one.grayscale}
    _update(pixels, gray, sizes, lambda selected, *_: _to_gray(selected))
    _blur_batch(pixels, {i: p.radius for i, p in enumerate(parameters) if p.radius}, sizes)
    return pixels.to(torch.uint8)


def _update(
    pixels: Tensor, factors: dict[int, float], sizes: Sequence[Size], function: Callable
) -> None:
    """Apply a function to the images with a factor, in place."""
    if not factors:
        return
    # One copy to the device, which does not wait for it.
    host = torch.tensor([list(factors), list(factors.values())], dtype=torch.float64)
    rows, values = host.to(pixels.device, non_blocking=True)  # [n] each
    rows = rows.long()
    own_sizes = [sizes[i] for i in factors]
    pixels[rows] = function(pixels[rows], values.view(-1, 1, 1, 1), own_sizes)


def _blur_batch(pixels: Tensor, radii: dict[int, float], sizes: Sequence[Size]) -> None:
    """Blur the images with a radius, in place."""
    if not radii:
        return
    reaches = {i: blur_reach(radius, sizes[i]) for i, radius in radii.items()}
    weights = np.zeros((len(radii), max(reaches.values()) + 1))
    for row, (i, radius) in enumerate(radii.items()):
        weights[row, : reaches[i] + 1] = gaussian_weights(radius, reaches[i])
    own_sizes = [sizes[i] for i in radii]

    def mirror(padded: Tensor, reach: int, axis: int) -> Tensor:
        return _mirror_padded(padded, reach, axis, [size[axis] for size in own_sizes])

    device_weights = torch.from_numpy(weights).to(pixels.device, non_blocking=True)
    columns = device_weights.T.float()[..., None, None, None]  # [reach + 1, n, 1, 1, 1]
    rows = torch.tensor(list(radii)).to(pixels.device, non_blocking=True)
    pixels[rows] = _blur(pixels[rows], columns, mirror)


# ------------------------------------------------------------------------------------------------------- functions


def _library(pixels: Array) -> Any:
    return torch if isinstance(pixels, Tensor) else np


def _to_levels(pixels: Array) -> Array:
    """Clip to [0, 255] and drop the fraction, as a conversion to uint8 does, in place."""
    library = _library(pixels)
    library.clip(pixels, 0, 255, out=pixels)
    return library.floor(pixels, out=pixels)


def _gray(pixels: Array) -> Array:
    """Return gray values, [..., 1, H, W]."""
    red, green, blue = GRAY_WEIGHTS
    gray = pixels[..., 0:1, :, :] * red
    gray += pixels[..., 1:2, :, :] * green
    gray += pixels[..., 2:3, :, :] * blue
    return _library(pixels).floor(gray, out=gray)


def _to_gray(pixels: Array) -> Array:
    pixels[...] = _gray(pixels)
    return pixels


def _adjust_brightness(pixels: Array, factor: Array, sizes: Sequence[Size] = ()) -> Array:
    pixels *= factor
    return _to_levels(pixels)


def _adjust_saturation(pixels: Array, factor: Array, sizes: Sequence[Size] = ()) -> Array:
    gray = _gray(pixels)
    gray *= 1 - factor
    pixels *= factor
    pixels += gray
    return _to_levels(pixels)


def _adjust_contrast(pixels: Array, factor: Array, sizes: Sequence[Size] = ()) -> Array:
    gray = _gray(pixels)
    if sizes:
        means = torch.stack(
            [own[:, :h, :w].mean() for own, (h, w) in zip(gray, sizes, strict=True)]
        )
        mean = means.view(-1, 1, 1, 1)
    else:
        mean = gray.mean(dtype=np.float32)
    pixels *= factor
    pixels += mean * (1 - factor)
    return _to_levels(pixels)


def _shift_hue(pixels: Array, factor: Array, sizes: Sequence[Size] = ()) -> Array:
    """Move the hue by `factor` of the hue circle. Saturation and value of HSV stay."""
    library = _library(pixels)
    red, green, blue = (pixels[..., i, :, :] for i in range(3))
    value = library.maximum(library.maximum(red, green), blue)
    lowest = library.minimum(library.minimum(red, green), blue)
    spread = value - lowest

    # A channel is selected by a product with a mask, which is exact and faster than `where`. On a tie the first channel
    # is the largest one, as in torchvision. Gray pixels have 0 in all differences, whatever they are divided by.
    is_red = value == red
    is_green = (value == green) & ~is_red
    is_blue = ~(is_red | is_green)
    hue = (green - blue) * is_red
    hue += (blue - red) * is_green
    hue += (red - green) * is_blue
    hue /= library.clip(spread, 1, 255)
    hue += is_green * np.float32(2) if library is np else is_green * 2.0
    hue += is_blue * np.float32(4) if library is np else is_blue * 4.0
    hue += (factor[:, 0] if library is torch else factor) * HUE_SECTORS
    turns = hue * (1 / HUE_SECTORS)
    library.floor(turns, out=turns)
    turns *= HUE_SECTORS
    hue -= turns  # in [0, 6]

    spread *= _TO_UINT8
    lowest *= _TO_UINT8
    for i, (center, slope, offset) in enumerate(zip(_CENTERS, _SLOPES, _OFFSETS, strict=True)):
        level = abs(hue - center)
        level *= slope
        level += offset
        library.clip(level, 0, 1, out=level)
        level *= spread
        level += lowest
        library.floor(level, out=level)
        pixels[..., i, :, :] = level
    return pixels


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "brightness": _adjust_brightness,
    "contrast": _adjust_contrast,
    "saturation": _adjust_saturation,
    "hue": _shift_hue,
}


# ------------------------------------------------------------------------------------------------------------ blur


def blur_reach(radius: float, size: Sequence[int]) -> int:
    """Return how many pixels the blur reaches: 2.5 standard deviations, but its mirrored border is inside the image."""
    return min(math.ceil(2.5 * radius), min(size) - 1)


def gaussian_weights(radius: float, reach: int) -> np.ndarray:
    """Return the weights of the pixels at distance 0 to `reach`: float32 [reach + 1]. Both sides have a sum of 1."""
    weights = np.exp(-0.5 * (np.arange(reach + 1) / radius) ** 2)
    return (weights / (2 * weights.sum() - weights[0])).astype(np.float32)


def _blur(pixels: Array, weights: Array, mirror: Mirror) -> Array:
    """Blur with a separable filter: first the columns, then the rows, then round.

    Args:
        weights: of each distance, [reach + 1] or [reach + 1, n, 1, 1, 1].
    """
    reach = len(weights) - 1
    for axis in (0, 1):  # height, width
        wide = mirror(pixels, reach, axis)
        length = pixels.shape[axis - 2]
        pixels = _window(wide, reach, length, axis) * weights[0]
        for distance in range(1, reach + 1):
            both = _window(wide, reach - distance, length, axis) + _window(
                wide, reach + distance, length, axis
            )
            both *= weights[distance]
            pixels += both
    library = _library(pixels)
    return library.round(pixels, out=pixels)


def _window(pixels: Array, start: int, length: int, axis: int) -> Array:
    """Return a part of the height (axis 0) or the width (axis 1) of images [..., H, W]."""
    if axis == 0:
        return pixels[..., start : start + length, :]
    return pixels[..., start : start + length]


def _mirror(pixels: Array, reach: int, axis: int) -> Array:
    """Mirror the borders of an axis of [..., H, W], 0 the height or 1 the width. The border pixel is not repeated."""
    library = _library(pixels)
    length = pixels.shape[axis - 2]
    before = _window(pixels, 1, reach, axis)
    after = _window(pixels, length - 1 - reach, reach, axis)
    # positional: NumPy says `axis` and PyTorch `dims`
    flipped = [library.flip(part, (axis - 2,)) for part in (before, after)]
    return library.concatenate([flipped[0], pixels, flipped[1]], axis - 2)


def _mirror_padded(pixels: Tensor, reach: int, axis: int, lengths: Sequence[int]) -> Tensor:
    """The same for images [n, 3, H, W] with padding, of which only `lengths` pixels of the axis are used.

    An image that is shorter than `reach` has weights of 0 from its length on, so it may be mirrored less.
    """
    padding = pixels.shape[axis - 2]
    wide = _mirror(pixels, min(reach, padding - 1), axis)
    for image, length in zip(wide, lengths, strict=True):
        if length < padding:
            own = min(reach, length - 1)
            # After `reach` mirrored pixels, the image ends at `reach + length`.
            end = reach + length
            mirrored = _window(image, end - 1 - own, own, axis).flip(axis - 2)
            _window(image, end, own, axis).copy_(mirrored)
    return wide
