"""Resolve given flags into `Settings`: defaults of dataset, detector and pretext, derived values, and checks."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.logger import log
from util.settings import frozen
from util.settings.checks import check_settings
from util.settings.frozen import Settings
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, lookup
from util.settings.table import DATASET_PATHS, FINETUNE, PRETRAIN, all_flags, names_where

# Flag with the path of a labelled dataset -> the `--dataset_file` that DETReg's `--dataset` means by it.
DATASET_OF_PATH = {"coco_path": "coco", "voc_path": "voc", "airbus_path": "airbus_ship"}
# Spellings of DETReg's --load_backbone.
BACKBONE_WEIGHT_ALIASES = {"supervised": "imagenet", "random": "none", "": "none"}
DEFAULT_PRETEXT = "random_query_patch"


def resolve(
    args: Settings | Namespace | Mapping[str, Any],
    adopted: Mapping[str, Any] | None = None,
    script: str | None = None,
) -> Settings:
    """Return settings with a value for every flag. `args` is not changed; resolved settings are returned unchanged.

    Args:
        args: Parsed flags, or any namespace or mapping with flag names. None means that a flag is not given. Names that
            are not flags are ignored.
        adopted: Values of a checkpoint for flags that are not given.
        script: Entry script. Default: the namespace's own `script`, or `finetune_main.py`.

    Raises:
        UserError: Flags contradict each other, or a value is out of its range.
    """
    if isinstance(args, Settings):
        return args
    values = dict(args) if isinstance(args, Mapping) else vars(args)
    script = script or values.get("script") or FINETUNE
    draft = _Draft(script, given_flags(values), adopted or {})

    # Each step reads what earlier ones have filled in.
    _fill_published_meaning(draft)
    defaults = _fill_defaults(draft)
    _fill_device(draft)
    _fill_backbone_lr(draft)
    _fill_dataset(draft)
    _fill_backbone(draft)

    settings = Settings(script, draft.values, draft.origins)
    check_settings(settings, defaults)
    return settings


def given_flags(args: Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that have a value, by name."""
    values = args if isinstance(args, Mapping) else vars(args)
    known = names_where(lambda flag: True)
    return {name: value for name, value in values.items() if name in known and value is not None}


class _Draft:
    """Values and origins of the flags while they are being filled in. None: not set yet."""

    def __init__(self, script: str, given: Mapping[str, Any], adopted: Mapping[str, Any]) -> None:
        self.script = script
        self.flags = all_flags(script)
        self.values: dict[str, Any] = dict.fromkeys(self.flags)
        self.origins: dict[str, str] = dict.fromkeys(self.flags, frozen.DEFAULT)
        # Given flags come last: they win over the checkpoint.
        for values, origin in ((adopted, frozen.CHECKPOINT), (given, frozen.GIVEN)):
            for name, value in values.items():
                if name in self.flags:
                    self.set(name, value, origin)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def set(self, name: str, value: Any, origin: str = frozen.RULE) -> None:
        self.values[name] = value
        self.origins[name] = origin

    def default(self, name: str, value: Any, origin: str = frozen.DEFAULT) -> None:
        """Set a value unless it is already set."""
        if self.values[name] is None:
            self.set(name, value, origin)

    def was_given(self, name: str) -> bool:
        is_from_user = self.origins[name] in (frozen.GIVEN, frozen.CHECKPOINT)
        return self.values[name] is not None and is_from_user


def _fill_published_meaning(draft: _Draft) -> None:
    """Fill in what a flag that only one published codebase has says about the others."""
    # DETReg has one pretext, and Deformable DETR as its default detector. The other pretexts' codebases lack its flags.
    region_prior = (*PRETEXTS["region_prior"].flags, "dataset")
    own = [name for name in region_prior if draft.was_given(name)]
    others = {name for entry in PRETEXTS.values() for name in entry.flags} - set(own)
    ambiguous = any(draft.was_given(name) for name in others)
    if draft.script == PRETRAIN and own and not ambiguous and not draft["pretext"]:
        meant = "--pretext region_prior"
        draft.set("pretext", "region_prior")
        if not draft["detector"]:
            meant += " --detector deformable_detr"
            draft.set("detector", "deformable_detr")
        log.info("--%s without --pretext, as in DETReg: taken as %s", own[0], meant)

    if draft["root_path"]:
        # Siamese DETR evaluates VOC by COCO metrics.
        if draft["dataset_file"] == "voc":
            draft.set("dataset_file", "voc_coco")
            log.info("--root_path with --dataset_file voc, as in Siamese DETR: taken as voc_coco")
        dataset = draft["dataset_file"] or draft.flags["dataset_file"].default
        path_flags = lookup(DATASETS, "--dataset_file", dataset).path_flags
        if len(path_flags) != 1:
            raise UserError(f"--root_path with --dataset_file {dataset}: give --{path_flags[0]}")
        if draft[path_flags[0]]:
            raise UserError(f"--root_path and --{path_flags[0]} mean the same: give one of them")
        draft.set(path_flags[0], draft["root_path"])


def _fill_defaults(draft: _Draft) -> dict[str, Any]:
    """Fill in defaults. Return the default of every flag under this dataset, detector and pretext, given or not."""
    # First the three flags that decide which registry entries apply.
    draft.default("detector", draft.flags["detector"].default)
    draft.default("dataset_file", draft.flags["dataset_file"].default)
    if draft.script == PRETRAIN:
        draft.default("pretext", DEFAULT_PRETEXT)

    # Later layers win.
    layers = [
        (frozen.DEFAULT, {name: flag.general_default() for name, flag in draft.flags.items()}),
        (frozen.DATASET, lookup(DATASETS, "--dataset_file", draft["dataset_file"]).defaults),
        (frozen.DETECTOR, lookup(DETECTORS, "--detector", draft["detector"]).defaults),
    ]
    if draft["pretext"]:
        layers.append((frozen.PRETEXT, lookup(PRETEXTS, "--pretext", draft["pretext"]).defaults))
    defaults = {name: value for _, values in layers for name, value in values.items()}
    origins = {name: origin for origin, values in layers for name in values}

    for name, value in defaults.items():
        if value is not None:
            draft.default(name, value, origins[name])
    return defaults


def _fill_device(draft: _Draft) -> None:
    draft.default("device", default_device(), frozen.RULE)
    if not draft.was_given("num_workers"):
        # Published defaults go up to 16 workers, for which a small machine has no cores.
        num_workers = min(draft["num_workers"], usable_cores())
        draft.set("num_workers", num_workers, draft.origins["num_workers"])


def default_device() -> str:
    """Return "cuda" if PyTorch sees a GPU, else "cpu"."""
    import torch  # here, so that --help does not wait for it

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, which a job scheduler can limit."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fill_backbone_lr(draft: _Draft) -> None:
    """In pre-training: use `--lr` where the pretext's default is None (UP-DETR), and 0 with `--fre_cnn`."""
    if draft.script != PRETRAIN:
        return
    if draft["fre_cnn"] and draft.was_given("lr_backbone") and draft["lr_backbone"] > 0:
        raise UserError(
            f"--fre_cnn freezes the backbone and --lr_backbone {draft['lr_backbone']:g} trains it: give one of them"
        )
    draft.default("lr_backbone", draft["lr"], frozen.RULE)
    if draft["fre_cnn"]:
        draft.set("lr_backbone", 0.0, draft.origins["lr_backbone"])


def _fill_dataset(draft: _Draft) -> None:
    """Translate DETReg's `--dataset NAME` into `--dataset_file` and a path below `--data_root`, unless given."""
    name = draft["dataset"]
    if not name:
        return
    flag, folder = DATASET_PATHS[name]
    if draft.script == FINETUNE and flag not in DATASET_OF_PATH:
        raise UserError(f"--dataset {name} has images without labels, for {PRETRAIN}")

    if flag in DATASET_OF_PATH and not draft.was_given("dataset_file"):
        draft.set("dataset_file", DATASET_OF_PATH[flag])
    path_flags = ("imagenet_path", *DATASET_OF_PATH, "train_images")
    if not any(draft[other] for other in path_flags):
        draft.set(flag, str(Path(draft["data_root"]) / folder))


def _fill_backbone(draft: _Draft) -> None:
    """Choose initial weights and batch norm of the backbone.

    The checkpoint of a detector has the backbone's weights. A randomly initialized backbone has no statistics to
    freeze, so it needs live batch norm.
    """
    weights = draft["backbone_weights"]
    if weights not in (None, "none") and (draft["resume"] or draft["eval"]):
        log.info("--backbone_weights %s is ignored: the checkpoint has the backbone", weights)
        weights = None

    # `start_session` has replaced "auto" with the path of the checkpoint, if there is one.
    resumes = draft["resume"] not in ("", "auto")
    has_checkpoint = resumes or any(draft[name] for name in ("pretrain", "frozen_weights", "eval"))
    if weights is not None:
        alias = BACKBONE_WEIGHT_ALIASES.get(weights, weights)
        draft.set("backbone_weights", alias, draft.origins["backbone_weights"])
    elif has_checkpoint:
        draft.set("backbone_weights", "none")
    else:
        # UP-DETR and DETReg pre-train on SwAV, which has published weights for ResNet-50 only.
        is_swav = draft.script == PRETRAIN and draft["backbone"] == "resnet50"
        draft.set("backbone_weights", "swav" if is_swav else "imagenet")

    has_trained_weights = has_checkpoint or draft["backbone_weights"] != "none"
    draft.default("backbone_norm", "frozen" if has_trained_weights else "live", frozen.RULE)

    # With --pretrain and a frozen backbone, batch norm must keep its statistics, too.
    is_trained = not draft["pretrain"] or draft["lr_backbone"] > 0
    is_given = draft.origins["backbone_norm"] == frozen.GIVEN
    if not is_trained and draft["backbone_norm"] != "frozen" and not is_given:
        draft.set("backbone_norm", "frozen")
