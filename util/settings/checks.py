"""Checks of resolved settings, before anything starts: one small function per topic.

Each raises a UserError of one line that names the flag, its value and the remedy.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from util.errors import UserError
from util.files import check_outside_images
from util.settings.frozen import GIVEN, Settings
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS
from util.settings.table import PRETRAIN, all_flags, flag_readers, flags_of, flags_of_others
from util.settings.value_types import AUTO

MIN_IMAGE_SIZE = 32  # pixels, the stride of the backbone
MAX_SEED_BITS = 63  # of a signed 64-bit integer
LABELLED_PATHS = ("coco_path", "coco_panoptic_path", "voc_path", "airbus_path")
CUSTOM_PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")
FEW_SHOT_FLAGS = ("shots", "few_shot_file", "novel_classes")


def check_settings(settings: Settings, defaults: Mapping[str, Any]) -> None:
    """Run all checks.

    Args:
        defaults: Default of each flag under this dataset, detector and pretext.

    Raises:
        UserError: Settings contradict each other, or a value is out of its range.
    """
    for check in CHECKS:
        check(settings)
    check_has_effect(settings, defaults)


def check_choices(settings: Settings) -> None:
    """Check values with choices again: those from Python or a checkpoint have not been through argparse."""
    for name, flag in all_flags(settings.script).items():
        value = getattr(settings, name)
        if value is not None and not flag.is_choice(value):
            choices = ", ".join(map(str, flag.choices or ()))
            raise UserError(f"--{name} {value} is unknown: choose one of {choices}")


def check_intervals(settings: Settings) -> None:
    for name, flag in all_flags(settings.script).items():
        value = getattr(settings, name)
        if flag.value_range and value is not None and not _is_inside(value, flag.value_range):
            raise UserError(f"--{name} {value:g} must lie in {flag.value_range}")


def _is_inside(value: float, interval: str) -> bool:
    """interval: such as "[0, 1)", where a round bracket excludes its end."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return math.isfinite(value) and above and below


def check_numbers(settings: Settings) -> None:
    if settings.focal_alpha > 1:
        raise UserError(f"--focal_alpha {settings.focal_alpha:g} is a fraction: it can't exceed 1")
    if not abs(settings.seed) < 2**MAX_SEED_BITS:
        raise UserError(
            f"--seed {settings.seed} has more than {MAX_SEED_BITS} bits: choose a smaller number"
        )
    for name in ("image_size", "max_size"):
        value = getattr(settings, name)
        if value is not None and value < MIN_IMAGE_SIZE:
            raise UserError(
                f"--{name} {value}: less than one cell of the backbone's feature map; use {MIN_IMAGE_SIZE} or more"
            )


def check_model(settings: Settings) -> None:
    if settings.hidden_dim % settings.nheads:
        raise UserError(
            f"--hidden_dim {settings.hidden_dim} can't be split over --nheads {settings.nheads}: choose a multiple "
            "of it"
        )
    # Sine and cosine for x and for y.
    if settings.hidden_dim % 4:
        raise UserError(
            f"--hidden_dim {settings.hidden_dim}: sine positional encodings need a multiple of 4"
        )
    if settings.with_box_refine and not settings.aux_loss and not settings.eval:
        raise UserError(
            "--no_aux_loss leaves the boxes of earlier decoder layers untrained, and --with_box_refine builds on them: "
            "give one of them"
        )
    if max(settings.set_cost_class, settings.set_cost_bbox, settings.set_cost_giou) <= 0:
        raise UserError(
            "--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0, so every match costs the same: "
            "give one of them a weight"
        )


def check_pretext(settings: Settings) -> None:
    if not settings.pretext:
        return
    entry = PRETEXTS[settings.pretext]

    num_classes = entry.defaults.get("num_classes", settings.num_classes)
    if settings.num_classes != num_classes:
        raise UserError(
            f"--num_classes {settings.num_classes}: --pretext {settings.pretext} has {num_classes} classes: omit it"
        )

    if "num_patches" in entry.flags and settings.num_queries % settings.num_patches:
        suggestion = _nearest_divisor(settings.num_patches, settings.num_queries)
        raise UserError(
            f"--num_patches {settings.num_patches} does not divide --num_queries {settings.num_queries}, and every "
            f"patch needs the same number of queries: use --num_patches {suggestion}, or another --num_queries"
        )


def _nearest_divisor(number: int, of: int) -> int:
    divisors = (divisor for divisor in range(1, of + 1) if of % divisor == 0)
    return min(divisors, key=lambda divisor: abs(divisor - number))


def check_checkpoints(settings: Settings) -> None:
    for name in ("eval", "viz"):
        if getattr(settings, name) and not (settings.resume or settings.pretrain):
            raise UserError(f"--{name} needs the detector to evaluate: add --resume PATH")
    if settings.eval and settings.dry_run:
        raise UserError(
            "--dry_run tries training steps and --eval does not train: give one of them"
        )
    if settings.pretrain and settings.frozen_weights:
        raise UserError(
            "--pretrain and --frozen_weights both give the detector's weights: give --frozen_weights to train the mask "
            "head alone, --pretrain to train everything"
        )
    if settings.resume == "auto" and not settings.output_dir:
        raise UserError(
            "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR"
        )


def check_schedule(settings: Settings) -> None:
    """Check that the schedule has something to train, and counts either epochs or steps."""
    if settings.start_epoch >= settings.epochs and not settings.resume:
        raise UserError(
            f"--start_epoch {settings.start_epoch} leaves nothing to train of --epochs {settings.epochs}: omit it or "
            "train longer"
        )
    if bool(settings.max_iters) != bool(settings.lr_drop_iters):
        raise UserError(
            "--max_iters and --lr_drop_iters need each other: a schedule counts either iterations or epochs"
        )
    if not settings.max_iters:
        return

    given = settings.names_from(GIVEN)
    for name, flag in all_flags(settings.script).items():
        if flag.schedule_unit == "epochs" and name in given and getattr(settings, name):
            counted = f"--max_iters {settings.max_iters} iterations"
            if "max_iters" not in given:  # adopted from a checkpoint
                raise UserError(
                    f"--{name} counts epochs and this checkpoint's {counted}: change that one"
                )
            raise UserError(f"--{name} counts epochs and {counted}: give one of them")


def check_speed(settings: Settings) -> None:
    """Check flags of speed and memory that contradict each other."""
    if settings.compile and settings.activation_checkpoint:
        raise UserError(
            "--compile chooses by itself which activations to compute again: omit --activation_checkpoint"
        )
    if settings.batch_size == AUTO and (settings.eval or settings.viz):
        raise UserError("--batch_size auto measures training steps: give a number to evaluate")
    if settings.profile and (settings.eval or settings.dry_run):
        raise UserError("--profile profiles a training run: omit --eval and --dry_run")
    for name in ("tensorboard", "wandb"):
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs the package {name}: pip install {name}")


def check_data(settings: Settings) -> None:
    _check_paths_match_dataset(settings)
    if settings.split_file and settings.filter_pct > 0:
        raise UserError(
            f"--split_file {settings.split_file} and --filter_pct {settings.filter_pct:g} both select training images: "
            "give one of them"
        )
    _check_one_source_of_images(settings)


def _check_paths_match_dataset(settings: Settings) -> None:
    path_flags = DATASETS[settings.dataset_file].path_flags
    if not path_flags:  # a dataset from outside the tree may read any of them
        return

    custom = [name for name in CUSTOM_PATHS if getattr(settings, name)]
    if custom and custom[0] not in path_flags:
        raise UserError(
            f"--{custom[0]} {getattr(settings, custom[0])} is for custom datasets: add --dataset_file custom"
        )
    for name in LABELLED_PATHS:
        if getattr(settings, name) and name not in path_flags:
            wanted = " ".join(f"--{flag}" for flag in path_flags)
            raise UserError(
                f"--{name} {getattr(settings, name)} is not for --dataset_file {settings.dataset_file}: give {wanted}"
            )


def _check_one_source_of_images(settings: Settings) -> None:
    # The panoptic folder has annotations only.
    labelled = (name for name in LABELLED_PATHS if name != "coco_panoptic_path")
    path_flags = ("imagenet_path", *labelled, "train_images")
    sources = [name for name in path_flags if getattr(settings, name)]
    # With --eval or --viz the labelled path names validation images, and no unlabelled images are read.
    trains = not (settings.eval or settings.viz)
    if settings.imagenet_path and len(sources) > 1 and trains:
        raise UserError(
            f"--imagenet_path and --{sources[1]} both name the unlabelled images: give one of them"
        )
    if settings.script == PRETRAIN and settings.output_dir:
        check_outside_images(
            settings.output_dir, settings.imagenet_path or settings.train_images or ""
        )


def check_few_shot(settings: Settings) -> None:
    other_split = ["novel_split"] if settings.novel_split != 1 else []
    given = [name for name in FEW_SHOT_FLAGS if getattr(settings, name)] + other_split
    if given and not settings.few_shot:
        raise UserError(
            f"--{given[0]} has no effect without --few_shot: add --few_shot base, novel or all"
        )

    has_published_splits = "voc_path" in DATASETS[settings.dataset_file].path_flags
    if other_split and (settings.novel_classes or not has_published_splits):
        raise UserError(
            f"--novel_split {settings.novel_split} is a published split of VOC's classes: omit it, and name others "
            "with --novel_classes"
        )

    drawn = [name for name in ("shots", "few_shot_file") if getattr(settings, name)]
    if settings.few_shot == "base" and drawn:
        raise UserError(
            f"--{drawn[0]} selects objects of novel or of all classes, --few_shot base trains on all of its objects: "
            "omit one of them"
        )
    if settings.few_shot in ("novel", "all") and not drawn and not settings.eval:
        raise UserError(
            f"--few_shot {settings.few_shot} needs the objects to train on: add --shots K or --few_shot_file PATH"
        )
    for name, is_given in (
        ("filter_pct", settings.filter_pct > 0),
        ("split_file", settings.split_file),
    ):
        if drawn and is_given:
            raise UserError(
                f"--{drawn[0]} and --{name} both select what to train on: give one of them"
            )


def check_readers(settings: Settings) -> None:
    """Reject a flag that only other detectors, pretexts or datasets read."""
    registries: list[tuple[str, Mapping[str, Any]]] = [("detector", DETECTORS)]
    if settings.pretext:
        registries.append(("pretext", PRETEXTS))
    if DATASETS[settings.dataset_file].path_flags:
        registries.append(("dataset_file", DATASETS))

    flags = all_flags(settings.script)
    for kind, registry in registries:
        chosen = getattr(settings, kind)
        # DETReg's command without --pretext must not pre-train like UP-DETR. So without a given pretext, a flag of
        # another one is rejected even with its default value.
        is_guess = kind == "pretext" and not settings.was_given(kind)
        for name in flags_of_others(registry, chosen):
            if name not in settings:
                continue
            is_changed = getattr(settings, name) != flags[name].general_default()
            if is_changed or (is_guess and settings.was_given(name)):
                able = " or ".join(flag_readers(name, registry))
                raise UserError(
                    f"--{name} has no effect with --{kind} {chosen}: omit it or use --{kind} {able}"
                )


def check_has_effect(settings: Settings, defaults: Mapping[str, Any]) -> None:
    """Reject a given flag that nothing would read. Its default is accepted: published commands spell some out."""
    values = settings.as_dict()
    given = settings.names_from(GIVEN)
    for name, flag in all_flags(settings.script).items():
        if flag.requires is None or name not in given or values[name] == defaults[name]:
            continue
        needed, is_read = flag.requires
        if not is_read(values):
            raise UserError(
                f"--{name} {values[name]} has no effect without {needed}: add that, or omit --{name}"
            )


def flags_read(settings: Settings) -> set[str]:
    """Return the names of the flags that have a meaning in this run.

    The script has them, and they are not read by other detectors, pretexts or datasets only.
    """
    names = set(flags_of(settings.script))
    chosen = (
        (DETECTORS, settings.detector),
        (PRETEXTS, settings.pretext),
        (DATASETS, settings.dataset_file),
    )
    for registry, name in chosen:
        if name:
            names -= set(flags_of_others(registry, name))
    return names


CHECKS: tuple[Callable[[Settings], None], ...] = (
    check_choices,
    check_readers,
    check_intervals,
    check_numbers,
    check_model,
    check_pretext,
    check_checkpoints,
    check_data,
    check_few_shot,
    check_schedule,
    check_speed,
)
