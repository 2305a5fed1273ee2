"""Data: what a model is shown.

A sample is `(image, target)`:

- image: uint8 [3, H, W], RGB, not normalised (mean and standard deviation belong to the backbone;
  `collate.normalize` applies them on the device).
- target: `boxes` float32 [N, 4], (cx, cy, w, h) divided by the un-padded image's (W, H, W, H); `labels` int64 [N];
  `image_id` int64 [1]; `orig_size` and `size` int64 [2], (H, W) of the file and of `image`; `area` float32 [N] in
  pixels of `image`; `iscrowd` int64 [N]. A pretext adds keys of its own: `patches` uint8 [M, 3, S, S].
- A sample of two views has one axis more, in front: image [2, 3, H, W], boxes [2, N, 4], and so on for every tensor.
- `target["problems"]`, where present, lists (path, reason) of bad images that this one replaces; it alone is no tensor.

A dataset takes an index or (epoch, index). Augmentation is a function of (seed, epoch, index). It has `path(index)`,
`fingerprint()`, and, where labelled, `num_classes`, `class_names` (label -> name), `annotation_file` and `category_ids`
(the file's id of each label; None where labels are these ids), and `evaluator(args)`, by default COCO's with that file.
"""

import signal
from argparse import Namespace

import torch
from torch.utils.data import DataLoader

from datasets.collate import collate
from datasets.sample import SampleDataset
from datasets.samplers import EpochSampler
from util.checkpoints.classes import Classes
from util.distributed import get_rank, get_world_size
from util.errors import UserError
from util.settings.registry import DATASETS, PRETEXTS, choose, load


def build_dataset(image_set: str, args: Namespace) -> SampleDataset:
    """What the pretext sees if `args.pretext` is set, else labelled images.

    image_set: "train", or "val" (no augmentation).

    Raises:
        UserError: an unknown name, or data that isn't there or can't be used.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set must be train or val, got {image_set!r}")
    pretext = getattr(args, "pretext", None)
    place = (
        choose(PRETEXTS, "--pretext", pretext).dataset
        if pretext
        else choose(DATASETS, "--dataset_file", args.dataset_file).builder
    )
    return load(place)(image_set, args)


def build_labelled(args: Namespace, classes: Classes | None = None) -> tuple[SampleDataset | None, SampleDataset]:
    """(training images, None with `args.eval`; validation images), and sets `args.num_classes` to what they need.

    classes: what the rows of the class head mean in a checkpoint that is resumed or evaluated; None: as the training
    data says.

    Raises:
        UserError: as `build_dataset`.
    """
    args.classes = classes
    train_set = None if args.eval else build_dataset("train", args)
    if train_set is not None:
        args.classes = classes_in(train_set)
    val_set = build_dataset("val", args)
    args.num_classes = val_set.num_classes
    return train_set, val_set


def classes_in(dataset: SampleDataset) -> Classes:
    """What the labels of a labelled data set mean."""
    ids = dataset.category_ids or {label: label for label in dataset.class_names}
    return Classes(dataset.class_names, ids, dataset.num_classes, dataset.annotation_file)


def build_loader(dataset: SampleDataset, args: Namespace, train: bool) -> DataLoader:
    """Batches of this process as (NestedTensor of uint8, PackedTargets).

    `train`: shuffled, the incomplete global batch dropped; otherwise in order and every image once over all processes.
    `loader.batch_sampler.set_epoch(epoch, start_batch)` goes before each epoch.

    Raises:
        UserError: fewer training images than one global batch.
    """
    world_size = get_world_size()
    if train and len(dataset) < args.batch_size * world_size:
        raise UserError(
            f"{len(dataset)} training images are fewer than one batch ({args.batch_size} x {world_size} processes): "
            f"use --batch_size {max(len(dataset) // world_size, 1)} or less"
        )
    sampler = EpochSampler(
        len(dataset),
        args.batch_size,
        shuffle=train,
        seed=args.seed,
        rank=get_rank(),
        world_size=world_size,
        drop_last=train,
    )
    workers = args.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.device(args.device).type == "cuda",
        worker_init_fn=init_worker,
        prefetch_factor=4 if workers else None,
        # Its own generator: workers must not draw from the stream that dropout uses, or a resumed run would differ.
        generator=torch.Generator().manual_seed(args.seed),
    )


def init_worker(worker: int) -> None:
    """Workers share the cores with each other, so that threads of their own would only compete. Ctrl-C, `timeout` and
    cluster schedulers signal the whole process group: the main process still needs its workers to end the step and to
    save.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
