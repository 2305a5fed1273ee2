"""Every flag of both entry scripts: one row each, `util.settings.flag.Flag`.

Parsers, help, checks and resolving are made from this table.

A row has the general default. The line of a dataset, a detector or a pretext in `util.settings.registry` may change it
(a pretext's change is stronger than a detector's, a detector's than a dataset's), and says which flags are read by it
alone. The help names all of these defaults by itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from util.settings.flag import FINETUNE, PRETRAIN, SCRIPTS, Flag, flags_in
from util.settings.kinds import (
    at_least_zero,
    device,
    finite,
    fraction,
    positive,
    proposal_method,
    strategy,
    voc_set,
)
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS

GROUPS = (
    "run",
    "optimization",
    "model",
    "matching and losses",
    "data",
    "pretext",
    "fine-tuning and evaluation",
)
RUN, OPTIMIZATION, MODEL, LOSSES, DATA, PRETEXT, FINETUNING = GROUPS


_EPOCHS, _STEPS = ("epochs", "lr_drop", "lr_drop_epochs"), ("max_iters", "lr_drop_iters")

# DETReg's names of datasets -> (flag, folder below --data_root) that say the same.
DATASET_PLACES = {
    "imagenet": ("imagenet_path", "ilsvrc/train"),
    "imagenet100": ("imagenet_path", "ilsvrc100/train"),
    "coco_pretrain": ("coco_path", "MSCoco"),
    "coco": ("coco_path", "MSCoco"),
    "voc": ("voc_path", "pascal/VOCdevkit"),
    "airbus": ("airbus_path", "airbus-ship-detection"),
    "airbus_pretrain": ("imagenet_path", "airbus-ship-detection/train_v2"),
}


def _object_embedding(settings: Mapping[str, Any]) -> bool:
    return bool(settings["object_embedding_loss"])


FLAGS: tuple[Flag, ...] = (
    *flags_in(
        RUN,
        SCRIPTS,
        Flag(
            "output_dir",
            "folder for everything that this run writes; without it nothing is saved",
            str,
            default="",
            metavar="DIR",
            session=True,
        ),
        Flag(
            "resume",
            "resume a run from this checkpoint; auto: from checkpoint.pth in --output_dir, if it exists",
            str,
            default="",
            metavar="PATH|URL|auto",
            session=True,
        ),
        Flag("overwrite", "replace the files of another run in --output_dir", session=True),
        Flag(
            "dry_run",
            "check settings and data, try three steps, estimate time and memory, and stop",
            session=True,
        ),
        Flag(
            "device", "cuda, cuda:N or cpu", device, default_help="cuda if available", session=True
        ),
        Flag("seed", "random seed; the rank is added", int, default=42),
        Flag("random_seed", "draw a new random seed for this run; it is stored with the run"),
        Flag(
            "num_workers",
            "dataloader workers per process; by default at most the number of cores",
            at_least_zero(),
            default=2,
            session=True,
        ),
        Flag(
            "amp",
            "mixed precision; bf16: the network in bfloat16, boxes, matching and losses in float32",
            str,
            values=("no", "bf16"),
            default="no",
        ),
        Flag(
            "start_epoch",
            "first epoch, counted from 0, if --resume holds weights only",
            at_least_zero(),
            default=0,
            counts="epochs",
            session=True,
        ),
        Flag(
            "save_every",
            "epochs between numbered checkpoints; one more is saved before each learning rate drop",
            positive(),
            default=100,
            metavar="EPOCHS",
        ),
        Flag(
            "dist_url",
            "address at which the processes of a distributed run meet",
            str,
            default="env://",
            session=True,
        ),
        Flag(
            "reproduce_published",
            "the published behaviour wherever this project departs from it, see docs/differences.md",
        ),
    ),
    *flags_in(
        OPTIMIZATION,
        SCRIPTS,
        Flag(
            "lr",
            "learning rate of the transformer and the heads",
            positive(float),
            default=1e-4,
            published=True,
        ),
        Flag(
            "lr_backbone",
            "learning rate of the backbone; 0 freezes it",
            at_least_zero(float),
            default=1e-5,
            default_help="1e-05; random_query_patch: as --lr",
            published=True,
        ),
        Flag("batch_size", "images per process (GPU)", positive(), default=2),
        Flag(
            "weight_decay",
            "weight decay of AdamW",
            at_least_zero(float),
            default=1e-4,
            published=True,
        ),
        Flag(
            "epochs",
            "length of the training",
            positive(),
            default=300,
            counts="epochs",
            replaces=_STEPS,
            published=True,
        ),
        Flag(
            "lr_drop",
            "divide the learning rate by 10 every so many epochs",
            positive(),
            default=200,
            metavar="EPOCHS",
            counts="epochs",
            replaces=(*_STEPS, "lr_drop_epochs"),
            published=True,
        ),
        Flag(
            "lr_drop_epochs",
            "divide the learning rate by 10 after each of these epochs, instead of --lr_drop",
            positive(),
            metavar="EPOCH",
            several=True,
            counts="epochs",
            replaces=(*_STEPS, "lr_drop"),
        ),
        Flag(
            "max_iters",
            "length of the training in steps, instead of --epochs; a longer one of a finished run starts a new epoch",
            positive(),
            metavar="STEPS",
            counts="steps",
            replaces=_EPOCHS,
        ),
        Flag(
            "lr_drop_iters",
            "divide the learning rate by 10 every so many steps, with --max_iters",
            positive(),
            metavar="STEPS",
            counts="steps",
            replaces=_EPOCHS,
        ),
        Flag(
            "lr_backbone_names",
            "parameters whose name contains one of these are trained with --lr_backbone",
            str,
            default=["backbone"],
            metavar="PART",
            several=True,
        ),
        Flag(
            "lr_linear_proj_names",
            "parameters whose name contains one of these are trained with --lr times --lr_linear_proj_mult",
            str,
            default=[],
            metavar="PART",
            several=True,
        ),
        Flag(
            "lr_linear_proj_mult",
            "factor of the learning rate for --lr_linear_proj_names",
            positive(float),
            default=0.1,
            needs=(
                "--lr_linear_proj_names",
                lambda settings: bool(settings["lr_linear_proj_names"]),
            ),
        ),
        Flag("sgd", "SGD with momentum 0.9 instead of AdamW"),
        Flag(
            "clip_max_norm",
            "clip gradients to this norm; 0 or less: no clipping",
            finite,
            default=0.1,
            published=True,
        ),
    ),
    *flags_in(
        MODEL,
        SCRIPTS,
        Flag(
            "detector",
            "the detector to train",
            str,
            values=DETECTORS,
            default="detr",
            aliases=("--model",),
        ),
        Flag(
            "backbone",
            "resnet18, resnet34, resnet50, resnet101 or timm:NAME",
            str,
            default="resnet50",
        ),
        Flag(
            "backbone_weights",
            "pre-trained weights of the backbone",
            str,
            default_help="main.py: swav for resnet50, else imagenet; "
            "finetune_main.py: imagenet; with a checkpoint: none",
            metavar="swav|imagenet|none|PATH|URL",
            aliases=("--load_backbone",),
            session=True,
        ),
        Flag(
            "backbone_norm",
            "batch norm of the backbone",
            str,
            values=("frozen", "live"),
            default_help="frozen; live if the weights are random",
        ),
        Flag("dilation", "stride 16 in the last stage of the backbone (DC5)"),
        Flag(
            "position_embedding",
            "positional encoding; sine_shifted: sine at the centers of the cells",
            str,
            values=("sine", "sine_shifted", "learned"),
            default="sine",
        ),
        Flag("enc_layers", "encoder layers", positive(), default=6),
        Flag("dec_layers", "decoder layers", positive(), default=6),
        Flag(
            "dim_feedforward",
            "width of the feed-forward networks in the transformer",
            positive(),
            default=2048,
        ),
        Flag("hidden_dim", "width of the transformer", positive(), default=256),
        Flag("nheads", "attention heads", positive(), default=8),
        Flag("dropout", "dropout in the transformer", float, default=0.1, interval="[0, 1)"),
        Flag("num_queries", "object queries", positive(), default=100),
        Flag("pre_norm", "layer norm before each block, not after it"),
        Flag(
            "num_feature_levels",
            "feature levels that Deformable DETR reads: up to three of the backbone, then strided convolutions",
            positive(),
            default=1,
            metavar="LEVELS",
        ),
        Flag("with_box_refine", "iterative box refinement in the decoder of Deformable DETR"),
        Flag("two_stage", "queries of Deformable DETR come from proposals of its encoder"),
        Flag(
            "enc_n_points",
            "sampling points per head and level in the encoder of Deformable DETR",
            positive(),
            default=4,
        ),
        Flag(
            "dec_n_points",
            "sampling points per head and level in the decoder of Deformable DETR",
            positive(),
            default=4,
        ),
        Flag(
            "ms_deform_attn",
            "implementation of deformable attention; auto: triton on a GPU, else pytorch",
            str,
            values=("auto", "pytorch", "triton"),
            default="auto",
            session=True,
        ),
    ),
    *flags_in(
        LOSSES,
        SCRIPTS,
        Flag(
            "aux_loss",
            "no auxiliary losses on the earlier decoder layers",
            default=True,
            off="--no_aux_loss",
        ),
        Flag(
            "set_cost_class",
            "matching: weight of the class cost",
            at_least_zero(float),
            default=1.0,
        ),
        Flag(
            "set_cost_bbox",
            "matching: weight of the L1 box cost",
            at_least_zero(float),
            default=5.0,
        ),
        Flag(
            "set_cost_giou",
            "matching: weight of the generalized IoU cost",
            at_least_zero(float),
            default=2.0,
        ),
        Flag(
            "cls_loss_coef", "weight of the classification loss", at_least_zero(float), default=1.0
        ),
        Flag("bbox_loss_coef", "weight of the L1 box loss", at_least_zero(float), default=5.0),
        Flag(
            "giou_loss_coef",
            "weight of the generalized IoU loss",
            at_least_zero(float),
            default=2.0,
        ),
        Flag(
            "eos_coef",
            "weight of the class `no object` in softmax classification",
            positive(float),
            default=0.1,
            needs=(
                "--classification softmax",
                lambda settings: settings["classification"] == "softmax",
            ),
        ),
        Flag(
            "focal_alpha",
            "weight of positives in the focal loss",
            finite,
            default=0.25,
            needs=(
                "--classification focal",
                lambda settings: settings["classification"] == "focal",
            ),
        ),
    ),
    *flags_in(
        DATA,
        SCRIPTS,
        Flag(
            "coco_path",
            "COCO: annotations/ beside train2017/ and val2017/, or beside images/train2017/",
            str,
            metavar="DIR",
            data=True,
        ),
        Flag(
            "data_root",
            "folder with MSCoco, pascal/VOCdevkit and airbus-ship-detection, used if no other path is given",
            str,
            default="data",
            metavar="DIR",
            data=True,
        ),
        Flag(
            "dataset_file",
            "kind of dataset; pre-training takes its images without labels; custom: see --train_images",
            str,
            values=DATASETS,
            default="coco",
        ),
        Flag(
            "voc_path", "VOCdevkit, with VOC2007 and VOC2012 in it", str, metavar="DIR", data=True
        ),
        Flag(
            "voc_train",
            "VOC: image sets to train on",
            voc_set,
            default=["2007_trainval", "2012_trainval"],
            metavar="SET",
            several=True,
            data=True,
        ),
        Flag(
            "voc_val",
            "VOC: image sets to evaluate on",
            voc_set,
            default=["2007_test"],
            metavar="SET",
            several=True,
            data=True,
        ),
        Flag(
            "airbus_path",
            "Airbus Ship: train_v2/ beside train_ship_segmentations_v2.csv",
            str,
            metavar="DIR",
            data=True,
        ),
        Flag(
            "dataset",
            "DETReg's name for a dataset in --data_root: ilsvrc, ilsvrc100, MSCoco, pascal, airbus-ship-detection",
            str,
            values=tuple(DATASET_PLACES),
            data=True,
        ),
        Flag(
            "train_images",
            "custom dataset: training images; file names in the annotations are relative to this folder",
            str,
            metavar="DIR",
            data=True,
        ),
        Flag(
            "image_size",
            "short side at evaluation; all published training sizes scale with it",
            positive(),
            default=800,
            metavar="PIXELS",
        ),
        Flag(
            "max_size",
            "longest side",
            positive(),
            default_help="1333, pre-training 600; scaled with --image_size",
            metavar="PIXELS",
        ),
    ),
    *flags_in(
        PRETEXT,
        (PRETRAIN,),
        Flag(
            "pretext",
            "the pretext task: what is learnt without labels",
            str,
            values=PRETEXTS,
            default_help="random_query_patch",
        ),
        Flag(
            "imagenet_path",
            "unlabelled images: any folder tree, a list of files, tar files or a pattern of them",
            str,
            default_help="the images of --dataset_file",
            metavar="DIR",
        ),
        Flag(
            "proposals",
            "proposal method: {proposals}; see docs/proposals.md",
            proposal_method,
            default="random",
            metavar="NAME|file:PATH",
        ),
        Flag(
            "cache_path",
            "take proposals from this cache of tools/cache_proposals.py",
            str,
            default="",
            metavar="DIR",
        ),
        Flag(
            "strategy",
            "which proposals are used: the first ones, random ones, or earlier ones with higher probability",
            strategy,
            default="topk",
            metavar="topk|random|mc",
        ),
        Flag("max_prop", "proposals per image at most; with mc on average", positive(), default=30),
        Flag(
            "ss_resize",
            "selective_search: images are resized to a square of this side; 0: not resized",
            at_least_zero(),
            default=128,
            metavar="PIXELS",
        ),
        Flag(
            "edge_model",
            "edge_boxes: OpenCV's model.yml.gz; without it edges are image gradients",
            str,
            default="",
            metavar="FILE",
        ),
        Flag(
            "num_patches",
            "query patches per image; must divide --num_queries",
            positive(),
            default=10,
        ),
        Flag("patch_size", "side of a query patch", positive(), default=128, metavar="PIXELS"),
        Flag(
            "mask_ratio",
            "random_query_patch: fraction of queries that are not given their patch in training",
            float,
            default=0.1,
            interval="[0, 1)",
        ),
        Flag(
            "feature_loss_coef",
            "weight of the feature reconstruction loss; siamese: of region discrimination, 0 switches it off",
            at_least_zero(float),
            default=1.0,
            needs=(
                "--feature_recon",
                lambda settings: (
                    settings["pretext"] != "random_query_patch" or bool(settings["feature_recon"])
                ),
            ),
        ),
        Flag(
            "global_loss_coef",
            "siamese: weight of global discrimination; 0 switches it off",
            at_least_zero(float),
            default=10.0,
        ),
        Flag(
            "box_disturbance",
            "siamese: the corners of a query's box move by up to this fraction of its sides",
            at_least_zero(float),
            default=0.1,
            metavar="FRACTION",
            interval="[0, 0.5)",
        ),
        Flag(
            "view_iou",
            "siamese: IoU of the two views",
            positive(float),
            default=0.5,
            interval="(0, 1)",
        ),
        Flag(
            "view_shrink",
            "siamese: views overlap by exactly --view_iou, not by at least as much",
            default=True,
            off="--no_view_shrink",
        ),
        Flag(
            "teacher_momentum",
            "siamese: targets come from a moving average of the network with this initial momentum",
            finite,
            default_help="off; 0.99 is a good value",
            metavar="M",
            interval="[0, 1]",
        ),
        Flag("feature_recon", "random_query_patch: reconstruct the features of the patches"),
        Flag("fre_cnn", "freeze the backbone"),
        Flag(
            "query_shuffle", "random_query_patch: assign queries to patches at random in each step"
        ),
        Flag(
            "num_classes",
            "classes of the head; region_prior: class 1 is `object`, and 1 class means objectness alone",
            positive(),
            default=91,
        ),
        Flag(
            "eval",
            "with --resume: class-agnostic AP and AR on the validation images of --dataset_file, and stop",
            session=True,
        ),
        Flag(
            "viz",
            "with --resume: draw proposals, predicted and ground-truth boxes of some of those images in objects.png",
            session=True,
        ),
        Flag(
            "eval_every",
            "the metrics of --eval during training, every so many epochs and after the last one",
            positive(),
            default=0,
            default_help="never",
            metavar="EPOCHS",
        ),
        Flag(
            "object_embedding_loss",
            "region_prior: also predict an embedding of each proposal's crop",
        ),
        Flag(
            "object_embedding_coef",
            "weight of the object embedding loss",
            at_least_zero(float),
            default=1.0,
            needs=("--object_embedding_loss", _object_embedding),
        ),
        Flag(
            "obj_embedding_head",
            "target embedding: mean of the backbone's stage 2, or the output of SwAV's projection head",
            str,
            values=("intermediate", "head"),
            default="intermediate",
            needs=("--object_embedding_loss", _object_embedding),
        ),
    ),
    *flags_in(
        FINETUNING,
        (FINETUNE,),
        Flag(
            "pretrain",
            "start from the weights of this checkpoint, of a pretext or of a detector",
            str,
            default="",
            metavar="PATH|URL",
            session=True,
        ),
        Flag("eval", "evaluate only", session=True),
        Flag(
            "eval_every",
            "evaluate every so many epochs and after the last one",
            positive(),
            default=1,
            metavar="EPOCHS",
        ),
        Flag(
            "train_annotations",
            "custom dataset: a COCO file or a folder of VOC's XML; it defines the classes",
            str,
            metavar="FILE",
            data=True,
        ),
        Flag("val_images", "custom dataset: validation images", str, metavar="DIR", data=True),
        Flag(
            "val_annotations",
            "custom dataset: annotations of the validation images; classes are matched by name",
            str,
            metavar="FILE",
            data=True,
        ),
        Flag(
            "voc_metric",
            "which AP of VOC is reported as AP; both are saved",
            str,
            values=("11point", "area"),
            default="11point",
            data=True,
        ),
        Flag(
            "filter_pct",
            "train on this fraction of the images, drawn by --seed",
            fraction,
            default=-1.0,
            default_help="all",
            metavar="FRACTION",
            data=True,
        ),
        Flag(
            "split_file",
            "train on the images of this file of tools/make_split.py, or of a run's subset.json",
            str,
            metavar="FILE",
            data=True,
        ),
        Flag(
            "few_shot",
            "train on objects of these classes only; novel and all with --shots or --few_shot_file; evaluate base and "
            "novel classes",
            str,
            values=("base", "novel", "all"),
            data=True,
        ),
        Flag(
            "shots",
            "few_shot: K objects of each class, drawn by --seed",
            positive(),
            metavar="K",
            data=True,
        ),
        Flag(
            "few_shot_file",
            "few_shot: the objects of a COCO file or subset.json, or with --shots of a published folder of such files",
            str,
            metavar="PATH",
            data=True,
        ),
        Flag(
            "novel_classes",
            "few_shot: the novel classes",
            str,
            default_help="coco: the 20 classes of VOC",
            metavar="NAME",
            several=True,
            data=True,
        ),
        Flag(
            "novel_split",
            "few_shot: number of the published list of novel classes of VOC",
            int,
            values=(1, 2, 3),
            default=1,
            data=True,
        ),
        Flag(
            "num_classes",
            "largest category id + 1",
            positive(),
            default=91,
            default_help="91; voc 20; airbus_ship 1; custom: the number of classes in the annotations",
        ),
        Flag(
            "classification",
            "classification loss of the detector",
            str,
            values=("softmax", "focal"),
            default="softmax",
        ),
        Flag(
            "coco_evaluator",
            "implementation of COCO's metrics, with equal results; auto: hotcoco if installed, else pycocotools",
            str,
            values=("auto", "hotcoco", "pycocotools"),
            default="auto",
        ),
    ),
)

# Flags of the published codebases that have no effect, here or there: flag -> (takes a value, why it is refused).
REFUSED_FLAGS: dict[str, tuple[bool, str]] = {
    "--remove_difficult": (False, "the published code never reads it"),
    "--world_size": (
        True,
        "the launcher says how many processes there are: torchrun --nproc_per_node N",
    ),
    "--mask_loss_coef": (True, "this version predicts boxes only, so there is no mask loss"),
    "--dice_loss_coef": (True, "this version predicts boxes only, so there is no mask loss"),
    "--masks": (False, "this version predicts boxes only; train and evaluate without it"),
    "--frozen_weights": (
        True,
        "it trains a mask head on a frozen detector, and this version predicts boxes only",
    ),
    "--coco_panoptic_path": (
        True,
        "this version predicts boxes only; train and evaluate without it",
    ),
    "--position_embedding_scale": (True, "the published code never reads it: the scale is 2 pi"),
    "--filter_num": (True, "the published code never reads it"),
    "--reset_embedding_layer": (True, "the published code never reads it"),
    "--cache_mode": (
        False,
        "image files are not kept in memory; the operating system caches what was read",
    ),
}


def flags_of(script: str) -> dict[str, Flag]:
    """Name -> row of the flags that a script has, in the order of the help."""
    return {flag.name: flag for flag in FLAGS if script in flag.scripts}


def all_flags(script: str) -> dict[str, Flag]:
    """Every flag by name; of two with the same name the one of `script`. Settings have a value for each of them."""
    return {**{flag.name: flag for flag in FLAGS}, **flags_of(script)}


def names_where(condition: Callable[[Flag], Any]) -> set[str]:
    """Names of the flags for which `condition` holds."""
    return {flag.name for flag in FLAGS if condition(flag)}


def readers(name: str, registry: Mapping[str, Any]) -> list[str]:
    """Which lines of a registry read a flag that not all of them read; empty for a flag that all of them read."""
    return [other for other, entry in registry.items() if name in entry.flags]


def only_read_by_others(registry: Mapping[str, Any], chosen: str) -> Iterable[str]:
    """Flags that other lines of a registry read and the chosen one does not."""
    names = {name for entry in registry.values() for name in entry.flags}
    return sorted(names - set(registry[chosen].flags))
