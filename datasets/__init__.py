"""Datasets and dataloaders.

A sample is `(image, target)`:

- `image`: uint8 [3, H, W], RGB, not normalized. Mean and standard deviation belong to the backbone;
  `datasets.collate.normalize` applies them on the device.
- `target`: a dict of tensors,
    boxes      float32 [N, 4], (cx, cy, w, h) divided by the (W, H, W, H) of the unpadded image
    labels     int64 [N], rows of the class head
    image_id   int64 [1]
    orig_size  int64 [2], (H, W) of the image file
    size       int64 [2], (H, W) of `image`
    area       float32 [N], in pixels of `image`
    iscrowd    int64 [N]
    patches    uint8 [M, 3, S, S], crops of the boxes; only with a pretext
    masks      uint8 [N, H, W], 0 or 1, in the pixels of `image`; only with `settings.masks`

- A sample of two views has a leading axis of 2 in every tensor: image [2, 3, H, W], boxes [2, N, 4], ...
- `target["problems"]`, if present, lists the (path, reason) of the bad images that this sample replaces, and
  `target["dropped_boxes"]` the (path, number) of boxes outside the image, or of panoptic segments without pixels. The
  other entries are tensors.

A dataset is indexed by `index` or by `(epoch, index)`. Augmentation is a function of (seed, epoch, index).
Every dataset has `path(index)` and `fingerprint()`. A labelled dataset also has

- `num_classes`: rows of the class head;
- `class_names`: label -> name;
- `annotation_file`, and `category_ids`: label -> category id in that file, or None if labels are these ids;
- `validate(image_set)`: raises if the data can't be trained on or evaluated;
- `evaluator(settings)`: COCO's by default.

The builder of a labelled dataset is `(image_set, settings, classes=None) -> SampleDataset`. `classes` gives the meaning
of the rows of the class head if a checkpoint or the training set fixes it. The builder sets `num_classes` to the usual
value for the data. It skips annotations that can't be used and records them as findings; `build_dataset` then rejects
data that must not be trained on.
"""

import functools
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.collate import collate
from datasets.sample import BadImageError, SampleDataset
from datasets.samplers import UNKNOWN_SIZE, EpochSampler, EqualSizeSampler, FinalSizes
from util.checkpoints.classes import Classes
from util.distributed import get_rank, get_world_size
from util.errors import UserError
from util.runs.signals import STOP_SIGNALS
from util.settings import Settings
from util.settings.registry import DATASETS, PRETEXTS, import_object, lookup

# Category ids are rows of the class head, except in custom datasets. More rows than this for each class are a mistake.
SPARSE_IDS = 10

# Padded sizes with `--bucket_aspect`, in pixels.
MULTIPLE, PRETEXT_MULTIPLE = 64, 32


def build_dataset(
    image_set: str,
    settings: Settings,
    classes: Classes | None = None,
    *,
    allow_any_num_classes: bool = False,
) -> SampleDataset:
    """Build the dataset of the pretext if `settings.pretext` is set, otherwise the labelled dataset.

    Args:
        image_set: "train", or "val" (no augmentation).
        classes: the meaning of the rows of the class head. None: as in the data.
        allow_any_num_classes: no class head reads the labels, so accept any number of classes.

    Raises:
        UserError: an unknown name, or data that is missing or can't be used.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set must be train or val, got {image_set!r}")

    if settings.pretext:
        builder = import_object(lookup(PRETEXTS, "--pretext", settings.pretext).dataset)
        return builder(image_set, settings)

    builder = import_object(lookup(DATASETS, "--dataset_file", settings.dataset_file).builder)
    dataset = builder(image_set, settings, classes)
    dataset.exif = settings.exif
    dataset.validate(image_set)
    dataset.num_classes = _resolve_num_classes(dataset, settings, classes, allow_any_num_classes)
    return dataset


def build_labelled(
    settings: Settings, classes: Classes | None = None
) -> tuple[SampleDataset | None, SampleDataset]:
    """Build (training set, or None with `settings.eval`; validation set).

    Args:
        classes: the meaning of the rows of the class head in a checkpoint that is resumed or evaluated. None: as in
            the training set.

    Raises:
        UserError: see `build_dataset`.
    """
    train_set = None
    if not settings.eval:
        train_set = build_dataset("train", settings, classes)
        # The training set fixes the labels, so that both sets number the same classes alike.
        classes = classes_of_dataset(train_set)
    return train_set, build_dataset("val", settings, classes)


def classes_of_dataset(dataset: SampleDataset) -> Classes:
    """Return what the labels of a labelled dataset mean."""
    ids = dataset.category_ids or {label: label for label in dataset.class_names}
    return Classes(dataset.class_names, ids, dataset.num_classes, dataset.annotation_file)


def _resolve_num_classes(
    dataset: SampleDataset, settings: Settings, classes: Classes | None, allow_any: bool
) -> int:
    """Return the rows of the class head: those of `classes`, else `--num_classes`, else the usual value for the data.

    Raises:
        UserError: a label of the data has no row.
    """
    # Labels are rows of the class head, so the largest label counts, not the number of classes: COCO's 80 need 91 rows.
    needed = max(dataset.class_names, default=-1) + 1
    if classes is not None:
        num_classes = classes.num_classes
    elif allow_any:
        return max(dataset.num_classes, needed)
    elif settings.was_given("num_classes"):
        num_classes = settings.num_classes
    else:
        num_classes = dataset.num_classes

    if num_classes >= needed:
        return num_classes
    if classes is not None and max(classes.names, default=-1) == needed - 1:
        row, name = max(classes.names.items())
        raise UserError(
            f"{classes.source} calls row {row} of its class head '{name}', but the head has {num_classes} rows, "
            "counted from 0: correct the entry 'class_names' of the checkpoint"
        )
    found = f"{dataset.annotation_file} has category id {needed - 1}, but"
    if classes is not None:
        raise UserError(
            f"{found} {classes.source} has {num_classes} classes: give data of the same classes"
        )
    if needed > max(SPARSE_IDS * len(dataset.class_names), 1000):
        raise UserError(
            f"{found} --num_classes is {num_classes}: ids are rows of the class head here, and {needed} rows for "
            f"{len(dataset.class_names)} classes are too many; use --dataset_file custom, which numbers the classes "
            "from 0 and writes results with your ids"
        )
    raise UserError(
        f"{found} --num_classes is {num_classes}: ids are rows of the class head, so use --num_classes {needed} "
        "(or more)"
    )


def check_batch_size(dataset: SampleDataset, settings: Settings) -> None:
    """Refuse fewer training images than one global batch. Raises UserError."""
    world_size = get_world_size()
    if len(dataset) < settings.batch_size * world_size:
        raise UserError(
            f"{len(dataset)} training images are fewer than one batch ({settings.batch_size} x {world_size} processes)"
            f": use --batch_size {max(len(dataset) // world_size, 1)} or less"
        )


def build_loader(
    dataset: SampleDataset, settings: Settings, train: bool, in_order: int = 0
) -> DataLoader:
    """Build the dataloader of this rank. It yields (PackedImages of uint8, PackedTargets).

    With `train` the order is shuffled and the last incomplete global batch is dropped. Call
    `loader.batch_sampler.set_epoch(epoch, start_batch)` before each epoch. Otherwise images come in order, each exactly
    once over all ranks, in batches of `--eval_batch_size`. `--bucket_aspect` changes both orders, see `EpochSampler`
    and `EqualSizeSampler`.

    Args:
        in_order: number of images per rank that evaluation begins with, also with `--bucket_aspect`.

    Raises:
        UserError: fewer training images than one global batch, or `--bucket_aspect` for a pretext whose samples have an
            unknown size.
    """
    if train:
        check_batch_size(dataset, settings)
    multiple = padding_multiple(settings) if train else 1
    workers = settings.num_workers
    return DataLoader(
        dataset,
        batch_sampler=_build_sampler(dataset, settings, train, in_order * get_world_size()),
        collate_fn=functools.partial(collate, multiple=multiple),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.device(settings.device).type == "cuda",
        worker_init_fn=init_worker,
        prefetch_factor=4 if workers else None,
        # A separate generator: without it the loader draws the workers' base seed from the global generator, which
        # dropout uses too, and a resumed run would differ.
        generator=torch.Generator().manual_seed(settings.seed),
    )


def _build_sampler(
    dataset: SampleDataset, settings: Settings, train: bool, in_order: int
) -> EpochSampler | EqualSizeSampler:
    final_sizes = _final_sizes(dataset, settings) if settings.bucket_aspect else None
    batch_size = settings.batch_size if train else settings.eval_batch_size or settings.batch_size
    ranks = {"rank": get_rank(), "world_size": get_world_size()}
    if final_sizes is not None and not train:
        return EqualSizeSampler(len(dataset), batch_size, final_sizes, in_order=in_order, **ranks)
    return EpochSampler(
        len(dataset),
        batch_size,
        shuffle=train,
        seed=settings.seed,
        drop_last=train,
        final_sizes=final_sizes,
        **ranks,
    )


def padding_multiple(settings: Settings) -> int:
    """Return the number of pixels of which heights and widths of training batches are multiples."""
    if not settings.bucket_aspect:
        return 1
    return PRETEXT_MULTIPLE if settings.pretext else MULTIPLE


def _final_sizes(dataset: SampleDataset, settings: Settings) -> FinalSizes:
    """Return the function by which the sampler knows the sizes of samples.

    Raises:
        UserError: the dataset does not know them.
    """
    if type(dataset).final_size is SampleDataset.final_size:
        raise UserError(
            f"--bucket_aspect: the sizes of the samples of --pretext {settings.pretext} are only known once they are "
            "made; omit it"
        )

    def final_sizes(epoch: int, indices: list[int]) -> np.ndarray:
        return np.array([_size_or_one(dataset, epoch, index) for index in indices])  # [n, 2]

    return final_sizes


def _size_or_one(dataset: SampleDataset, epoch: int, index: int) -> tuple[int, int]:
    try:
        return dataset.final_size(epoch, index) or UNKNOWN_SIZE
    except BadImageError:
        return UNKNOWN_SIZE


def init_worker(worker: int) -> None:
    """Set up a dataloader worker: one thread, and no reaction to the signals that stop a run."""
    # Workers already share the CPU cores; more threads per worker would only compete.
    torch.set_num_threads(1)
    # Ctrl-C, `timeout` and cluster schedulers signal the whole process group. The main process still needs its workers
    # to finish the step and save a checkpoint.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
