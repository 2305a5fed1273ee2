"""What is refused when the settings are resolved, before anything starts: one small function for each kind.

Each raises UserError with one line that names the flag, its value and the remedy.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from util.errors import UserError
from util.files import check_apart
from util.settings.frozen import GIVEN, Settings
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS
from util.settings.table import PRETRAIN, all_flags, flags_of, only_read_by_others, readers

SMALLEST_IMAGE = 32  # pixels: the stride of the backbone
LABELLED_PATHS = ("coco_path", "voc_path", "airbus_path")
CUSTOM_PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")
FEW_SHOT = ("shots", "few_shot_file", "novel_classes")


def check_settings(settings: Settings, defaults: Mapping[str, Any]) -> None:
    """defaults: of each flag, for this dataset, detector and pretext.

    Raises:
        UserError: settings contradict each other, or a value is out of its range.
    """
    for check in CHECKS:
        check(settings)
    check_has_effect(settings, defaults)


def check_choices(settings: Settings) -> None:
    """What the command line refuses by itself may still come from Python or from a checkpoint."""
    for name, flag in all_flags(settings.script).items():
        value = getattr(settings, name)
        if value is not None and not flag.is_choice(value):
            raise UserError(
                f"--{name} {value} is unknown: choose one of {', '.join(map(str, flag.values or ()))}"
            )


def check_intervals(settings: Settings) -> None:
    for name, flag in all_flags(settings.script).items():
        value = getattr(settings, name)
        if flag.interval and value is not None and not _inside(value, flag.interval):
            raise UserError(f"--{name} {value:g} must lie in {flag.interval}")


def _inside(value: float, interval: str) -> bool:
    """interval: as "[0, 1)", where a round bracket excludes its end."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return math.isfinite(value) and above and below


def check_numbers(settings: Settings) -> None:
    if settings.focal_alpha > 1:
        raise UserError(f"--focal_alpha {settings.focal_alpha:g} is a fraction: it can't exceed 1")
    if not abs(settings.seed) < 2**63:
        raise UserError(f"--seed {settings.seed} has more than 63 bits: choose a smaller number")
    for name in ("image_size", "max_size"):
        value = getattr(settings, name)
        if value is not None and value < SMALLEST_IMAGE:
            raise UserError(
                f"--{name} {value}: the backbone sees nothing in images that small; use {SMALLEST_IMAGE} or more"
            )


def check_model(settings: Settings) -> None:
    if settings.hidden_dim % settings.nheads:
        raise UserError(
            f"--hidden_dim {settings.hidden_dim} can't be split over --nheads {settings.nheads}: choose a multiple "
            "of it"
        )
    if settings.hidden_dim % 4:
        raise UserError(
            f"--hidden_dim {settings.hidden_dim}: sine positional encodings need a multiple of 4"
        )
    if settings.with_box_refine and not settings.aux_loss and not settings.eval:
        raise UserError(
            "--no_aux_loss leaves the boxes of earlier layers untrained, and --with_box_refine builds on them: give "
            "one of them"
        )
    if max(settings.set_cost_class, settings.set_cost_bbox, settings.set_cost_giou) <= 0:
        raise UserError(
            "--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: nothing would tell a good match from a "
            "bad one"
        )


def check_pretext(settings: Settings) -> None:
    if not settings.pretext:
        return
    entry = PRETEXTS[settings.pretext]
    classes = entry.defaults.get("num_classes", settings.num_classes)
    if settings.num_classes != classes:
        raise UserError(
            f"--num_classes {settings.num_classes}: --pretext {settings.pretext} has {classes} classes: omit it"
        )
    if "num_patches" in entry.flags and settings.num_queries % settings.num_patches:
        nearest = _nearest_divisor(settings.num_patches, settings.num_queries)
        raise UserError(
            f"--num_patches {settings.num_patches} does not divide --num_queries {settings.num_queries}, and every "
            f"patch needs the same number of queries: use --num_patches {nearest}, or another --num_queries"
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
    if settings.resume == "auto" and not settings.output_dir:
        raise UserError(
            "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR"
        )


def check_schedule(settings: Settings) -> None:
    """A schedule counts epochs or steps, never both."""
    if settings.start_epoch >= settings.epochs and not settings.resume:
        raise UserError(
            f"--start_epoch {settings.start_epoch} leaves nothing to train of --epochs {settings.epochs}: omit it or "
            "train longer"
        )
    if bool(settings.max_iters) != bool(settings.lr_drop_iters):
        raise UserError(
            "--max_iters and --lr_drop_iters need each other: a schedule counts iterations or epochs, not both"
        )
    if not settings.max_iters:
        return
    given = settings.names_from(GIVEN)
    for name, flag in all_flags(settings.script).items():
        if flag.counts == "epochs" and name in given and getattr(settings, name):
            counted = f"--max_iters {settings.max_iters} iterations"
            if "max_iters" not in given:
                raise UserError(
                    f"--{name} counts epochs and this checkpoint's {counted}: change that one"
                )
            raise UserError(f"--{name} counts epochs and {counted}: give one of them")


def check_data(settings: Settings) -> None:
    places = DATASETS[settings.dataset_file].places
    custom = [name for name in CUSTOM_PATHS if getattr(settings, name)]
    if custom and places and custom[0] not in places:
        raise UserError(
            f"--{custom[0]} {getattr(settings, custom[0])} is for custom data: add --dataset_file custom"
        )
    for name in LABELLED_PATHS if places else ():
        if getattr(settings, name) and name not in places:
            wanted = " ".join(f"--{flag}" for flag in places)
            raise UserError(
                f"--{name} {getattr(settings, name)} is not for --dataset_file {settings.dataset_file}: give {wanted}"
            )
    if settings.split_file and settings.filter_pct > 0:
        raise UserError(
            f"--split_file {settings.split_file} and --filter_pct {settings.filter_pct:g} both say what to train on: "
            "give one of them"
        )
    sources = [
        name
        for name in ("imagenet_path", *LABELLED_PATHS, "train_images")
        if getattr(settings, name)
    ]
    trains = not (settings.eval or settings.viz)  # otherwise no unlabelled images are read
    if settings.imagenet_path and len(sources) > 1 and trains:
        raise UserError(
            f"--imagenet_path and --{sources[1]} both name the unlabelled images: give one of them"
        )
    if settings.script == PRETRAIN and settings.output_dir:
        check_apart(settings.output_dir, settings.imagenet_path or settings.train_images or "")


def check_few_shot(settings: Settings) -> None:
    other_split = ["novel_split"] if settings.novel_split != 1 else []
    given = [name for name in FEW_SHOT if getattr(settings, name)] + other_split
    if given and not settings.few_shot:
        raise UserError(
            f"--{given[0]} says nothing without --few_shot: add --few_shot base, novel or all"
        )
    if other_split and (
        settings.novel_classes or "voc_path" not in DATASETS[settings.dataset_file].places
    ):
        raise UserError(
            f"--novel_split {settings.novel_split} is a published list of VOC's classes: omit it, and name others by "
            "--novel_classes"
        )
    drawn = [name for name in ("shots", "few_shot_file") if getattr(settings, name)]
    if settings.few_shot == "base" and drawn:
        raise UserError(
            f"--{drawn[0]} draws objects of novel or of all classes, --few_shot base takes all of its classes: omit "
            "one of them"
        )
    if settings.few_shot in ("novel", "all") and not drawn and not settings.eval:
        raise UserError(
            f"--few_shot {settings.few_shot} needs the objects to train on: add --shots K or --few_shot_file PATH"
        )
    for name, other in (
        ("filter_pct", settings.filter_pct > 0),
        ("split_file", settings.split_file),
    ):
        if drawn and other:
            raise UserError(
                f"--{drawn[0]} and --{name} both say what to train on: give one of them"
            )


def check_readers(settings: Settings) -> None:
    """A flag that only some detectors, pretexts or datasets read is an error with the others."""
    registries: list[tuple[str, Mapping[str, Any]]] = [("detector", DETECTORS)]
    if settings.pretext:
        registries.append(("pretext", PRETEXTS))
    if DATASETS[settings.dataset_file].places:
        registries.append(("dataset_file", DATASETS))
    flags = all_flags(settings.script)
    for kind, registry in registries:
        chosen = getattr(settings, kind)
        # A flag of another pretext, even with its default, says that another one is meant than the script's default.
        guessed = kind == "pretext" and not settings.was_given(kind)
        for name in only_read_by_others(registry, chosen):
            if name not in settings:
                continue
            changed = getattr(settings, name) != flags[name].general_default()
            if changed or (guessed and settings.was_given(name)):
                able = " or ".join(readers(name, registry))
                raise UserError(
                    f"--{name} means nothing to --{kind} {chosen}: omit it or use --{kind} {able}"
                )


def check_has_effect(settings: Settings, defaults: Mapping[str, Any]) -> None:
    """A flag that is given and that nothing would read is an error, except for its default, which published commands
    have in some places.
    """
    values, given = settings.as_dict(), settings.names_from(GIVEN)
    for name, flag in all_flags(settings.script).items():
        if flag.needs is None or name not in given or values[name] == defaults[name]:
            continue
        needed, is_read = flag.needs
        if not is_read(values):
            raise UserError(
                f"--{name} {values[name]} means nothing without {needed}: add that, or omit --{name}"
            )


def flags_read(settings: Settings) -> set[str]:
    """Names of the flags that mean something in this run: the script has them, and not only other detectors, pretexts
    or datasets read them.
    """
    names = set(flags_of(settings.script))
    chosen = (
        (DETECTORS, settings.detector),
        (PRETEXTS, settings.pretext),
        (DATASETS, settings.dataset_file),
    )
    for registry, name in chosen:
        if name:
            names -= set(only_read_by_others(registry, name))
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
)
