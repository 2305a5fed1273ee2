"""The parsers of both entry scripts, and what flags that were not given mean.

`util.settings.flags` declares the flags; `resolve` fills what was not given and refuses what contradicts itself.
"""

import argparse
import difflib
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from util.errors import UserError
from util.files import check_apart
from util.logger import log
from util.settings.flags import DATASET_PLACES, DEAD_FLAGS, FINETUNE, PRETRAIN, add_flags
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, choose

# The value of a flag that was not given. The detector's line in `util.settings.registry` may change it, and the
# pretext's changes that.
DEFAULTS: dict[str, object] = {
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "weight_decay": 1e-4,
    "batch_size": 2,
    "epochs": 300,
    "lr_drop": 200,
    "lr_backbone_names": ["backbone"],
    "lr_linear_proj_names": [],
    "lr_linear_proj_mult": 0.1,
    "sgd": False,
    "clip_max_norm": 0.1,
    "save_every": 100,
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 2048,
    "hidden_dim": 256,
    "nheads": 8,
    "dropout": 0.1,
    "num_queries": 100,
    "pre_norm": False,
    "num_feature_levels": 1,
    "with_box_refine": False,
    "two_stage": False,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "ms_deform_attn": "auto",
    "aux_loss": True,
    "classification": "softmax",
    "num_classes": 91,
    "set_cost_class": 1.0,
    "set_cost_bbox": 5.0,
    "set_cost_giou": 2.0,
    "cls_loss_coef": 1.0,
    "bbox_loss_coef": 5.0,
    "giou_loss_coef": 2.0,
    "eos_coef": 0.1,
    "focal_alpha": 0.25,
    "num_patches": 10,
    "patch_size": 128,
    "mask_ratio": 0.1,
    "feature_loss_coef": 1.0,
    "global_loss_coef": 10.0,
    "box_disturbance": 0.1,
    "view_iou": 0.5,
    "view_shrink": True,
    "teacher_momentum": None,
    "object_embedding_loss": False,
    "object_embedding_coef": 1.0,
    "obj_embedding_head": "intermediate",
    "feature_recon": False,
    "fre_cnn": False,
    "query_shuffle": False,
    "proposals": "random",
    "cache_path": "",
    "strategy": "topk",
    "max_prop": 30,
    "ss_resize": 128,
    "edge_model": "",
    "dataset_file": "coco",
    "voc_train": ["2007_trainval", "2012_trainval"],
    "voc_val": ["2007_test"],
    "voc_metric": "11point",
    "filter_pct": -1.0,
    "novel_split": 1,
    "data_root": "data",
    "image_size": 800,
    "num_workers": 2,
    "seed": 42,
    "random_seed": False,
    "amp": "no",
    "eval_every": 1,
    "start_epoch": 0,
    "coco_evaluator": "auto",
    "dist_url": "env://",
    "output_dir": "",
    "resume": "",
    "pretrain": "",
    "reproduce_published": False,
}

SMALLEST_IMAGE = 32  # pixels: the stride of the backbone
# Flag of a place -> the `--dataset_file` that DETReg's `--dataset` means by it.
PLACES = {"coco_path": "coco", "voc_path": "voc", "airbus_path": "airbus_ship"}
FEW_SHOT = ("shots", "few_shot_file", "novel_classes")
OWN_DATA = ("train_images", "train_annotations", "val_images", "val_annotations")
BACKBONE_WEIGHT_ALIASES = {"supervised": "imagenet", "random": "none", "": "none"}


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags in one line that names the nearest known one; flags are never abbreviated."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_message(unknown[0]))
        return parsed

    def _unknown_message(self, word: str) -> str:
        flag = word.split("=")[0]
        other = FINETUNE if self.prog == PRETRAIN else PRETRAIN
        if flag in make_parser(other)._option_string_actions:
            return f"{flag} is a flag of {other}, not of {self.prog}"
        if word.endswith(".tar"):
            return (
                f"unknown argument {word}: put a pattern of tar files into quotes, or the shell makes several "
                f"words of it"
            )
        nearest = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.65)
        return f"unknown argument {word}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")

    def error(self, message: str) -> None:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def make_parser(script: str) -> Parser:
    """The parser of one entry script, without `--help`, so that it can be a parent of another."""
    parser = Parser(script, add_help=False)
    add_flags(parser, script)
    parser.set_defaults(script=script)
    return parser


def check_right_script(argv: list[str]) -> None:
    """Refuses, with the exact command to use, to pre-train with flags that only make sense for `finetune_main.py`.

    Raises:
        UserError: `--eval`, `--masks`, `--frozen_weights`, or `--coco_path` or `--dataset coco` (voc, airbus) without
            `--pretext`.
    """
    flags = {word.split("=")[0] for word in argv}
    pretext = {"--eval"} if "--pretext" in flags else set()  # evaluates a pre-trained model
    wrong = [flag for flag in ("--eval", "--masks", "--frozen_weights") if flag in flags - pretext]
    if "--coco_path" in flags and not {"--pretext", "--imagenet_path"} & flags:
        wrong.append("--coco_path without --pretext")
    for name in ("coco", "voc", "airbus") if "--pretext" not in flags else ():  # DETReg's names of labelled images
        if f"--dataset={name}" in argv or ("--dataset", name) in itertools.pairwise(argv):
            wrong.append(f"--dataset {name} without --pretext")
    if wrong:
        raise UserError(
            f"{wrong[0]}: {PRETRAIN} pre-trains without labels; nothing was started. To train or evaluate with "
            f"labels:\n"
            f"  python {FINETUNE} {shlex.join(_for_finetuning(argv))}"
            + (
                "\nTo pre-train on the images of that folder, add: --pretext random_query_patch"
                if wrong[0].endswith("--pretext")
                else ""
            )
        )


def _for_finetuning(argv: list[str]) -> list[str]:
    """The words of a command line without the flags, and their values, that `finetune_main.py` does not have or
    refuses.
    """
    known = make_parser(FINETUNE)._option_string_actions
    kept, keeps = [], True
    for word in argv:
        if word.startswith("--"):
            flag = word.split("=")[0]
            keeps = flag in known and flag not in DEAD_FLAGS
        if keeps:
            kept.append(word)
    return kept


def given_flags(args: argparse.Namespace) -> set[str]:
    """Names of the flags that the user gave; call it before `resolve`."""
    filled = args.__dict__.get("_filled", set())
    return {
        name
        for name, value in vars(args).items()
        if value is not None and name != "script" and name[0] != "_" and name not in filled
    }


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fills, in place, what was not given; calling it again changes nothing. A pretext decides before a detector, a
    detector before all.

    Raises:
        UserError: flags contradict each other.
    """
    if getattr(args, "resolved", False):
        return args
    script = getattr(args, "script", FINETUNE)
    set_default(args, "detector", "detr")
    set_default(args, "pretext", "random_query_patch" if script == PRETRAIN else None)
    set_default(args, "dataset_file", DEFAULTS["dataset_file"])
    if script == PRETRAIN:
        set_default(args, "eval_every", 0)  # never: pre-training needs no labels
    data = choose(DATASETS, "--dataset_file", args.dataset_file).defaults
    defaults = {
        **DEFAULTS,
        **data,
        **choose(DETECTORS, "--detector", args.detector).defaults,
        **_pretext_defaults(args),
    }
    for name, value in defaults.items():
        set_default(args, name, value)
    set_default(args, "device", "cuda" if torch.cuda.is_available() else "cpu")
    if "num_workers" not in _given(args):
        args.num_workers = min(args.num_workers, usable_cores())
    schedule = ("lr_drop_epochs", "max_iters", "lr_drop_iters")
    for name in (
        "eval",
        "overwrite",
        "dry_run",
        "imagenet_path",
        *PLACES,
        "split_file",
        "max_size",
        *schedule,
        *OWN_DATA,
        "few_shot",
        *FEW_SHOT,
    ):
        if not hasattr(args, name):
            setattr(args, name, None)
    if script == PRETRAIN:
        if args.fre_cnn and "lr_backbone" in _given(args) and args.lr_backbone > 0:
            raise UserError(
                f"--fre_cnn freezes the backbone and --lr_backbone {args.lr_backbone:g} trains it: give one of them"
            )
        if args.lr_backbone is None:
            args.lr_backbone = args.lr
        args.lr_backbone = 0.0 if args.fre_cnn else args.lr_backbone
    _resolve_dataset(args)
    _resolve_backbone(args, script)
    _check(args)
    _check_effect(args, defaults)
    args.resolved = True
    return args


def _pretext_defaults(args: argparse.Namespace) -> dict[str, object]:
    return choose(PRETEXTS, "--pretext", args.pretext).defaults if args.pretext else {}


def usable_cores() -> int:
    """Cores that this process may use, which a scheduler can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_default(args: argparse.Namespace, name: str, value: object) -> None:
    """Sets what has no value yet, and remembers that nobody gave it."""
    if getattr(args, name, None) is None:
        setattr(args, name, value)
        args.__dict__.setdefault("_filled", set()).add(name)


def _given(args: argparse.Namespace) -> set[str]:
    return set(vars(args)) - args.__dict__.get("_filled", set())


def _given_in_command(args: argparse.Namespace) -> set[str]:
    """Without what a resumed checkpoint set, where there is one."""
    return args.__dict__.get("_given", _given(args))


def _resolve_dataset(args: argparse.Namespace) -> None:
    """`--dataset NAME` says where data lies below `--data_root`, unless another flag does."""
    name = getattr(args, "dataset", None)
    if not name:
        return
    flag, folder = DATASET_PLACES[name]
    script = getattr(args, "script", FINETUNE)
    if script == FINETUNE and flag not in PLACES:
        raise UserError(f"--dataset {name} has images without labels, for {PRETRAIN}")
    if flag in PLACES and not was_given(args, "dataset_file"):
        args.dataset_file = PLACES[flag]
    if not any(getattr(args, other, None) for other in ("imagenet_path", *PLACES, "train_images")):
        setattr(args, flag, str(Path(args.data_root) / folder))


def _resolve_backbone(args: argparse.Namespace, script: str) -> None:
    """A checkpoint that holds a whole detector brings the backbone's weights; random ones need live batch norm."""
    source = getattr(args, "backbone_weights", None)
    if source not in (None, "none") and (args.resume or args.eval):
        log.info("--backbone_weights %s is not needed: the checkpoint holds the backbone", source)
        source = args.backbone_weights = None
    whole = bool(args.resume and args.resume != "auto") or bool(args.pretrain) or bool(args.eval)
    if source is None:
        imagenet = script == FINETUNE or args.backbone != "resnet50"
        args.backbone_weights = "none" if whole else "imagenet" if imagenet else "swav"
    else:
        args.backbone_weights = BACKBONE_WEIGHT_ALIASES.get(source, source)
    if getattr(args, "backbone_norm", None) is None:
        args.backbone_norm = "frozen" if whole or args.backbone_weights != "none" else "live"
    # A backbone that begins with live norms and trains no more has to keep their statistics as well.
    if args.pretrain and args.lr_backbone <= 0 and "backbone_norm" not in _given_in_command(args):
        args.backbone_norm = "frozen"


def _check(args: argparse.Namespace) -> None:
    _check_readers(args, "detector", DETECTORS)
    if args.pretext:
        _check_readers(args, "pretext", PRETEXTS)
        classes = PRETEXTS[args.pretext].defaults.get("num_classes", args.num_classes)
        if args.num_classes != classes:
            raise UserError(
                f"--num_classes {args.num_classes}: --pretext {args.pretext} has {classes} classes: leave it out"
            )
    if args.hidden_dim % args.nheads:
        raise UserError(
            f"--hidden_dim {args.hidden_dim} can't be split over --nheads {args.nheads}: choose a multiple of it"
        )
    if args.hidden_dim % 4:
        raise UserError(f"--hidden_dim {args.hidden_dim}: sine positions need a multiple of 4")
    if args.with_box_refine and not args.aux_loss and not args.eval:
        raise UserError(
            "--no_aux_loss leaves the boxes of earlier layers unlearnt, and --with_box_refine builds on them: give "
            "one of them"
        )
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout} must lie in [0, 1)")
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask_ratio {args.mask_ratio} must lie in [0, 1)")
    if not 0 < args.view_iou < 1:
        raise UserError(f"--view_iou {args.view_iou} must lie between 0 and 1")
    if not 0 <= args.box_disturbance < 0.5:
        raise UserError(
            f"--box_disturbance {args.box_disturbance} must lie in [0, 0.5): both corners of a box move by as much "
            f"of its side"
        )
    if args.teacher_momentum is not None and not 0 <= args.teacher_momentum <= 1:
        raise UserError(f"--teacher_momentum {args.teacher_momentum:g} must lie in [0, 1], for instance 0.99")
    if args.eval and not (args.resume or args.pretrain):
        raise UserError("--eval needs the detector to evaluate: add --resume PATH")
    if args.eval and args.dry_run:
        raise UserError("--dry_run tries training steps and --eval does not train: give one of them")
    _check_data(args)
    _check_schedule(args)
    _check_numbers(args)
    if max(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou) <= 0:
        raise UserError(
            "--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: nothing would tell a good match from "
            "a bad one"
        )
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR")
    if args.pretext and "num_patches" in PRETEXTS[args.pretext].flags and args.num_queries % args.num_patches:
        raise UserError(
            f"--num_patches {args.num_patches} does not divide --num_queries {args.num_queries}, and every patch "
            "needs the same number of queries: use --num_patches "
            f"{_divisor_near(args.num_patches, args.num_queries)}, or another --num_queries"
        )


def _check_effect(args: argparse.Namespace, defaults: dict[str, object]) -> None:
    """A flag that is given and that nothing would read is an error, but for its default: published commands have some
    of those.
    """
    needs = (
        ("object_embedding_coef", args.object_embedding_loss, "--object_embedding_loss"),
        ("obj_embedding_head", args.object_embedding_loss, "--object_embedding_loss"),
        ("feature_loss_coef", args.pretext != "random_query_patch" or args.feature_recon, "--feature_recon"),
        ("focal_alpha", args.classification == "focal", "--classification focal"),
        ("eos_coef", args.classification == "softmax", "--classification softmax"),
        ("lr_linear_proj_mult", args.lr_linear_proj_names, "--lr_linear_proj_names"),
    )
    given = _given_in_command(args)
    for name, is_read, needed in needs:
        value = getattr(args, name)
        if not is_read and name in given and value != defaults[name]:
            raise UserError(f"--{name} {value} means nothing without {needed}: add that, or leave --{name} out")


def _check_schedule(args: argparse.Namespace) -> None:
    if bool(args.max_iters) != bool(args.lr_drop_iters):
        raise UserError(
            "--max_iters and --lr_drop_iters need each other: a schedule counts iterations or epochs, not both"
        )
    given = _given_in_command(args)
    for name in ("epochs", "lr_drop", "lr_drop_epochs", "start_epoch") if args.max_iters else ():
        if name in given and getattr(args, name):
            if "max_iters" not in given:
                raise UserError(
                    f"--{name} counts epochs and this checkpoint's --max_iters {args.max_iters} iterations: change "
                    f"that one"
                )
            raise UserError(f"--{name} counts epochs and --max_iters {args.max_iters} iterations: give one of them")


def _check_readers(args: argparse.Namespace, kind: str, registry: dict) -> None:
    """A flag that only some detectors, pretexts or data sets read is an error with the others."""
    chosen = getattr(args, kind)
    guessed = kind == "pretext" and kind not in _given(args)  # a flag of another pretext says that another one is meant
    for name in sorted({name for entry in registry.values() for name in entry.flags} - set(registry[chosen].flags)):
        if name in DEFAULTS and (
            getattr(args, name, DEFAULTS[name]) != DEFAULTS[name] or guessed and was_given(args, name)
        ):
            able = [other for other, entry in registry.items() if name in entry.flags]
            raise UserError(
                f"--{name} means nothing to --{kind} {chosen}: leave it out or use --{kind} {' or '.join(able)}"
            )


def _divisor_near(number: int, of: int) -> int:
    return min(
        (divisor for divisor in range(1, of + 1) if of % divisor == 0), key=lambda divisor: abs(divisor - number)
    )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.focal_alpha > 1:
        raise UserError(f"--focal_alpha {args.focal_alpha:g} is a share: it can't exceed 1")
    if not abs(args.seed) < 2**63:
        raise UserError(f"--seed {args.seed} has more than 63 bits: choose a smaller number")
    for name in ("image_size", "max_size"):
        if (getattr(args, name) or SMALLEST_IMAGE) < SMALLEST_IMAGE:
            raise UserError(
                f"--{name} {getattr(args, name)}: the backbone sees nothing in images that small; use "
                f"{SMALLEST_IMAGE} or more"
            )
    if args.start_epoch >= args.epochs and not args.resume:
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves nothing to train of --epochs {args.epochs}: leave it out or "
            f"train longer"
        )


def flags_read(args: argparse.Namespace) -> set[str]:
    """Names of the flags that mean something in this run: the script has them, and not only other detectors, pretexts
    or data sets read them."""
    names = {action.dest for action in make_parser(args.script)._actions}
    for registry, chosen in ((DETECTORS, args.detector), (PRETEXTS, args.pretext), (DATASETS, args.dataset_file)):
        if chosen:
            names -= {name for entry in registry.values() for name in entry.flags} - set(registry[chosen].flags)
    return names


def _check_data(args: argparse.Namespace) -> None:
    own, places = [name for name in OWN_DATA if getattr(args, name)], DATASETS[args.dataset_file].places
    if own and places and own[0] not in places:
        raise UserError(f"--{own[0]} {getattr(args, own[0])} is for own data: add --dataset_file custom")
    for name in PLACES if places else ():
        if getattr(args, name) and name not in places:
            raise UserError(
                f"--{name} {getattr(args, name)} is not for --dataset_file {args.dataset_file}: give "
                + " ".join(f"--{flag}" for flag in places)
            )
    if places:
        _check_readers(args, "dataset_file", DATASETS)
    if args.split_file and args.filter_pct > 0:
        raise UserError(
            f"--split_file {args.split_file} and --filter_pct {args.filter_pct:g} both say what to train on: give "
            f"one of them"
        )
    _check_few_shot(args)
    sources = [name for name in ("imagenet_path", *PLACES, "train_images") if getattr(args, name)]
    if args.imagenet_path and len(sources) > 1:
        raise UserError(f"--imagenet_path and --{sources[1]} both name the unlabelled images: give one of them")
    if getattr(args, "script", FINETUNE) == PRETRAIN and args.output_dir:
        check_apart(args.output_dir, args.imagenet_path or args.train_images or "")


def _check_few_shot(args: argparse.Namespace) -> None:
    given = [name for name in FEW_SHOT if getattr(args, name)] + (["novel_split"] if args.novel_split != 1 else [])
    if given and not args.few_shot:
        raise UserError(f"--{given[0]} says nothing without --few_shot: add --few_shot base, novel or all")
    if args.novel_split != 1 and (args.novel_classes or "voc_path" not in DATASETS[args.dataset_file].places):
        raise UserError(
            f"--novel_split {args.novel_split} is a published list of VOC's classes: leave it out, and name others by "
            "--novel_classes"
        )
    drawn = [name for name in ("shots", "few_shot_file") if getattr(args, name)]
    if args.few_shot == "base" and drawn:
        raise UserError(
            f"--{drawn[0]} draws objects of novel or of all classes, --few_shot base takes all of its classes: "
            f"leave one out"
        )
    if args.few_shot in ("novel", "all") and not drawn and not args.eval:
        raise UserError(
            f"--few_shot {args.few_shot} needs the objects to train on: add --shots K or --few_shot_file PATH"
        )
    for name, other in (("filter_pct", args.filter_pct > 0), ("split_file", args.split_file)) if drawn else ():
        if other:
            raise UserError(f"--{drawn[0]} and --{name} both say what to train on: give one of them")


def was_given(args: argparse.Namespace, name: str) -> bool:
    """Whether the user or a resumed checkpoint set this flag, where `resolve` filled the others."""
    return getattr(args, name, None) is not None and name in _given(args)


def setting_origins(args: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the settings that were `given`, and of those `adopted` from a checkpoint; all others are defaults."""
    return {origin: sorted(args.__dict__.get(f"_{origin}", ())) for origin in ("given", "adopted")}


def plain_settings(args: argparse.Namespace) -> dict[str, object]:
    """The resolved flags as plain values, to print and to keep in checkpoints."""
    return {
        name: value
        for name, value in sorted(vars(args).items())
        if name not in ("resolved", "classes") and name[0] != "_"
    }
