"""Every flag of both entry scripts, once.

Flags whose value the script, the pretext or the detector decides have the default None; `resolve` fills them from one table. Names and
spellings of the published codebases are accepted as aliases; a flag that those parsed and never used is refused with the reason.
"""
import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence

import torch

from util.logger import UserError, log

PRETRAIN, FINETUNE = "main.py", "finetune_main.py"
DETECTOR_NAMES = ("detr", "conditional_detr")
PRETEXT_NAMES = ("random_query_patch",)

# Published flags that have no effect, here or there: flag -> (takes a value, why it is refused).
DEAD_FLAGS = {
    "--remove_difficult": (False, "the published code never reads it"),
    "--world_size": (True, "the launcher says how many processes there are: torchrun --nproc_per_node N"),
    "--mask_loss_coef": (True, "this version predicts boxes only, so that there is no mask loss to weigh"),
    "--dice_loss_coef": (True, "this version predicts boxes only, so that there is no mask loss to weigh"),
    "--masks": (False, "this version predicts boxes only; train and evaluate without it"),
    "--frozen_weights": (True, "it trains a mask head on a frozen detector, and this version predicts boxes only"),
    "--coco_panoptic_path": (True, "this version predicts boxes only; train and evaluate without it"),
}

# What decides a flag that was not given. Keys of the inner tables: "" for all, then script, detector, pretext, the later ones first.
DEFAULTS: dict[str, dict[str, object]] = {
    "detector": {"": "detr"},
    "pretext": {"": None, PRETRAIN: "random_query_patch"},
    "lr": {"": 1e-4},
    "lr_backbone": {"": 1e-5},
    "weight_decay": {"": 1e-4},
    "batch_size": {"": 2},
    "epochs": {"": 300, "conditional_detr": 50, PRETRAIN: 60},
    "lr_drop": {"": 200, "conditional_detr": 40, PRETRAIN: 40},
    "clip_max_norm": {"": 0.1},
    "save_every": {"": 100, "conditional_detr": 10, PRETRAIN: 20},
    "backbone": {"": "resnet50"},
    "dilation": {"": False},
    "position_embedding": {"": "sine"},
    "enc_layers": {"": 6},
    "dec_layers": {"": 6},
    "dim_feedforward": {"": 2048},
    "hidden_dim": {"": 256},
    "nheads": {"": 8},
    "dropout": {"": 0.1},
    "num_queries": {"": 100, "conditional_detr": 300},
    "pre_norm": {"": False},
    "aux_loss": {"": True},
    "classification": {"": "softmax", "conditional_detr": "focal", PRETRAIN: "softmax"},
    "num_classes": {"": 91, PRETRAIN: 2},
    "set_cost_class": {"": 1.0, "conditional_detr": 2.0, PRETRAIN: 1.0},
    "set_cost_bbox": {"": 5.0},
    "set_cost_giou": {"": 2.0},
    "cls_loss_coef": {"": 1.0, "conditional_detr": 2.0, PRETRAIN: 1.0},
    "bbox_loss_coef": {"": 5.0},
    "giou_loss_coef": {"": 2.0},
    "eos_coef": {"": 0.1},
    "focal_alpha": {"": 0.25},
    "num_patches": {"": 10},
    "patch_size": {"": 128},
    "mask_ratio": {"": 0.1},
    "feature_loss_coef": {"": 1.0},
    "feature_recon": {"": False},
    "fre_cnn": {"": False},
    "query_shuffle": {"": False},
    "proposals": {"": "random"},
    "dataset_file": {"": "coco"},
    "data_root": {"": "data"},
    "image_size": {"": 800, PRETRAIN: 480},
    "num_workers": {"": 2, PRETRAIN: 16},
    "seed": {"": 42},
    "amp": {"": "no"},
    "eval_every": {"": 1},
    "start_epoch": {"": 0},
    "coco_evaluator": {"": "auto"},
    "dist_url": {"": "env://"},
    "output_dir": {"": ""},
    "resume": {"": ""},
    "pretrain": {"": ""},
    "reproduce_published": {"": False},
}

BACKBONE_WEIGHT_ALIASES = {"supervised": "imagenet", "random": "none", "": "none"}


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags in one line that names the nearest known one; flags are never abbreviated."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_message(unknown[0]))
        return parsed

    def _unknown_message(self, word: str) -> str:
        flag = word.split("=")[0]
        other = FINETUNE if self.prog == PRETRAIN else PRETRAIN
        if flag in make_parser(other)._option_string_actions:
            return f"{flag} is a flag of {other}, not of {self.prog}"
        nearest = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.65)
        return f"unknown argument {word}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")

    def error(self, message: str) -> None:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


class _Refuse(argparse.Action):
    def __init__(self, *args, why: str = "", **kwargs) -> None:
        self.why = why
        super().__init__(*args, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values, option_string: str | None = None) -> None:
        parser.error(f"{option_string} has no effect: {self.why}")


def positive(kind: Callable = int) -> Callable:
    """A number above 0."""

    def convert(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def at_least_zero(kind: Callable = int) -> Callable:
    """A number of 0 or more."""

    def convert(text: str):
        value = kind(text)
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _device(text: str) -> str:
    try:
        torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text} is no device: use cuda, cuda:N or cpu") from error
    return text


def _switch(group, flag: str, text: str, **kwargs) -> None:
    group.add_argument(flag, action="store_true", default=None, help=text, **kwargs)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", metavar="DIR", help="where everything of this run is kept; empty: nothing is saved")
    group.add_argument("--resume", metavar="PATH|URL|auto", help="continue a run; auto: from checkpoint.pth in --output_dir, if there")
    _switch(group, "--overwrite", "allow --output_dir to hold another run, whose files are replaced")
    _switch(group, "--dry_run", "settings, data check, one step, memory and time estimate; then stop")
    group.add_argument("--device", type=_device, help="cuda, cuda:N or cpu (default: cuda where there is one)")
    group.add_argument("--seed", type=int, help="of initial weights, order and augmentation; the process number is added (42)")
    group.add_argument("--num_workers", type=at_least_zero(),
                       help="loader processes (pre-training 16, else 2; at most the number of cores)")
    group.add_argument("--amp", choices=("no", "bf16"), help="bf16: network in bfloat16, boxes, matching and losses in float32 (no)")
    group.add_argument("--start_epoch", type=at_least_zero(), help="first epoch where --resume holds weights only (0)")
    group.add_argument("--save_every", type=positive(), metavar="EPOCHS",
                       help="numbered checkpoints (pre-training 20, DETR 100, Conditional DETR 10), and one before each rate drop")
    group.add_argument("--dist_url", help="where processes meet (env://)")
    _switch(group, "--reproduce_published", "the published behaviour where ours departs from it, see docs/differences.md")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=positive(float), help="learning rate of transformer and heads (1e-4)")
    group.add_argument("--lr_backbone", type=at_least_zero(float),
                       help="of the backbone; 0 freezes it (fine-tuning 1e-5; pre-training: --lr)")
    group.add_argument("--batch_size", type=positive(), help="images a process (2)")
    group.add_argument("--weight_decay", type=at_least_zero(float), help="AdamW (1e-4)")
    group.add_argument("--epochs", type=positive(), help="pre-training 60, DETR 300, Conditional DETR 50")
    group.add_argument("--lr_drop", type=positive(), metavar="EPOCHS", help="rate x 0.1 after as many (40, 200, 40)")
    group.add_argument("--clip_max_norm", type=float, help="largest gradient norm; 0 or less: no clipping (0.1)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--detector", choices=DETECTOR_NAMES, help="what is trained (detr)")
    group.add_argument("--backbone", help="resnet18, 34, 50, 101, or timm:NAME (resnet50)")
    group.add_argument("--backbone_weights", "--load_backbone", metavar="swav|imagenet|none|PATH|URL",
                       help="where its weights come from (main.py swav, finetune_main.py imagenet; nothing is fetched when a checkpoint "
                            "holds them)")
    group.add_argument("--backbone_norm", choices=("frozen", "live"), help="batch norm (frozen; live where the weights are random)")
    _switch(group, "--dilation", "stride 16 in the last stage (DC5)")
    group.add_argument("--position_embedding", choices=("sine", "sine_shifted", "learned"), help="position code (sine)")
    group.add_argument("--enc_layers", type=positive(), help="(6)")
    group.add_argument("--dec_layers", type=positive(), help="(6)")
    group.add_argument("--dim_feedforward", type=positive(), help="(2048)")
    group.add_argument("--hidden_dim", type=positive(), help="(256)")
    group.add_argument("--nheads", type=positive(), help="(8)")
    group.add_argument("--dropout", type=float, help="(0.1)")
    group.add_argument("--num_queries", type=positive(), help="DETR 100, Conditional DETR 300")
    _switch(group, "--pre_norm", "layer norm before each block")


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("matching and losses")
    group.add_argument("--no_aux_loss", dest="aux_loss", action="store_false", default=None, help="no losses on earlier decoder layers")
    group.add_argument("--set_cost_class", type=at_least_zero(float), help="matching: class (1; Conditional DETR 2)")
    group.add_argument("--set_cost_bbox", type=at_least_zero(float), help="matching: L1 (5)")
    group.add_argument("--set_cost_giou", type=at_least_zero(float), help="matching: generalised IoU (2)")
    group.add_argument("--cls_loss_coef", type=at_least_zero(float), help="loss: class (1; Conditional DETR 2)")
    group.add_argument("--bbox_loss_coef", type=at_least_zero(float), help="loss: L1 (5)")
    group.add_argument("--giou_loss_coef", type=at_least_zero(float), help="loss: generalised IoU (2)")
    group.add_argument("--eos_coef", type=at_least_zero(float), help="weight of `no object` in softmax classification (0.1)")
    group.add_argument("--focal_alpha", type=float, help="weight of positives in focal classification (0.25)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--coco_path", metavar="DIR", help="annotations/ beside train2017/ and val2017/, or beside images/train2017/")
    group.add_argument("--data_root", metavar="DIR", help="folder that holds MSCoco, used where --coco_path is not given (data)")
    group.add_argument("--dataset_file", choices=("coco",), help="kind of labelled data (coco)")
    group.add_argument("--image_size", type=positive(), metavar="PIXELS",
                       help="short side at evaluation (800; pre-training 480); all published training sizes scale with it")
    group.add_argument("--max_size", type=positive(), metavar="PIXELS", help="longest side (1333; pre-training 600; scaled)")


def add_pretext_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pretext")
    group.add_argument("--pretext", choices=PRETEXT_NAMES, help="what is learnt without labels (random_query_patch)")
    group.add_argument("--imagenet_path", metavar="DIR", help="unlabelled images: any folder tree; else the images of --coco_path")
    group.add_argument("--proposals", choices=("random",), help="where boxes come from (random)")
    group.add_argument("--num_patches", type=positive(), help="query patches an image; must divide --num_queries (10)")
    group.add_argument("--patch_size", type=positive(), metavar="PIXELS", help="side of a patch as the backbone sees it (128)")
    group.add_argument("--mask_ratio", type=float, help="share of queries without their patch in training (0.1)")
    group.add_argument("--feature_loss_coef", type=at_least_zero(float), help="loss: reconstruction (1)")
    _switch(group, "--feature_recon", "reconstruct the patches' features")
    _switch(group, "--fre_cnn", "freeze the backbone")
    _switch(group, "--query_shuffle", "assign queries to patches anew in each step")


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fine-tuning and evaluation")
    group.add_argument("--pretrain", metavar="PATH|URL", help="start from this checkpoint's weights, of a pretext or of a detector")
    _switch(group, "--eval", "evaluate only")
    group.add_argument("--eval_every", type=positive(), metavar="EPOCHS", help="evaluate after as many epochs, and the last (1)")
    group.add_argument("--num_classes", type=positive(), help="largest category id + 1 (91)")
    group.add_argument("--classification", choices=("softmax", "focal"), help="DETR softmax, Conditional DETR focal")
    group.add_argument("--coco_evaluator", choices=("auto", "hotcoco", "faster_coco_eval", "pycocotools"),
                       help="auto: the fastest that is installed; the numbers are equal")


def make_parser(script: str) -> Parser:
    """The parser of one entry script, without `--help`, so that it can be a parent of another."""
    parser = Parser(script, add_help=False)
    groups = [add_run_flags, add_optimizer_flags, add_model_flags, add_loss_flags, add_data_flags]
    groups.append(add_pretext_flags if script == PRETRAIN else add_finetune_flags)
    for add in groups:
        add(parser)
    for flag, (takes_value, why) in DEAD_FLAGS.items():
        nargs = None if takes_value else 0
        parser.add_argument(flag, action=_Refuse, why=why, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(script=script)
    return parser


def check_right_script(argv: list[str]) -> None:
    """Refuses, with the exact command to use, to pre-train with flags that only make sense for `finetune_main.py`.

    Raises:
        UserError: `--eval`, `--masks`, `--frozen_weights`, or `--coco_path` without `--pretext`.
    """
    flags = {word.split("=")[0] for word in argv}
    wrong = [flag for flag in ("--eval", "--masks", "--frozen_weights") if flag in flags]
    if "--coco_path" in flags and not {"--pretext", "--imagenet_path"} & flags:
        wrong.append("--coco_path without --pretext")
    if wrong:
        raise UserError(
            f"{wrong[0]}: {PRETRAIN} pre-trains without labels; nothing was started. To train or evaluate with labels:\n"
            f"  python {FINETUNE} {shlex.join(_for_finetuning(argv))}"
            + ("\nTo pre-train on the images of that folder, add: --pretext random_query_patch" if wrong[0].endswith("--pretext") else "")
        )


def _for_finetuning(argv: list[str]) -> list[str]:
    """The words of a command line without the flags, and their values, that `finetune_main.py` does not have or refuses."""
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
    return {name for name, value in vars(args).items() if value is not None and name != "script"}


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fills, in place, what was not given; calling it again changes nothing. A pretext decides before a detector, a detector before all.

    Raises:
        UserError: flags contradict each other.
    """
    if getattr(args, "resolved", False):
        return args
    script = getattr(args, "script", FINETUNE)
    _set_default(args, "detector", DEFAULTS["detector"][""])
    for name, table in DEFAULTS.items():
        keys = (script, args.detector, "")
        _set_default(args, name, next(table[key] for key in keys if key in table))
    _set_default(args, "device", "cuda" if torch.cuda.is_available() else "cpu")
    if "num_workers" not in _given(args):
        args.num_workers = min(args.num_workers, usable_cores())
    for name in ("eval", "overwrite", "dry_run", "coco_path", "imagenet_path", "max_size"):
        if not hasattr(args, name):
            setattr(args, name, None)
    if script == PRETRAIN:
        if args.fre_cnn and "lr_backbone" in _given(args) and args.lr_backbone > 0:
            raise UserError(f"--fre_cnn freezes the backbone and --lr_backbone {args.lr_backbone:g} trains it: give one of them")
        args.lr_backbone = 0.0 if args.fre_cnn else args.lr_backbone if "lr_backbone" in _given(args) else args.lr
    _resolve_backbone(args, script)
    _check(args)
    args.resolved = True
    return args


def usable_cores() -> int:
    """Cores that this process may use, which a scheduler can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set_default(args: argparse.Namespace, name: str, value: object) -> None:
    if getattr(args, name, None) is None:
        setattr(args, name, value)
        args.__dict__.setdefault("_filled", set()).add(name)


def _given(args: argparse.Namespace) -> set[str]:
    return set(vars(args)) - args.__dict__.get("_filled", set())


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


def _check(args: argparse.Namespace) -> None:
    if args.hidden_dim % args.nheads:
        raise UserError(f"--hidden_dim {args.hidden_dim} can't be split over --nheads {args.nheads}: choose a multiple of it")
    if args.hidden_dim % 4:
        raise UserError(f"--hidden_dim {args.hidden_dim}: sine positions need a multiple of 4")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout} must lie in [0, 1)")
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask_ratio {args.mask_ratio} must lie in [0, 1)")
    if args.eval and not (args.resume or args.pretrain):
        raise UserError("--eval needs the detector to evaluate: add --resume PATH")
    if args.eval and args.dry_run:
        raise UserError("--dry_run tries training steps and --eval does not train: give one of them")
    if args.imagenet_path and args.coco_path:
        raise UserError("--imagenet_path and --coco_path both name the unlabelled images: give one of them")
    if max(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou) <= 0:
        raise UserError("--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: nothing would tell a good match from a bad one")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR")
    if args.pretext and args.num_queries % args.num_patches:
        raise UserError(
            f"--num_patches {args.num_patches} does not divide --num_queries {args.num_queries}: "
            "every patch needs the same number of queries"
        )


def plain_settings(args: argparse.Namespace) -> dict[str, object]:
    """The resolved flags as plain values, to print and to keep in checkpoints."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in ("resolved", "_filled")}
