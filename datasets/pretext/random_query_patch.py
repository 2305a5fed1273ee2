"""Dataset of random query patch detection (UP-DETR, Dai et al., CVPR 2021): boxes and the patches cropped from them.

Shapes: M boxes and patches per image, S patch size in pixels.
"""

import torch
from torch import Tensor

from datasets.images.image_folder import ImageFiles, UnlabelledDataset, read_header
from datasets.images.unlabelled import build_unlabelled_images
from datasets.pretext.patches import draw_patches
from datasets.proposals import FixedNumProposals, build_proposals
from datasets.sample import BadImageError, Target
from datasets.transforms import PatchAugmentation, Transform, query_patch_transforms
from util.random_state import SampleRNG
from util.settings import Settings

MIN_IMAGE_SIDE = 16  # pixels; both sides must exceed it, as published
QUERY_LABEL = 1  # as published; class 0 is unused


class QueryPatchDataset(UnlabelledDataset):
    """Samples with M boxes, all of label 1, and `patches` uint8 [M, 3, S, S], the crops of the boxes.

    As published, boxes are drawn in the original image, patches are cropped from it and augmented one by one, and the
    image is transformed last. An image with a side of 16 pixels or less is a bad image.
    """

    def __init__(
        self,
        images: ImageFiles,
        proposals: FixedNumProposals,
        *,
        transforms: Transform,
        patch_transform: PatchAugmentation,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals = proposals
        self.transforms = transforms
        self.patch_transform = patch_transform

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        opened = self.images.open(index)
        height, width = opened.size
        if min(height, width) <= MIN_IMAGE_SIDE:
            raise BadImageError(
                f"{width} x {height} pixels; both sides must exceed {MIN_IMAGE_SIDE}"
            )

        boxes = self.proposals(opened.whole, rng, self.images.name(index))  # [M, 4]
        resized = self.transforms.largest_resize(opened.size)
        decoded = opened.decode(resized, boxes, self.patch_transform.patch_size)
        patches = draw_patches(decoded.image, boxes * decoded.scale, self.patch_transform, rng)
        target = {**query_target(boxes, index, (height, width)), **decoded.target}
        image, target = self.transforms(decoded.image, target, rng)

        # Added last, because the transforms of the image must not touch the patches.
        return image, {**target, **patches}

    def final_size(self, epoch: int, index: int) -> tuple[int, int] | None:
        """Repeat the draws of `load` for the size in the file's header. Boxes are drawn from a stream of their own."""
        size = read_header(self.images.file(index)).decoded_size(self.images.exif)
        rng = SampleRNG.from_key(self.seed, epoch, index)
        for _ in range(self.proposals.count):
            self.patch_transform.draw(rng, (1, 1))
        return self.transforms.output_size(size, self.transforms.draw(rng, size))


def query_target(boxes_xyxy_abs: Tensor, index: int, size_hw: tuple[int, int]) -> Target:
    """Build the target of M boxes in an image before any transform."""
    num_boxes = len(boxes_xyxy_abs)
    return {
        "boxes": boxes_xyxy_abs,  # [M, 4]
        "labels": torch.full((num_boxes,), QUERY_LABEL),
        "image_id": torch.tensor([index]),
        "area": (boxes_xyxy_abs[:, 2:] - boxes_xyxy_abs[:, :2]).prod(1),
        "iscrowd": torch.zeros(num_boxes, dtype=torch.int64),
        "orig_size": torch.tensor(size_hw),
        "size": torch.tensor(size_hw),
    }


def build_query_patch_dataset(image_set: str, settings: Settings) -> QueryPatchDataset:
    """Build the dataset from `build_unlabelled_images`; "val" is without augmentation.

    Raises:
        UserError: no images, or proposals that do not fit them.
    """
    image_size = settings.image_size or 480
    images = build_unlabelled_images(image_set, settings)
    return QueryPatchDataset(
        images,
        FixedNumProposals(build_proposals(settings, images), settings.num_patches),
        transforms=query_patch_transforms(image_set, image_size, settings.max_size),
        patch_transform=PatchAugmentation(
            settings.patch_size,
            augment=image_set == "train",
            on_device=settings.device_augment,
        ),
        seed=settings.seed,
    )
