"""What random query patch detection sees (UP-DETR): an image, boxes in it, and the patches cut out of these boxes."""
from argparse import Namespace

import torch
from torch import Tensor

from datasets.coco import coco_files, coco_root
from datasets.image_folder import ImageFolder, UnlabelledDataset, cut_box, read_image
from datasets.proposals import FixedNumber, Proposals, build_proposals
from datasets.sample import BadImageError, Target
from datasets.transforms import PatchAugmentation, Transform, pretext_transforms
from util.logger import UserError
from util.random_state import SampleRandom

TINY_SIDE = 16
QUERY_LABEL = 1


class QueryPatches(UnlabelledDataset):
    """Samples with `patches` uint8 [M, 3, S, S] beside the M boxes they were cut from; every label is 1.

    Boxes are drawn in the original image, patches are cut from it and augmented one after the other, then the image is
    transformed, as published. An image with a side of 16 pixels or less counts as bad.
    """

    def __init__(
        self, images: ImageFolder, proposals: Proposals, transforms: Transform, patch_transform: PatchAugmentation,
        seed: int = 0,
    ) -> None:
        super().__init__(images, seed)
        self.proposals, self.transforms, self.patch_transform = proposals, transforms, patch_transform

    def load(self, index: int, rng: SampleRandom) -> tuple[Tensor, Target]:
        image = read_image(self.path(index))
        height, width = image.shape[-2:]
        if min(height, width) <= TINY_SIDE:
            raise BadImageError(f"{width} x {height} pixels; both sides must exceed {TINY_SIDE}")
        boxes = self.proposals(image, rng, self.images.name(index))
        patches = torch.stack([self.patch_transform(cut_box(image, box), {}, rng)[0] for box in boxes])
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


def build_query_patches(image_set: str, args: Namespace) -> QueryPatches:
    """Images of `args.imagenet_path` or `args.train_images` where given (for "val" too, without augmentation), else of COCO.

    Raises:
        UserError: no images.
    """
    image_size = args.image_size or 480
    images = ImageFolder(image_source(image_set, args))
    return QueryPatches(
        images,
        FixedNumber(build_proposals(args, images), args.num_patches),
        pretext_transforms(image_set, image_size, args.max_size),
        PatchAugmentation(args.patch_size, augment=image_set == "train"),
        seed=args.seed,
    )


def image_source(image_set: str, args: Namespace) -> str:
    own = args.imagenet_path or getattr(args, "train_images", None)
    if own:
        return own
    if args.dataset_file == "custom":
        raise UserError("no unlabelled images: --dataset_file custom needs --train_images DIR (any folder tree)")
    try:
        root = coco_root(args)
    except UserError as error:
        raise UserError(f"no unlabelled images: give --imagenet_path DIR (any folder tree) or --coco_path DIR ({error})") from error
    return coco_files(root, image_set)[0]
