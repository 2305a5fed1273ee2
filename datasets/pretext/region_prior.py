"""What DETReg sees (Bar et al., CVPR 2022): an image, boxes that a proposal method gives it, and the crop of each
box.
"""

import torch
from torch import Tensor

from datasets.images.image_folder import ImageFiles, UnlabelledDataset, cut_box
from datasets.images.unlabelled import unlabelled_images
from datasets.pretext.random_query_patch import QUERY_LABEL, query_target
from datasets.proposals import Proposals, Selected, build_proposals
from datasets.sample import BadImageError, Target
from datasets.transforms import PatchAugmentation, Transform, region_transforms
from util.random_state import SampleRandom
from util.settings import Settings

MIN_BOXES = 2  # an image with fewer is replaced, as published
TRIES = 8  # draws of an augmentation that keeps as many


class RegionProposals(UnlabelledDataset):
    """Samples whose boxes are proposals, all of one class, with `patches` uint8 [N, 3, S, S], the augmented crop of
    each box.

    Crops are cut from the original image; flips, crops and resizes of the image are not for them. A random crop may
    lose boxes, and their patches with them. One that leaves fewer than two is drawn again, the last time without a
    crop; the published code takes another image.

    Args:
        patch_transform: None: no `patches` (no object embedding is learnt).
        label: of every box.
    """

    def __init__(
        self,
        images: ImageFiles,
        proposals: Proposals,
        *,
        transforms: Transform,
        whole_image: Transform,
        patch_transform: PatchAugmentation | None,
        label: int = QUERY_LABEL,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals = proposals
        self.transforms, self.whole_image, self.patch_transform = (
            transforms,
            whole_image,
            patch_transform,
        )
        self.label = label

    def load(self, index: int, rng: SampleRandom) -> tuple[Tensor, Target]:
        original = self.read(index)
        boxes = self.proposals(original, rng, self.images.name(index))
        if len(boxes) < MIN_BOXES:
            raise BadImageError(f"{len(boxes)} proposals; an image needs {MIN_BOXES}")
        augmentations = (
            [self.patch_transform.draw(rng, (1, 1)) for _ in boxes] if self.patch_transform else []
        )
        image, target = self._augment(original, self._target(boxes, index, original), rng)
        kept = target.pop("patches")  # the boxes that are still there
        if self.patch_transform:
            target["patches"] = torch.stack(
                [self._patch(original, boxes[i], augmentations[i]) for i in kept.tolist()]
            )
        return image, target

    def _target(self, boxes_xyxy_abs: Tensor, index: int, image: Tensor) -> Target:
        """`patches` holds numbers of boxes at first: a crop filters them like everything of a box."""
        target = query_target(boxes_xyxy_abs, index, tuple(image.shape[-2:]))
        return {
            **target,
            "labels": torch.full_like(target["labels"], self.label),
            "patches": torch.arange(len(boxes_xyxy_abs)),
        }

    def _augment(
        self, original: Tensor, target: Target, rng: SampleRandom
    ) -> tuple[Tensor, Target]:
        for _ in range(TRIES):
            image, augmented = self.transforms(original, target, rng)
            if len(augmented["boxes"]) >= MIN_BOXES:
                return image, augmented
        return self.whole_image(original, target, rng)

    def _patch(self, image: Tensor, box_xyxy_abs: Tensor, parameters: tuple) -> Tensor:
        patch, _ = self.patch_transform.apply(cut_box(image, box_xyxy_abs), {}, parameters)
        return patch


def build_region_proposals(image_set: str, settings: Settings) -> RegionProposals:
    """What `unlabelled_images` gives; "val" without augmentation.

    Raises:
        UserError: no images.
    """
    train = image_set == "train"
    images = unlabelled_images(image_set, settings)
    return RegionProposals(
        images,
        Selected(build_proposals(settings, images), settings.strategy, settings.max_prop),
        transforms=region_transforms(image_set, settings.image_size, settings.max_size),
        whole_image=region_transforms("val", settings.image_size, settings.max_size),
        patch_transform=PatchAugmentation(settings.patch_size, augment=train)
        if settings.object_embedding_loss
        else None,
        label=QUERY_LABEL if settings.num_classes > QUERY_LABEL else 0,
        seed=settings.seed,
    )
