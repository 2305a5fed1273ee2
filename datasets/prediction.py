"""Images without annotations on which a trained detector finds objects, prepared as in evaluation."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets import init_worker
from datasets.collate import PackedTargets, collate
from datasets.images.image_folder import ImageFiles, read_image
from datasets.labelled.coco import labelled_transforms
from datasets.sample import BadImageError, Target
from datasets.transforms import Transform
from util.nested_tensor import NestedTensor
from util.random_state import SampleRandom

Problem = tuple[str, str]
Sample = tuple[Tensor, Target]


class PredictionImages(Dataset):
    """Image i as (uint8 [3, h, w], target), or (path, reason) where it can't be read: another in its place would be
    found twice.

    The target has `image_id` [1] (i + 1), and `orig_size` and `size` [2], (H, W).
    """

    def __init__(self, images: ImageFiles, transforms: Transform) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | Problem:
        try:
            image = read_image(self.images.file(index))
        except BadImageError as error:
            return self.images.path(index), str(error)
        size = torch.tensor(image.shape[-2:])
        target = {"image_id": torch.tensor([index + 1]), "orig_size": size, "size": size.clone()}
        return self.transforms(image, target, SampleRandom.of(0, 0, index))


def collate_readable(
    batch: Sequence[Sample | Problem],
) -> tuple[NestedTensor | None, PackedTargets | None, list[Problem]]:
    """The batch of the images that can be read, None without any, and the problems of the others."""
    problems = [item for item in batch if isinstance(item[0], str)]
    samples = [item for item in batch if not isinstance(item[0], str)]
    return *(collate(samples) if samples else (None, None)), problems


def build_prediction_loader(images: ImageFiles, args: Namespace) -> DataLoader:
    """All images in order, in batches of `args.batch_size`, as `collate_readable` gives them."""
    return DataLoader(
        PredictionImages(images, labelled_transforms("val", args)),
        args.batch_size,
        collate_fn=collate_readable,
        num_workers=args.num_workers,
        worker_init_fn=init_worker,
        pin_memory=torch.device(args.device).type == "cuda",
    )
