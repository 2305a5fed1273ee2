"""Crops of boxes, resized and with their colors, for pretexts that learn from them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from datasets.colors import PATCH_COLORS, ColorParameters, augment_image, encode_colors
from datasets.images.image_folder import crop_box
from datasets.sample import Target
from datasets.transforms import PatchAugmentation
from util.random_state import SampleRNG


def draw_patches(
    image: Tensor, boxes_xyxy_abs: Tensor, augmentation: PatchAugmentation, rng: SampleRNG
) -> Target:
    """Draw the colors of M boxes [M, 4], one box after the other, and return the entries of `cut_patches`."""
    # The draws do not depend on the size of a patch, so any size will do.
    parameters = [augmentation.draw(rng, (1, 1)) for _ in boxes_xyxy_abs]
    return cut_patches(image, boxes_xyxy_abs, augmentation, parameters)


def cut_patches(
    image: Tensor,
    boxes_xyxy_abs: Tensor,
    augmentation: PatchAugmentation,
    parameters: Sequence[ColorParameters],
) -> Target:
    """Return the entries of a target for M boxes [M, 4] of an image [3, H, W].

    `patches` uint8 [M, 3, S, S], the crops with their colors; or without them, and `patch_colors` float64 [M, 10], from
    which the device augments them (`augmentation.on_device`).
    """
    size = (augmentation.patch_size, augmentation.patch_size)
    crops = [crop_box(image, box) for box in boxes_xyxy_abs]
    # Not torchvision's resize: it copies crops to a layout that this function has to undo.
    resized = [interpolate(crop[None], size, mode="bilinear", antialias=True)[0] for crop in crops]
    if augmentation.on_device:
        return {"patches": torch.stack(resized), PATCH_COLORS: encode_colors(parameters)}
    colored = [augment_image(crop, own) for crop, own in zip(resized, parameters, strict=True)]
    return {"patches": torch.stack(colored)}
