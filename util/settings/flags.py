"""The declaration of every flag of both entry scripts, in groups.

Flags whose value the script, the pretext or the detector decides have the default None here;
`util.settings.arguments.resolve` fills them. A flag that the published codebases parsed and never used is refused with
the reason.
"""

import argparse
import math
import re
from collections.abc import Callable

import torch

from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, PROPOSALS

PRETRAIN, FINETUNE = "main.py", "finetune_main.py"

# Published flags that have no effect, here or there: flag -> (takes a value, why it is refused).
DEAD_FLAGS = {
    "--remove_difficult": (False, "the published code never reads it"),
    "--world_size": (True, "the launcher says how many processes there are: torchrun --nproc_per_node N"),
    "--mask_loss_coef": (True, "this version predicts boxes only, so that there is no mask loss to weigh"),
    "--dice_loss_coef": (True, "this version predicts boxes only, so that there is no mask loss to weigh"),
    "--masks": (False, "this version predicts boxes only; train and evaluate without it"),
    "--frozen_weights": (True, "it trains a mask head on a frozen detector, and this version predicts boxes only"),
    "--coco_panoptic_path": (True, "this version predicts boxes only; train and evaluate without it"),
    "--position_embedding_scale": (True, "the published code never reads it: the scale is 2 pi"),
    "--filter_num": (True, "the published code never reads it"),
    "--reset_embedding_layer": (True, "the published code never reads it"),
    "--cache_mode": (
        False,
        "image files are not held in memory; the operating system keeps what was read where memory is free",
    ),
}

# DETReg's names of data sets -> (flag, folder below --data_root) that say the same.
DATASET_PLACES = {
    "imagenet": ("imagenet_path", "ilsvrc/train"),
    "imagenet100": ("imagenet_path", "ilsvrc100/train"),
    "coco_pretrain": ("coco_path", "MSCoco"),
    "coco": ("coco_path", "MSCoco"),
    "voc": ("voc_path", "pascal/VOCdevkit"),
    "airbus": ("airbus_path", "airbus-ship-detection"),
    "airbus_pretrain": ("imagenet_path", "airbus-ship-detection/train_v2"),
}


STEPS, EPOCHS = ("max_iters", "lr_drop_iters"), ("epochs", "lr_drop", "lr_drop_epochs")


class _Refuse(argparse.Action):
    def __init__(self, *args, why: str = "", **kwargs) -> None:
        self.why = why
        super().__init__(*args, **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string} has no effect: {self.why}")


class _Schedule(argparse.Action):
    """The last flag decides what a schedule counts, so that flags behind a config win."""

    def __init__(self, *args, replaces: tuple[str, ...] = (), **kwargs) -> None:
        self.replaces = replaces
        super().__init__(*args, **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values, option_string: str | None = None
    ) -> None:
        for name in self.replaces:
            setattr(namespace, name, None)
        setattr(namespace, self.dest, values)


def positive(kind: Callable = int) -> Callable:
    """A number above 0."""

    def convert(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def at_least_zero(kind: Callable = int) -> Callable:
    """A number of 0 or more."""

    def convert(text: str):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _proposal_names() -> list[str]:
    return [f"{name}PATH" if name.endswith(":") else name for name in PROPOSALS]


def proposal_name(text: str) -> str:
    """A proposal method of the registry, or file:PATH."""
    if text not in PROPOSALS and not text.startswith("file:"):
        raise argparse.ArgumentTypeError(f"{text} is unknown: choose one of {', '.join(_proposal_names())}")
    return text


def _device(text: str) -> str:
    try:
        known = torch.device(text).type in ("cuda", "cpu")
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text} is no device of this project: use cuda, cuda:N or cpu")
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


_finite.__name__ = "float"  # what argparse says of text that is no number


def _switch(group, flag: str, text: str, **kwargs) -> None:
    group.add_argument(flag, action="store_true", default=None, help=text, **kwargs)


def share(text: str) -> float:
    """A number above 0, at most 1; -1, DETReg's default, means all."""
    value = float(text)
    if not 0 < value <= 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must lie above 0 and not above 1, got {text}: 10 % is 0.1")
    return value


def voc_set(text: str) -> str:
    """Year and list of images of VOC, such as 2007_trainval."""
    if not re.fullmatch(r"\d{4}_\w+", text):
        raise argparse.ArgumentTypeError(f"{text} must be a year and a list in ImageSets/Main, such as 2012_trainval")
    return text


def strategy_name(text: str) -> str:
    """DETReg's spellings of the same strategies too: `random_sample`, and `mc_1` to `mc_4`."""
    name = {"random_sample": "random", **dict.fromkeys(("mc_1", "mc_2", "mc_3", "mc_4"), "mc")}.get(text, text)
    if text == "topk_edgebox":
        raise argparse.ArgumentTypeError("topk_edgebox is --strategy topk --proposals edge_boxes")
    if name not in ("topk", "random", "mc"):
        raise argparse.ArgumentTypeError(f"{text} is unknown: choose topk, random or mc")
    return name


def _schedule(group, flag: str, replaces: tuple[str, ...], text: str, **kwargs) -> None:
    group.add_argument(flag, type=positive(), action=_Schedule, replaces=replaces, help=text, **kwargs)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", metavar="DIR", help="where everything of this run is kept; empty: nothing is saved"
    )
    group.add_argument(
        "--resume", metavar="PATH|URL|auto", help="continue a run; auto: from checkpoint.pth in --output_dir, if there"
    )
    _switch(group, "--overwrite", "allow --output_dir to hold another run, whose files are replaced")
    _switch(group, "--dry_run", "settings, data check, three steps, memory and time estimate; then stop")
    group.add_argument("--device", type=_device, help="cuda, cuda:N or cpu (default: cuda where there is one)")
    group.add_argument(
        "--seed", type=int, help="of initial weights, order and augmentation; the process number is added (42)"
    )
    _switch(group, "--random_seed", "draw the seed anew for this run, and keep it with the run")
    group.add_argument(
        "--num_workers",
        type=at_least_zero(),
        help="loader processes (random_query_patch 16, siamese 4, else 2; at most the number of cores)",
    )
    group.add_argument(
        "--amp", choices=("no", "bf16"), help="bf16: network in bfloat16, boxes, matching and losses in float32 (no)"
    )
    group.add_argument("--start_epoch", type=at_least_zero(), help="first epoch where --resume holds weights only (0)")
    group.add_argument(
        "--save_every",
        type=positive(),
        metavar="EPOCHS",
        help="numbered checkpoints (random_query_patch and siamese 20, region_prior 5; fine-tuning DETR 100, "
        "Conditional DETR 10, Deformable DETR 5), and one before each rate drop that falls between epochs",
    )
    group.add_argument("--dist_url", help="where processes meet (env://)")
    _switch(
        group, "--reproduce_published", "the published behaviour where ours departs from it, see docs/differences.md"
    )


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--lr",
        type=positive(float),
        help="learning rate of transformer and heads (1e-4; Deformable DETR 2e-4, pre-trained with patches 1e-4)",
    )
    group.add_argument(
        "--lr_backbone",
        type=at_least_zero(float),
        help="of the backbone; 0 freezes it (1e-5, Deformable DETR 2e-5; random_query_patch as --lr, siamese 0)",
    )
    group.add_argument("--batch_size", type=positive(), help="images a process (2; region_prior 4)")
    group.add_argument("--weight_decay", type=at_least_zero(float), help="AdamW (1e-4)")
    _schedule(
        group, "--epochs", STEPS, "random_query_patch and siamese 60, else DETR 300, Conditional and Deformable DETR 50"
    )
    _schedule(
        group,
        "--lr_drop",
        (*STEPS, "lr_drop_epochs"),
        "rate x 0.1 after as many (random_query_patch and siamese 40, else DETR 200, others 40)",
        metavar="EPOCHS",
    )
    _schedule(
        group,
        "--lr_drop_epochs",
        (*STEPS, "lr_drop"),
        "rate x 0.1 at these, in place of --lr_drop",
        nargs="+",
        metavar="EPOCH",
    )
    _schedule(
        group,
        "--max_iters",
        EPOCHS,
        "length of training in place of --epochs; a longer one of a finished run begins a new epoch",
        metavar="STEPS",
    )
    _schedule(group, "--lr_drop_iters", EPOCHS, "rate x 0.1 after as many, with --max_iters", metavar="STEPS")
    group.add_argument(
        "--lr_backbone_names",
        nargs="+",
        metavar="PART",
        help="parameters with such a part in their name learn at --lr_backbone (backbone; Deformable DETR backbone.0)",
    )
    group.add_argument(
        "--lr_linear_proj_names",
        nargs="+",
        metavar="PART",
        help="and these at --lr x --lr_linear_proj_mult (Deformable DETR: reference_points sampling_offsets)",
    )
    group.add_argument(
        "--lr_linear_proj_mult", type=positive(float), help="(Deformable DETR 0.1; its pre-training with patches 1)"
    )
    _switch(group, "--sgd", "SGD with momentum 0.9 in place of AdamW")
    group.add_argument("--clip_max_norm", type=_finite, help="largest gradient norm; 0 or less: no clipping (0.1)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--detector", "--model", choices=tuple(DETECTORS), help="what is trained (detr)")
    group.add_argument("--backbone", help="resnet18, 34, 50, 101, or timm:NAME (resnet50)")
    group.add_argument(
        "--backbone_weights",
        "--load_backbone",
        metavar="swav|imagenet|none|PATH|URL",
        help="where its weights come from (main.py swav, finetune_main.py imagenet; nothing is fetched when a "
        "checkpoint holds them)",
    )
    group.add_argument(
        "--backbone_norm", choices=("frozen", "live"), help="batch norm (frozen; live where the weights are random)"
    )
    _switch(group, "--dilation", "stride 16 in the last stage (DC5)")
    group.add_argument(
        "--position_embedding",
        choices=("sine", "sine_shifted", "learned"),
        help="position code (sine; Deformable DETR and region_prior sine_shifted; siamese sine)",
    )
    group.add_argument("--enc_layers", type=positive(), help="(6)")
    group.add_argument("--dec_layers", type=positive(), help="(6)")
    group.add_argument("--dim_feedforward", type=positive(), help="(2048; Deformable DETR 1024)")
    group.add_argument("--hidden_dim", type=positive(), help="(256)")
    group.add_argument("--nheads", type=positive(), help="(8)")
    group.add_argument("--dropout", type=float, help="(0.1)")
    group.add_argument("--num_queries", type=positive(), help="DETR 100, Conditional and Deformable DETR 300")
    _switch(group, "--pre_norm", "layer norm before each block")
    group.add_argument(
        "--num_feature_levels",
        type=positive(),
        metavar="MAPS",
        help="maps that Deformable DETR reads: the backbone's last ones, up to three, then smaller ones (4)",
    )
    _switch(group, "--with_box_refine", "each layer of Deformable DETR's decoder refines the boxes of the one before")
    _switch(group, "--two_stage", "queries of Deformable DETR come from proposals of its encoder")
    group.add_argument(
        "--enc_n_points", type=positive(), help="points that a head reads of each map in Deformable DETR's encoder (4)"
    )
    group.add_argument("--dec_n_points", type=positive(), help="and in its decoder (4)")
    group.add_argument(
        "--ms_deform_attn",
        choices=("auto", "pytorch", "triton"),
        help="how Deformable DETR's attention is computed (auto: triton on a GPU, else pytorch)",
    )


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("matching and losses")
    group.add_argument(
        "--no_aux_loss", dest="aux_loss", action="store_false", default=None, help="no losses on earlier decoder layers"
    )
    group.add_argument(
        "--set_cost_class", type=at_least_zero(float), help="matching: class (1; Conditional and Deformable DETR 2)"
    )
    group.add_argument("--set_cost_bbox", type=at_least_zero(float), help="matching: L1 (5)")
    group.add_argument("--set_cost_giou", type=at_least_zero(float), help="matching: generalised IoU (2)")
    group.add_argument(
        "--cls_loss_coef", type=at_least_zero(float), help="loss: class (1; Conditional and Deformable DETR 2)"
    )
    group.add_argument("--bbox_loss_coef", type=at_least_zero(float), help="loss: L1 (5)")
    group.add_argument("--giou_loss_coef", type=at_least_zero(float), help="loss: generalised IoU (2)")
    group.add_argument("--eos_coef", type=positive(float), help="weight of `no object` in softmax classification (0.1)")
    group.add_argument("--focal_alpha", type=_finite, help="weight of positives in focal classification (0.25)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--coco_path", metavar="DIR", help="annotations/ beside train2017/ and val2017/, or beside images/train2017/"
    )
    group.add_argument(
        "--data_root",
        metavar="DIR",
        help="folder that holds MSCoco, pascal/VOCdevkit, airbus-ship-detection, used where no other place is "
        "given (data)",
    )
    group.add_argument(
        "--dataset_file",
        choices=tuple(DATASETS),
        help="kind of data; pre-training takes its images without labels; custom: see --train_images (coco)",
    )
    group.add_argument("--voc_path", metavar="DIR", help="VOCdevkit, with VOC2007 and VOC2012 in it")
    group.add_argument(
        "--voc_train",
        type=voc_set,
        nargs="+",
        metavar="SET",
        help="its lists to train on (2007_trainval 2012_trainval; voc_coco 2012_trainval)",
    )
    group.add_argument("--voc_val", type=voc_set, nargs="+", metavar="SET", help="and to evaluate on (2007_test)")
    group.add_argument("--airbus_path", metavar="DIR", help="train_v2/ beside train_ship_segmentations_v2.csv")
    group.add_argument(
        "--dataset",
        choices=tuple(DATASET_PLACES),
        help="DETReg's name for what lies in --data_root: ilsvrc, ilsvrc100, MSCoco, pascal, airbus-ship-detection",
    )
    group.add_argument(
        "--train_images", metavar="DIR", help="own data: the folder that the names in the annotations count from"
    )
    group.add_argument(
        "--image_size",
        type=positive(),
        metavar="PIXELS",
        help="short side at evaluation (800; pre-training 480); all published training sizes scale with it",
    )
    group.add_argument(
        "--max_size", type=positive(), metavar="PIXELS", help="longest side (1333; pre-training 600; scaled)"
    )


def add_pretext_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pretext")
    group.add_argument("--pretext", choices=tuple(PRETEXTS), help="what is learnt without labels (random_query_patch)")
    group.add_argument(
        "--imagenet_path",
        metavar="DIR",
        help="unlabelled images: any folder tree, a list of files, tar files or a pattern of them; else those of "
        "--dataset_file",
    )
    group.add_argument(
        "--proposals",
        type=proposal_name,
        metavar="NAME|file:PATH",
        help=f"where boxes come from: {', '.join(_proposal_names())}; see docs/proposals.md (random; region_prior "
        "selective_search, siamese edge_boxes)",
    )
    group.add_argument("--cache_path", metavar="DIR", help="take them from this store of tools/cache_proposals.py")
    group.add_argument(
        "--strategy",
        type=strategy_name,
        metavar="topk|random|mc",
        help="which boxes are taken: the first, any, or the first with more probability (topk)",
    )
    group.add_argument("--max_prop", type=positive(), help="and how many of an image at most; with mc on average (30)")
    group.add_argument(
        "--ss_resize",
        type=at_least_zero(),
        metavar="PIXELS",
        help="selective_search: side of the square that it sees; 0: the image as it is (128)",
    )
    group.add_argument(
        "--edge_model", metavar="FILE", help="edge_boxes: OpenCV's model.yml.gz; without one edges are plain gradients"
    )
    group.add_argument("--num_patches", type=positive(), help="query patches an image; must divide --num_queries (10)")
    group.add_argument(
        "--patch_size", type=positive(), metavar="PIXELS", help="side of a patch as the backbone sees it (128)"
    )
    group.add_argument("--mask_ratio", type=float, help="share of queries without their patch in training (0.1)")
    group.add_argument(
        "--feature_loss_coef",
        type=at_least_zero(float),
        help="loss: reconstruction (1; siamese 3, where 0 leaves region discrimination out)",
    )
    group.add_argument(
        "--global_loss_coef",
        type=at_least_zero(float),
        help="loss: global discrimination of siamese; 0 leaves it out (10)",
    )
    group.add_argument(
        "--box_disturbance",
        type=at_least_zero(float),
        metavar="SHARE",
        help="siamese: of its sides by which a corner of a query's box moves at most (0.1)",
    )
    group.add_argument("--view_iou", type=positive(float), help="siamese: overlap of the two views (0.5)")
    group.add_argument(
        "--no_view_shrink",
        dest="view_shrink",
        action="store_false",
        default=None,
        help="siamese: views overlap by exactly that, not by it or more",
    )
    group.add_argument(
        "--teacher_momentum",
        type=_finite,
        metavar="M",
        help="siamese: targets come from a moving average of the network, with this momentum at first (off; 0.99)",
    )
    _switch(group, "--feature_recon", "reconstruct the patches' features")
    _switch(group, "--fre_cnn", "freeze the backbone")
    _switch(group, "--query_shuffle", "assign queries to patches anew in each step")
    group.add_argument(
        "--num_classes",
        type=positive(),
        help="classes of the head (2; region_prior 91, whose class 1 is `object`; 1: objectness alone)",
    )
    _switch(
        group,
        "--eval",
        "with --resume: how well the model's boxes cover the objects of validation images of --dataset_file, whatever "
        "their class; and nothing else",
    )
    _switch(
        group,
        "--viz",
        "with --resume: proposals, the model's boxes and the true ones of some of those images in objects.png",
    )
    group.add_argument(
        "--eval_every",
        type=positive(),
        metavar="EPOCHS",
        help="the numbers of --eval in training, after as many epochs, and the last (never)",
    )
    _switch(group, "--object_embedding_loss", "region_prior: predict the embedding of each proposal's crop too")
    group.add_argument("--object_embedding_coef", type=at_least_zero(float), help="loss: object embedding (1)")
    group.add_argument(
        "--obj_embedding_head",
        choices=("intermediate", "head"),
        help="embedding: mean of the backbone's stage 2, or the output of SwAV's projection head (intermediate)",
    )


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fine-tuning and evaluation")
    group.add_argument(
        "--pretrain", metavar="PATH|URL", help="start from this checkpoint's weights, of a pretext or of a detector"
    )
    _switch(group, "--eval", "evaluate only")
    group.add_argument(
        "--eval_every", type=positive(), metavar="EPOCHS", help="evaluate after as many epochs, and the last (1)"
    )
    group.add_argument(
        "--train_annotations",
        metavar="FILE",
        help="own data: a COCO file, or a folder of VOC's XML; gives the classes too",
    )
    group.add_argument("--val_images", metavar="DIR", help="own data: images for evaluation")
    group.add_argument(
        "--val_annotations", metavar="FILE", help="own data: their annotations; classes are told by name"
    )
    group.add_argument(
        "--voc_metric", choices=("11point", "area"), help="which AP of VOC counts; both are written down (11point)"
    )
    group.add_argument(
        "--filter_pct", type=share, metavar="SHARE", help="train on this share of the images, drawn by --seed (-1: all)"
    )
    group.add_argument(
        "--split_file",
        metavar="FILE",
        help="train on the images of this file of tools/make_split.py, or of subset.json",
    )
    group.add_argument(
        "--few_shot",
        choices=("base", "novel", "all"),
        help="train on objects of these classes only, novel or all with --shots or --few_shot_file; evaluate base "
        "and novel",
    )
    group.add_argument(
        "--shots", type=positive(), metavar="K", help="few_shot: K objects of each class, drawn by --seed"
    )
    group.add_argument(
        "--few_shot_file",
        metavar="PATH",
        help="few_shot: the objects of a COCO file or subset.json, or with --shots of a published folder of such files",
    )
    group.add_argument(
        "--novel_classes", nargs="+", metavar="NAME", help="few_shot: which are novel (coco: the 20 that VOC has too)"
    )
    group.add_argument(
        "--novel_split", type=int, choices=(1, 2, 3), help="few_shot: novel classes of voc, by published number (1)"
    )
    group.add_argument(
        "--num_classes",
        type=positive(),
        help="largest category id + 1 (91; voc 20, airbus_ship 1; own data: as many as the file has)",
    )
    group.add_argument(
        "--classification", choices=("softmax", "focal"), help="DETR softmax, Conditional and Deformable DETR focal"
    )
    group.add_argument(
        "--coco_evaluator",
        choices=("auto", "hotcoco", "faster_coco_eval", "pycocotools"),
        help="auto: the fastest that is installed; the numbers are equal",
    )


def add_flags(parser: argparse.ArgumentParser, script: str) -> None:
    """Every flag of one entry script."""
    groups = [add_run_flags, add_optimizer_flags, add_model_flags, add_loss_flags, add_data_flags]
    groups.append(add_pretext_flags if script == PRETRAIN else add_finetune_flags)
    for add in groups:
        add(parser)
    for flag, (takes_value, why) in DEAD_FLAGS.items():
        nargs = None if takes_value else 0
        parser.add_argument(
            flag, action=_Refuse, why=why, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
