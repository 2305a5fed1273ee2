"""Dataset of DETReg (Bar et al., CVPR 2022): boxes from a proposal method, and the crop of each box.

Shapes: N boxes per image, S patch size in pixels.
"""

import torch
from torch import Tensor

from datasets.images.image_folder import ImageFiles, UnlabelledDataset
from datasets.images.reduced_decode import OpenedImage, ReducedImage
from datasets.images.unlabelled import build_unlabelled_images
from datasets.pretext.patches import cut_patches
from datasets.pretext.random_query_patch import QUERY_LABEL, query_target
from datasets.proposals import Proposals, SelectedProposals, build_proposals
from datasets.sample import Target, TooFewProposalsError
from datasets.transforms import PatchAugmentation, Size, Transform, region_prior_transforms
from util.random_state import SampleRNG
from util.settings import Settings

MIN_BOXES = 2  # of the published code, which replaces an image with fewer
MAX_CROP_ATTEMPTS = 8  # draws of the augmentation, until MIN_BOXES boxes are left


class RegionPriorDataset(UnlabelledDataset):
    """Samples whose boxes are proposals, all of one class, with `patches` uint8 [N, 3, S, S], the augmented crops.

    Patches are cropped from the original image: its flips, crops and resizes do not touch them. A random crop of the
    image can lose boxes; their patches are dropped too. If fewer than two boxes are left, or none of a single one, the
    augmentation is drawn again, and finally the image is only resized. (The published code takes another image.)

    Args:
        resize_only: transform without crops, the last resort.
        patch_transform: None: no `patches` (there is no object embedding to learn).
        label: of every box.
        min_boxes: an image with fewer proposals is replaced.
    """

    def __init__(
        self,
        images: ImageFiles,
        proposals: Proposals,
        *,
        transforms: Transform,
        resize_only: Transform,
        patch_transform: PatchAugmentation | None,
        label: int = QUERY_LABEL,
        min_boxes: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals = proposals
        self.transforms = transforms
        self.resize_only = resize_only
        self.patch_transform = patch_transform
        self.label = label
        self.min_boxes = min_boxes

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        opened = self.images.open(index)
        boxes = self.proposals(opened.whole, rng, self.images.name(index))  # [N, 4]
        if len(boxes) < self.min_boxes:
            raise TooFewProposalsError(len(boxes), self.min_boxes)

        # Patch augmentations are drawn before those of the image, as published, but applied only to the boxes that the
        # image's crop keeps. Their draws do not depend on the size of a patch, so any size will do.
        augmentations = []
        if self.patch_transform:
            augmentations = [self.patch_transform.draw(rng, (1, 1)) for _ in boxes]
        decoded = self._decode(opened, boxes)
        target = {**self._build_target(boxes, index, opened.size), **decoded.target}
        image, target = self._augment(decoded.image, target, rng)

        kept = target.pop("patches")  # indices of the boxes that are left
        if self.patch_transform:
            parameters = [augmentations[i] for i in kept.tolist()]
            own_boxes = boxes[kept] * decoded.scale
            target.update(cut_patches(decoded.image, own_boxes, self.patch_transform, parameters))
        return image, target

    def _decode(self, opened: OpenedImage, boxes: Tensor) -> ReducedImage:
        resized = self.transforms.largest_resize(opened.size)
        if self.patch_transform is None:
            return opened.decode(resized)
        return opened.decode(resized, boxes, self.patch_transform.patch_size)

    def _build_target(self, boxes_xyxy_abs: Tensor, index: int, size_hw: Size) -> Target:
        """Build the target before any transform.

        `patches` contains box indices at first: a crop filters it like every per-object key.
        """
        target = query_target(boxes_xyxy_abs, index, size_hw)
        return {
            **target,
            "labels": torch.full_like(target["labels"], self.label),
            "patches": torch.arange(len(boxes_xyxy_abs)),
        }

    def _augment(self, original: Tensor, target: Target, rng: SampleRNG) -> tuple[Tensor, Target]:
        num_kept = min(MIN_BOXES, len(target["boxes"]))
        for _ in range(MAX_CROP_ATTEMPTS):
            image, augmented = self.transforms(original, target, rng)
            if len(augmented["boxes"]) >= num_kept:
                return image, augmented
        return self.resize_only(original, target, rng)


def build_region_prior_dataset(image_set: str, settings: Settings) -> RegionPriorDataset:
    """Build the dataset from `build_unlabelled_images`; "val" is without augmentation.

    Raises:
        UserError: no images, or proposals that do not fit them.
    """
    images = build_unlabelled_images(image_set, settings)
    proposals = build_proposals(settings, images)
    patch_transform = None
    if settings.object_embedding_loss:
        patch_transform = PatchAugmentation(
            settings.patch_size,
            augment=image_set == "train",
            on_device=settings.device_augment,
        )

    return RegionPriorDataset(
        images,
        SelectedProposals(proposals, settings.strategy, settings.max_prop),
        transforms=region_prior_transforms(image_set, settings.image_size, settings.max_size),
        resize_only=region_prior_transforms("val", settings.image_size, settings.max_size),
        patch_transform=patch_transform,
        # With `--num_classes 1` the only class is row 0.
        label=QUERY_LABEL if settings.num_classes > QUERY_LABEL else 0,
        min_boxes=MIN_BOXES if settings.reproduce_published else 1,
        seed=settings.seed,
    )
