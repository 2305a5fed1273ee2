"""From what was given to settings that rest: defaults by dataset, detector and pretext, rules, and checks; once."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError
from util.logger import log
from util.settings import frozen
from util.settings.checks import check_settings
from util.settings.frozen import Settings
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, lookup
from util.settings.table import DATASET_PLACES, FINETUNE, PRETRAIN, all_flags, names_where

# Flag that says where a labelled dataset is -> the `--dataset_file` that DETReg's `--dataset` means by it.
DATASET_OF_PATH = {"coco_path": "coco", "voc_path": "voc", "airbus_path": "airbus_ship"}
BACKBONE_WEIGHT_ALIASES = {"supervised": "imagenet", "random": "none", "": "none"}


def resolve(
    args: Settings | Namespace | Mapping[str, Any],
    adopted: Mapping[str, Any] | None = None,
    script: str | None = None,
) -> Settings:
    """Settings with a value for every flag. `args` is left as it is; settings that are resolved already come back.

    Args:
        args: parsed flags, or any namespace or mapping of flag names; None stands for a flag that was not given, and
            names that are no flags are ignored.
        adopted: what a checkpoint says of flags that were not given.
        script: the entry script; by default the namespace's own `script`, or `finetune_main.py`.

    Raises:
        UserError: flags contradict each other, or a value is out of its range.
    """
    if isinstance(args, Settings):
        return args
    values = dict(args) if isinstance(args, Mapping) else vars(args)
    script = script or values.get("script") or FINETUNE
    draft = _Draft(script, given_flags(values), adopted or {})
    defaults = _fill_defaults(draft)
    _fill_device(draft)
    _fill_backbone_rate(draft)
    _fill_dataset(draft)
    _fill_backbone(draft)
    settings = Settings(script, draft.values, draft.origins)
    check_settings(settings, defaults)
    return settings


def given_flags(args: Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """The flags that have a value, by name."""
    values = args if isinstance(args, Mapping) else vars(args)
    known = names_where(lambda flag: True)
    return {name: value for name, value in values.items() if name in known and value is not None}


class _Draft:
    """Values that are still being filled in, with their origins."""

    def __init__(self, script: str, given: Mapping[str, Any], adopted: Mapping[str, Any]) -> None:
        self.script, self.flags = script, all_flags(script)
        self.values: dict[str, Any] = dict.fromkeys(self.flags)
        self.origins: dict[str, str] = dict.fromkeys(self.flags, frozen.DEFAULT)
        for values, origin in ((adopted, frozen.CHECKPOINT), (given, frozen.GIVEN)):
            for name, value in values.items():
                if name in self.flags:
                    self.set(name, value, origin)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def set(self, name: str, value: Any, origin: str = frozen.RULE) -> None:
        self.values[name], self.origins[name] = value, origin

    def default(self, name: str, value: Any, origin: str = frozen.DEFAULT) -> None:
        """Sets what has no value yet."""
        if self.values[name] is None:
            self.set(name, value, origin)

    def was_given(self, name: str) -> bool:
        return self.values[name] is not None and self.origins[name] in (
            frozen.GIVEN,
            frozen.CHECKPOINT,
        )


def _fill_defaults(draft: _Draft) -> dict[str, Any]:
    """Returns the default of each flag for this dataset, detector and pretext, whether or not it was given."""
    draft.default("detector", draft.flags["detector"].default)
    draft.default("dataset_file", draft.flags["dataset_file"].default)
    if draft.script == PRETRAIN:
        draft.default("pretext", "random_query_patch")
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
        draft.set(
            "num_workers", min(draft["num_workers"], usable_cores()), draft.origins["num_workers"]
        )


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_cores() -> int:
    """Cores that this process may use, which a scheduler can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill_backbone_rate(draft: _Draft) -> None:
    """In pre-training the backbone may learn as fast as the transformer, or not at all."""
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
    """`--dataset NAME` says where the data is below `--data_root`, unless another flag does."""
    name = draft["dataset"]
    if not name:
        return
    flag, folder = DATASET_PLACES[name]
    if draft.script == FINETUNE and flag not in DATASET_OF_PATH:
        raise UserError(f"--dataset {name} has images without labels, for {PRETRAIN}")
    if flag in DATASET_OF_PATH and not draft.was_given("dataset_file"):
        draft.set("dataset_file", DATASET_OF_PATH[flag])
    if not any(draft[other] for other in ("imagenet_path", *DATASET_OF_PATH, "train_images")):
        draft.set(flag, str(Path(draft["data_root"]) / folder))


def _fill_backbone(draft: _Draft) -> None:
    """A checkpoint that holds a whole detector brings the backbone's weights; random ones need live batch norm."""
    source = draft["backbone_weights"]
    if source not in (None, "none") and (draft["resume"] or draft["eval"]):
        log.info("--backbone_weights %s is not needed: the checkpoint holds the backbone", source)
        source = None
    has_checkpoint = (
        draft["resume"] not in ("", "auto") or bool(draft["pretrain"]) or bool(draft["eval"])
    )
    if source is None:
        imagenet = draft.script == FINETUNE or draft["backbone"] != "resnet50"
        draft.set(
            "backbone_weights", "none" if has_checkpoint else "imagenet" if imagenet else "swav"
        )
    else:
        alias = BACKBONE_WEIGHT_ALIASES.get(source, source)
        draft.set("backbone_weights", alias, draft.origins["backbone_weights"])
    frozen_norm = has_checkpoint or draft["backbone_weights"] != "none"
    draft.default("backbone_norm", "frozen" if frozen_norm else "live", frozen.RULE)
    # A backbone that begins with live norms and is not trained any more has to keep their statistics as well.
    trained = not draft["pretrain"] or draft["lr_backbone"] > 0
    if (
        not trained
        and draft["backbone_norm"] != "frozen"
        and draft.origins["backbone_norm"] != frozen.GIVEN
    ):
        draft.set("backbone_norm", "frozen")
