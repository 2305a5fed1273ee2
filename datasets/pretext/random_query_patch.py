"""What random query patch detection sees (UP-DETR): an image, boxes in it, and the patches cut out of these boxes."""

import torch
from torch import Tensor

from datasets.images.image_folder import ImageFiles, UnlabelledDataset, cut_box
from datasets.images.unlabelled import unlabelled_images
from datasets.proposals import FixedNumber, Proposals, build_proposals
from datasets.sample import BadImageError, Target
from datasets.transforms import PatchAugmentation, Transform, pretext_transforms
from util.random_state import SampleRandom
from util.settings import Settings

TINY_SIDE = 16
QUERY_LABEL = 1


class QueryPatches(UnlabelledDataset):
    """Samples with `patches` uint8 [M, 3, S, S] beside the M boxes they were cut from; every label is 1.

    Boxes are drawn in the original image, patches are cut from it and augmented one after the other, then the image is
    transformed, as published. An image with a side of 16 pixels or less counts as bad.
    """

    def __init__(
        self,
        images: ImageFiles,
        proposals: Proposals,
        *,
        transforms: Transform,
        patch_transform: PatchAugmentation,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals, self.transforms, self.patch_transform = (
            proposals,
            transforms,
            patch_transform,
        )

    def load(self, index: int, rng: SampleRandom) -> tuple[Tensor, Target]:
        image = self.read(index)
        height, width = image.shape[-2:]
        if min(height, width) <= TINY_SIDE:
            raise BadImageError(f"{width} x {height} pixels; both sides must exceed {TINY_SIDE}")
        boxes = self.proposals(image, rng, self.images.name(index))
        patches = torch.stack(
            [self.patch_transform(cut_box(image, box), {}, rng)[0] for box in boxes]
        )
        target = query_target(boxes, index, (height, width))
        image, target = self.transforms(image, target, rng)
        # Added last: the image's transforms are not for patches.
        return image, {**target, "patches": patches}


def query_target(boxes_xyxy_abs: Tensor, index: int, size_hw: tuple[int, int]) -> Target:
    """The target of M boxes in an image that has not been transformed yet."""
    return {
        "boxes": boxes_xyxy_abs,
        "labels": torch.full((len(boxes_xyxy_abs),), QUERY_LABEL),
        "image_id": torch.tensor([index]),
        "area": (boxes_xyxy_abs[:, 2:] - boxes_xyxy_abs[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes_xyxy_abs), dtype=torch.int64),
        "orig_size": torch.tensor(size_hw),
        "size": torch.tensor(size_hw),
    }


def build_query_patches(image_set: str, settings: Settings) -> QueryPatches:
    """What `unlabelled_images` gives, "val" without augmentation.

    Raises:
        UserError: no images.
    """
    image_size = settings.image_size or 480
    images = unlabelled_images(image_set, settings)
    return QueryPatches(
        images,
        FixedNumber(build_proposals(settings, images), settings.num_patches),
        transforms=pretext_transforms(image_set, image_size, settings.max_size),
        patch_transform=PatchAugmentation(settings.patch_size, augment=image_set == "train"),
        seed=settings.seed,
    )
