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
`fingerprint()`, and, where labelled, `num_classes` (rows of the class head), `class_names` (label -> name),
`annotation_file` and `category_ids` (the file's id of each label; None where labels are these ids),
`validate(image_set)` and `evaluator(settings)`, by default COCO's with that file.

The builder of a labelled dataset is `(image_set, settings, classes=None) -> SampleDataset`; `classes` says what the
rows of the class head mean, where a checkpoint or the training data decides that. It sets `num_classes` to what is
usual for the data, skips what can't be used and keeps it as findings; `build_dataset` refuses what must not be trained
on.
"""

import signal

import torch
from torch.utils.data import DataLoader

from datasets.collate import collate
from datasets.sample import SampleDataset
from datasets.samplers import EpochSampler
from util.checkpoints.classes import Classes
from util.distributed import get_rank, get_world_size
from util.errors import UserError
from util.settings import Settings
from util.settings.registry import DATASETS, PRETEXTS, load, lookup


def build_dataset(
    image_set: str,
    settings: Settings,
    classes: Classes | None = None,
    *,
    any_class_count: bool = False,
) -> SampleDataset:
    """What the pretext sees if `settings.pretext` is set, else labelled images.

    image_set: "train", or "val" (no augmentation). classes: what the rows of the class head mean; None: as the data
    says. any_class_count: no class head reads the labels, so there may be as many classes as the data has.

    Raises:
        UserError: an unknown name, or data that isn't there or can't be used.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set must be train or val, got {image_set!r}")
    if settings.pretext:
        return load(lookup(PRETEXTS, "--pretext", settings.pretext).dataset)(image_set, settings)
    dataset = load(lookup(DATASETS, "--dataset_file", settings.dataset_file).builder)(
        image_set, settings, classes
    )
    dataset.validate(image_set)
    dataset.num_classes = _class_count(dataset, settings, classes, any_class_count)
    return dataset


def build_labelled(
    settings: Settings, classes: Classes | None = None
) -> tuple[SampleDataset | None, SampleDataset]:
    """(training images, None with `settings.eval`; validation images).

    classes: what the rows of the class head mean in a checkpoint that is resumed or evaluated; None: as the training
    data says.

    Raises:
        UserError: as `build_dataset`.
    """
    train_set = None if settings.eval else build_dataset("train", settings, classes)
    return train_set, build_dataset(
        "val", settings, classes_in(train_set) if train_set is not None else classes
    )


def classes_in(dataset: SampleDataset) -> Classes:
    """What the labels of a labelled dataset mean."""
    ids = dataset.category_ids or {label: label for label in dataset.class_names}
    return Classes(dataset.class_names, ids, dataset.num_classes, dataset.annotation_file)


def _class_count(
    dataset: SampleDataset, settings: Settings, classes: Classes | None, any_count: bool
) -> int:
    """Rows of the class head: those of `classes`, or `--num_classes`, or as is usual for the data.

    Raises:
        UserError: they are too few.
    """
    needed = max(dataset.class_names, default=-1) + 1
    if classes is not None:
        count = classes.count
    elif any_count:
        return max(dataset.num_classes, needed)
    else:
        count = settings.num_classes if settings.was_given("num_classes") else dataset.num_classes
    if count >= needed:
        return count
    found = f"{dataset.annotation_file} has category id {needed - 1}, but"
    if classes is not None:
        raise UserError(
            f"{found} {classes.source} has {count} classes: give data of the same classes"
        )
    raise UserError(
        f"{found} --num_classes is {count}: ids are rows of the class head, so use --num_classes {needed} (or more)"
    )


def build_loader(dataset: SampleDataset, settings: Settings, train: bool) -> DataLoader:
    """Batches of this process as (NestedTensor of uint8, PackedTargets).

    `train`: shuffled, the incomplete global batch dropped; otherwise in order and every image once over all processes.
    `loader.batch_sampler.set_epoch(epoch, start_batch)` goes before each epoch.

    Raises:
        UserError: fewer training images than one global batch.
    """
    world_size = get_world_size()
    if train and len(dataset) < settings.batch_size * world_size:
        raise UserError(
            f"{len(dataset)} training images are fewer than one batch ({settings.batch_size} x {world_size} processes)"
            f": use --batch_size {max(len(dataset) // world_size, 1)} or less"
        )
    sampler = EpochSampler(
        len(dataset),
        settings.batch_size,
        shuffle=train,
        seed=settings.seed,
        rank=get_rank(),
        world_size=world_size,
        drop_last=train,
    )
    workers = settings.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.device(settings.device).type == "cuda",
        worker_init_fn=init_worker,
        prefetch_factor=4 if workers else None,
        # Its own generator: workers must not draw from the stream that dropout uses, or a resumed run would differ.
        generator=torch.Generator().manual_seed(settings.seed),
    )


def init_worker(worker: int) -> None:
    """Workers share the cores with each other, so that threads of their own would only compete. Ctrl-C, `timeout` and
    cluster schedulers signal the whole process group: the main process still needs its workers to end the step and to
    save.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
