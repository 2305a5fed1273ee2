"""Every flag of both entry scripts: one row each. Parsers, help, checks and resolving are made from this table.

A row has the general default. The line of a dataset, a detector or a pretext in `util.settings.registry` may change it
(a pretext's change is stronger than a detector's, a detector's than a dataset's), and says which flags are read by it
alone. The help names all of these defaults by itself.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, PROPOSALS, names_of

PRETRAIN, FINETUNE = "main.py", "finetune_main.py"
SCRIPTS = (PRETRAIN, FINETUNE)
GROUPS = ("run", "optimization", "model", "matching and losses", "data", "pretext", "fine-tuning and evaluation")
RUN, OPTIMIZATION, MODEL, LOSSES, DATA, PRETEXT, FINETUNING = GROUPS


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    Attributes:
        name: without dashes. aliases: other spellings, with dashes.
        help: what it means, with its unit. The default is appended; default_help replaces the general one in words.
        type: converts a value's text and refuses bad ones; None: a switch. values: what can be chosen; a registry's
            names, as they are when the parser is made.
        default: general value; None: off for a switch, otherwise none, or decided by a rule in
            `util.settings.resolving`.
        off: spelling of the switch that turns it off; it then is on by default.
        several: whether it takes a list of values.
        session: belongs to this start of a run only; a resumed run does not adopt it from its checkpoint.
        data: says where data is or which part of it is used; not adopted by a run on another kind of dataset.
        counts: what a flag of the schedule counts, `epochs` or `steps`; replaces: flags that it makes void.
        published: means the same in checkpoints of the published codebases, and is adopted from them.
        needs: (flag with value, predicate of the settings) without which nothing reads it.
        interval: of its values, as "[0, 1)".
    """

    name: str
    help: str
    group: str
    scripts: tuple[str, ...] = SCRIPTS
    aliases: tuple[str, ...] = ()
    type: Callable[[str], Any] | None = None
    values: Collection[Any] | None = None
    default: Any = None
    default_help: str = ""
    metavar: str | None = None
    off: str = ""
    several: bool = False
    session: bool = False
    data: bool = False
    counts: str = ""
    replaces: tuple[str, ...] = ()
    published: bool = False
    needs: tuple[str, Callable[[Mapping[str, Any]], bool]] | None = None
    interval: str = ""

    @property
    def is_switch(self) -> bool:
        return self.type is None

    def general_default(self) -> Any:
        """A new list where it is one."""
        if self.is_switch:
            return bool(self.default)
        return list(self.default) if isinstance(self.default, list) else self.default

    def text(self) -> str:
        """The help with all defaults."""
        text = self.help.replace("{proposals}", names_of(PROPOSALS).replace("file:NAME", "file:PATH"))
        if self.is_switch:
            return text
        changed = _registry_defaults(self)
        general = self.default_help or _shown(self.default)
        parts = ([general] if general else []) + [f"{name}: {value}" for name, value in changed.items()]
        return f"{text} (default: {'; '.join(parts)})" if parts else text


def _registry_defaults(flag: Flag) -> dict[str, str]:
    """{names joined by commas: default} of the datasets, detectors and pretexts that change it."""
    registries: list[Mapping[str, Any]] = [DATASETS, DETECTORS]
    if PRETRAIN in flag.scripts:
        registries.append(PRETEXTS)
    by_value: dict[str, list[str]] = {}
    for registry in registries:
        for name, entry in registry.items():
            if entry.defaults.get(flag.name) is not None:
                by_value.setdefault(_shown(entry.defaults[flag.name]), []).append(name)
    general = _shown(flag.default)
    return {", ".join(names): value for value, names in by_value.items() if value != general or flag.default_help}


def _shown(value: Any) -> str:
    if value is None or value == "" or isinstance(value, bool):
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    # ------------------------------------------------------------------------------------------------------------- run
    Flag(
        name="output_dir",
        group=RUN,
        type=str,
        default="",
        metavar="DIR",
        session=True,
        help="folder for everything that this run writes; without it nothing is saved",
    ),
    Flag(
        name="resume",
        group=RUN,
        type=str,
        default="",
        metavar="PATH|URL|auto",
        session=True,
        help="resume a run from this checkpoint; auto: from checkpoint.pth in --output_dir, if it exists",
    ),
    Flag(
        name="overwrite",
        group=RUN,
        session=True,
        help="replace the files of another run in --output_dir",
    ),
    Flag(
        name="dry_run",
        group=RUN,
        session=True,
        help="check settings and data, try three steps, estimate time and memory, and stop",
    ),
    Flag(
        name="device",
        group=RUN,
        type=device,
        session=True,
        help="cuda, cuda:N or cpu",
        default_help="cuda if available",
    ),
    Flag(name="seed", group=RUN, type=int, default=42, help="random seed; the rank is added"),
    Flag(
        name="random_seed",
        group=RUN,
        help="draw a new random seed for this run; it is stored with the run",
    ),
    Flag(
        name="num_workers",
        group=RUN,
        type=at_least_zero(),
        default=2,
        session=True,
        help="dataloader workers per process; by default at most the number of cores",
    ),
    Flag(
        name="amp",
        group=RUN,
        type=str,
        values=("no", "bf16"),
        default="no",
        help="mixed precision; bf16: the network in bfloat16, boxes, matching and losses in float32",
    ),
    Flag(
        name="start_epoch",
        group=RUN,
        type=at_least_zero(),
        default=0,
        session=True,
        counts="epochs",
        help="first epoch, counted from 0, if --resume holds weights only",
    ),
    Flag(
        name="save_every",
        group=RUN,
        type=positive(),
        default=100,
        metavar="EPOCHS",
        help="epochs between numbered checkpoints; one more is saved before each learning rate drop",
    ),
    Flag(
        name="dist_url",
        group=RUN,
        type=str,
        default="env://",
        session=True,
        help="address at which the processes of a distributed run meet",
    ),
    Flag(
        name="reproduce_published",
        group=RUN,
        help="the published behaviour wherever this project departs from it, see docs/differences.md",
    ),
    # ---------------------------------------------------------------------------------------------------- optimization
    Flag(
        name="lr",
        group=OPTIMIZATION,
        type=positive(float),
        default=1e-4,
        published=True,
        help="learning rate of the transformer and the heads",
    ),
    Flag(
        name="lr_backbone",
        group=OPTIMIZATION,
        type=at_least_zero(float),
        default=1e-5,
        published=True,
        default_help="1e-05; random_query_patch: as --lr",
        help="learning rate of the backbone; 0 freezes it",
    ),
    Flag(name="batch_size", group=OPTIMIZATION, type=positive(), default=2, help="images per process (GPU)"),
    Flag(
        name="weight_decay",
        group=OPTIMIZATION,
        type=at_least_zero(float),
        default=1e-4,
        published=True,
        help="weight decay of AdamW",
    ),
    Flag(
        name="epochs",
        group=OPTIMIZATION,
        type=positive(),
        default=300,
        counts="epochs",
        replaces=_STEPS,
        published=True,
        help="length of the training",
    ),
    Flag(
        name="lr_drop",
        group=OPTIMIZATION,
        type=positive(),
        default=200,
        metavar="EPOCHS",
        counts="epochs",
        replaces=(*_STEPS, "lr_drop_epochs"),
        published=True,
        help="divide the learning rate by 10 every so many epochs",
    ),
    Flag(
        name="lr_drop_epochs",
        group=OPTIMIZATION,
        type=positive(),
        several=True,
        metavar="EPOCH",
        counts="epochs",
        replaces=(*_STEPS, "lr_drop"),
        help="divide the learning rate by 10 after each of these epochs, instead of --lr_drop",
    ),
    Flag(
        name="max_iters",
        group=OPTIMIZATION,
        type=positive(),
        metavar="STEPS",
        counts="steps",
        replaces=_EPOCHS,
        help="length of the training in steps, instead of --epochs; a longer one of a finished run starts a new epoch",
    ),
    Flag(
        name="lr_drop_iters",
        group=OPTIMIZATION,
        type=positive(),
        metavar="STEPS",
        counts="steps",
        replaces=_EPOCHS,
        help="divide the learning rate by 10 every so many steps, with --max_iters",
    ),
    Flag(
        name="lr_backbone_names",
        group=OPTIMIZATION,
        type=str,
        several=True,
        default=["backbone"],
        metavar="PART",
        help="parameters whose name contains one of these are trained with --lr_backbone",
    ),
    Flag(
        name="lr_linear_proj_names",
        group=OPTIMIZATION,
        type=str,
        several=True,
        default=[],
        metavar="PART",
        help="parameters whose name contains one of these are trained with --lr times --lr_linear_proj_mult",
    ),
    Flag(
        name="lr_linear_proj_mult",
        group=OPTIMIZATION,
        type=positive(float),
        default=0.1,
        needs=("--lr_linear_proj_names", lambda settings: bool(settings["lr_linear_proj_names"])),
        help="factor of the learning rate for --lr_linear_proj_names",
    ),
    Flag(name="sgd", group=OPTIMIZATION, help="SGD with momentum 0.9 instead of AdamW"),
    Flag(
        name="clip_max_norm",
        group=OPTIMIZATION,
        type=finite,
        default=0.1,
        published=True,
        help="clip gradients to this norm; 0 or less: no clipping",
    ),
    # ----------------------------------------------------------------------------------------------------------- model
    Flag(
        name="detector",
        group=MODEL,
        aliases=("--model",),
        type=str,
        values=DETECTORS,
        default="detr",
        help="the detector to train",
    ),
    Flag(
        name="backbone",
        group=MODEL,
        type=str,
        default="resnet50",
        help="resnet18, resnet34, resnet50, resnet101 or timm:NAME",
    ),
    Flag(
        name="backbone_weights",
        group=MODEL,
        aliases=("--load_backbone",),
        type=str,
        metavar="swav|imagenet|none|PATH|URL",
        session=True,
        default_help="main.py: swav for resnet50, else imagenet; finetune_main.py: imagenet; with a checkpoint: none",
        help="pre-trained weights of the backbone",
    ),
    Flag(
        name="backbone_norm",
        group=MODEL,
        type=str,
        values=("frozen", "live"),
        default_help="frozen; live if the weights are random",
        help="batch norm of the backbone",
    ),
    Flag(name="dilation", group=MODEL, help="stride 16 in the last stage of the backbone (DC5)"),
    Flag(
        name="position_embedding",
        group=MODEL,
        type=str,
        values=("sine", "sine_shifted", "learned"),
        default="sine",
        help="positional encoding; sine_shifted: sine at the centers of the cells",
    ),
    Flag(name="enc_layers", group=MODEL, type=positive(), default=6, help="encoder layers"),
    Flag(name="dec_layers", group=MODEL, type=positive(), default=6, help="decoder layers"),
    Flag(
        name="dim_feedforward",
        group=MODEL,
        type=positive(),
        default=2048,
        help="width of the feed-forward networks in the transformer",
    ),
    Flag(name="hidden_dim", group=MODEL, type=positive(), default=256, help="width of the transformer"),
    Flag(name="nheads", group=MODEL, type=positive(), default=8, help="attention heads"),
    Flag(name="dropout", group=MODEL, type=float, default=0.1, interval="[0, 1)", help="dropout in the transformer"),
    Flag(name="num_queries", group=MODEL, type=positive(), default=100, help="object queries"),
    Flag(name="pre_norm", group=MODEL, help="layer norm before each block, not after it"),
    Flag(
        name="num_feature_levels",
        group=MODEL,
        type=positive(),
        default=1,
        metavar="LEVELS",
        help="feature levels that Deformable DETR reads: up to three of the backbone, then strided convolutions",
    ),
    Flag(
        name="with_box_refine",
        group=MODEL,
        help="iterative box refinement in the decoder of Deformable DETR",
    ),
    Flag(
        name="two_stage",
        group=MODEL,
        help="queries of Deformable DETR come from proposals of its encoder",
    ),
    Flag(
        name="enc_n_points",
        group=MODEL,
        type=positive(),
        default=4,
        help="sampling points per head and level in the encoder of Deformable DETR",
    ),
    Flag(
        name="dec_n_points",
        group=MODEL,
        type=positive(),
        default=4,
        help="sampling points per head and level in the decoder of Deformable DETR",
    ),
    Flag(
        name="ms_deform_attn",
        group=MODEL,
        type=str,
        values=("auto", "pytorch", "triton"),
        default="auto",
        session=True,
        help="implementation of deformable attention; auto: triton on a GPU, else pytorch",
    ),
    # --------------------------------------------------------------------------------------------- matching and losses
    Flag(
        name="aux_loss",
        group=LOSSES,
        off="--no_aux_loss",
        default=True,
        help="no auxiliary losses on the earlier decoder layers",
    ),
    Flag(
        name="set_cost_class",
        group=LOSSES,
        type=at_least_zero(float),
        default=1.0,
        help="matching: weight of the class cost",
    ),
    Flag(
        name="set_cost_bbox",
        group=LOSSES,
        type=at_least_zero(float),
        default=5.0,
        help="matching: weight of the L1 box cost",
    ),
    Flag(
        name="set_cost_giou",
        group=LOSSES,
        type=at_least_zero(float),
        default=2.0,
        help="matching: weight of the generalized IoU cost",
    ),
    Flag(
        name="cls_loss_coef",
        group=LOSSES,
        type=at_least_zero(float),
        default=1.0,
        help="weight of the classification loss",
    ),
    Flag(name="bbox_loss_coef", group=LOSSES, type=at_least_zero(float), default=5.0, help="weight of the L1 box loss"),
    Flag(
        name="giou_loss_coef",
        group=LOSSES,
        type=at_least_zero(float),
        default=2.0,
        help="weight of the generalized IoU loss",
    ),
    Flag(
        name="eos_coef",
        group=LOSSES,
        type=positive(float),
        default=0.1,
        needs=("--classification softmax", lambda settings: settings["classification"] == "softmax"),
        help="weight of the class `no object` in softmax classification",
    ),
    Flag(
        name="focal_alpha",
        group=LOSSES,
        type=finite,
        default=0.25,
        needs=("--classification focal", lambda settings: settings["classification"] == "focal"),
        help="weight of positives in the focal loss",
    ),
    # ------------------------------------------------------------------------------------------------------------ data
    Flag(
        name="coco_path",
        group=DATA,
        type=str,
        metavar="DIR",
        data=True,
        help="COCO: annotations/ beside train2017/ and val2017/, or beside images/train2017/",
    ),
    Flag(
        name="data_root",
        group=DATA,
        type=str,
        default="data",
        metavar="DIR",
        data=True,
        help="folder with MSCoco, pascal/VOCdevkit and airbus-ship-detection, used if no other path is given",
    ),
    Flag(
        name="dataset_file",
        group=DATA,
        type=str,
        values=DATASETS,
        default="coco",
        help="kind of dataset; pre-training takes its images without labels; custom: see --train_images",
    ),
    Flag(
        name="voc_path",
        group=DATA,
        type=str,
        metavar="DIR",
        data=True,
        help="VOCdevkit, with VOC2007 and VOC2012 in it",
    ),
    Flag(
        name="voc_train",
        group=DATA,
        type=voc_set,
        several=True,
        default=["2007_trainval", "2012_trainval"],
        metavar="SET",
        data=True,
        help="VOC: image sets to train on",
    ),
    Flag(
        name="voc_val",
        group=DATA,
        type=voc_set,
        several=True,
        default=["2007_test"],
        metavar="SET",
        data=True,
        help="VOC: image sets to evaluate on",
    ),
    Flag(
        name="airbus_path",
        group=DATA,
        type=str,
        metavar="DIR",
        data=True,
        help="Airbus Ship: train_v2/ beside train_ship_segmentations_v2.csv",
    ),
    Flag(
        name="dataset",
        group=DATA,
        type=str,
        values=tuple(DATASET_PLACES),
        data=True,
        help="DETReg's name for a dataset in --data_root: ilsvrc, ilsvrc100, MSCoco, pascal, airbus-ship-detection",
    ),
    Flag(
        name="train_images",
        group=DATA,
        type=str,
        metavar="DIR",
        data=True,
        help="custom dataset: training images; file names in the annotations are relative to this folder",
    ),
    Flag(
        name="image_size",
        group=DATA,
        type=positive(),
        default=800,
        metavar="PIXELS",
        help="short side at evaluation; all published training sizes scale with it",
    ),
    Flag(
        name="max_size",
        group=DATA,
        type=positive(),
        metavar="PIXELS",
        default_help="1333, pre-training 600; scaled with --image_size",
        help="longest side",
    ),
    # --------------------------------------------------------------------------------------------------------- pretext
    Flag(
        name="pretext",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=str,
        values=PRETEXTS,
        default_help="random_query_patch",
        help="the pretext task: what is learnt without labels",
    ),
    Flag(
        name="imagenet_path",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=str,
        metavar="DIR",
        default_help="the images of --dataset_file",
        help="unlabelled images: any folder tree, a list of files, tar files or a pattern of them",
    ),
    Flag(
        name="proposals",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=proposal_method,
        default="random",
        metavar="NAME|file:PATH",
        help="proposal method: {proposals}; see docs/proposals.md",
    ),
    Flag(
        name="cache_path",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=str,
        default="",
        metavar="DIR",
        help="take proposals from this cache of tools/cache_proposals.py",
    ),
    Flag(
        name="strategy",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=strategy,
        default="topk",
        metavar="topk|random|mc",
        help="which proposals are used: the first ones, random ones, or earlier ones with higher probability",
    ),
    Flag(
        name="max_prop",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(),
        default=30,
        help="proposals per image at most; with mc on average",
    ),
    Flag(
        name="ss_resize",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=at_least_zero(),
        default=128,
        metavar="PIXELS",
        help="selective_search: images are resized to a square of this side; 0: not resized",
    ),
    Flag(
        name="edge_model",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=str,
        default="",
        metavar="FILE",
        help="edge_boxes: OpenCV's model.yml.gz; without it edges are image gradients",
    ),
    Flag(
        name="num_patches",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(),
        default=10,
        help="query patches per image; must divide --num_queries",
    ),
    Flag(
        name="patch_size",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(),
        default=128,
        metavar="PIXELS",
        help="side of a query patch",
    ),
    Flag(
        name="mask_ratio",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=float,
        default=0.1,
        interval="[0, 1)",
        help="random_query_patch: fraction of queries that are not given their patch in training",
    ),
    Flag(
        name="feature_loss_coef",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=at_least_zero(float),
        default=1.0,
        needs=(
            "--feature_recon",
            lambda settings: settings["pretext"] != "random_query_patch" or bool(settings["feature_recon"]),
        ),
        help="weight of the feature reconstruction loss; siamese: of region discrimination, 0 switches it off",
    ),
    Flag(
        name="global_loss_coef",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=at_least_zero(float),
        default=10.0,
        help="siamese: weight of global discrimination; 0 switches it off",
    ),
    Flag(
        name="box_disturbance",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=at_least_zero(float),
        default=0.1,
        metavar="FRACTION",
        interval="[0, 0.5)",
        help="siamese: the corners of a query's box move by up to this fraction of its sides",
    ),
    Flag(
        name="view_iou",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(float),
        default=0.5,
        interval="(0, 1)",
        help="siamese: IoU of the two views",
    ),
    Flag(
        name="view_shrink",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        off="--no_view_shrink",
        default=True,
        help="siamese: views overlap by exactly --view_iou, not by at least as much",
    ),
    Flag(
        name="teacher_momentum",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=finite,
        metavar="M",
        interval="[0, 1]",
        default_help="off; 0.99 is a good value",
        help="siamese: targets come from a moving average of the network with this initial momentum",
    ),
    Flag(
        name="feature_recon",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        help="random_query_patch: reconstruct the features of the patches",
    ),
    Flag(name="fre_cnn", group=PRETEXT, scripts=(PRETRAIN,), help="freeze the backbone"),
    Flag(
        name="query_shuffle",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        help="random_query_patch: assign queries to patches at random in each step",
    ),
    Flag(
        name="num_classes",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(),
        default=91,
        help="classes of the head; region_prior: class 1 is `object`, and 1 class means objectness alone",
    ),
    Flag(
        name="eval",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        session=True,
        help="with --resume: class-agnostic AP and AR on the validation images of --dataset_file, and stop",
    ),
    Flag(
        name="viz",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        session=True,
        help="with --resume: draw proposals, predicted and ground-truth boxes of some of those images in objects.png",
    ),
    Flag(
        name="eval_every",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=positive(),
        default=0,
        default_help="never",
        metavar="EPOCHS",
        help="the metrics of --eval during training, every so many epochs and after the last one",
    ),
    Flag(
        name="object_embedding_loss",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        help="region_prior: also predict an embedding of each proposal's crop",
    ),
    Flag(
        name="object_embedding_coef",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=at_least_zero(float),
        default=1.0,
        needs=("--object_embedding_loss", _object_embedding),
        help="weight of the object embedding loss",
    ),
    Flag(
        name="obj_embedding_head",
        group=PRETEXT,
        scripts=(PRETRAIN,),
        type=str,
        values=("intermediate", "head"),
        default="intermediate",
        needs=("--object_embedding_loss", _object_embedding),
        help="target embedding: mean of the backbone's stage 2, or the output of SwAV's projection head",
    ),
    # -------------------------------------------------------------------------------------- fine-tuning and evaluation
    Flag(
        name="pretrain",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        default="",
        metavar="PATH|URL",
        session=True,
        help="start from the weights of this checkpoint, of a pretext or of a detector",
    ),
    Flag(name="eval", group=FINETUNING, scripts=(FINETUNE,), session=True, help="evaluate only"),
    Flag(
        name="eval_every",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=positive(),
        default=1,
        metavar="EPOCHS",
        help="evaluate every so many epochs and after the last one",
    ),
    Flag(
        name="train_annotations",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        metavar="FILE",
        data=True,
        help="custom dataset: a COCO file or a folder of VOC's XML; it defines the classes",
    ),
    Flag(
        name="val_images",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        metavar="DIR",
        data=True,
        help="custom dataset: validation images",
    ),
    Flag(
        name="val_annotations",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        metavar="FILE",
        data=True,
        help="custom dataset: annotations of the validation images; classes are matched by name",
    ),
    Flag(
        name="voc_metric",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        values=("11point", "area"),
        default="11point",
        data=True,
        help="which AP of VOC is reported as AP; both are saved",
    ),
    Flag(
        name="filter_pct",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=fraction,
        default=-1.0,
        default_help="all",
        metavar="FRACTION",
        data=True,
        help="train on this fraction of the images, drawn by --seed",
    ),
    Flag(
        name="split_file",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        metavar="FILE",
        data=True,
        help="train on the images of this file of tools/make_split.py, or of a run's subset.json",
    ),
    Flag(
        name="few_shot",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        values=("base", "novel", "all"),
        data=True,
        help="train on objects of these classes only; novel and all with --shots or --few_shot_file; evaluate base and "
        "novel classes",
    ),
    Flag(
        name="shots",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=positive(),
        metavar="K",
        data=True,
        help="few_shot: K objects of each class, drawn by --seed",
    ),
    Flag(
        name="few_shot_file",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        metavar="PATH",
        data=True,
        help="few_shot: the objects of a COCO file or subset.json, or with --shots of a published folder of such files",
    ),
    Flag(
        name="novel_classes",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        several=True,
        metavar="NAME",
        data=True,
        default_help="coco: the 20 classes of VOC",
        help="few_shot: the novel classes",
    ),
    Flag(
        name="novel_split",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=int,
        values=(1, 2, 3),
        default=1,
        data=True,
        help="few_shot: number of the published list of novel classes of VOC",
    ),
    Flag(
        name="num_classes",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=positive(),
        default=91,
        default_help="91; voc 20; airbus_ship 1; custom: the number of classes in the annotations",
        help="largest category id + 1",
    ),
    Flag(
        name="classification",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        values=("softmax", "focal"),
        default="softmax",
        help="classification loss of the detector",
    ),
    Flag(
        name="coco_evaluator",
        group=FINETUNING,
        scripts=(FINETUNE,),
        type=str,
        values=("auto", "hotcoco", "pycocotools"),
        default="auto",
        help="implementation of COCO's metrics, with equal results; auto: hotcoco if installed, else pycocotools",
    ),
)

# Flags of the published codebases that have no effect, here or there: flag -> (takes a value, why it is refused).
REFUSED_FLAGS: dict[str, tuple[bool, str]] = {
    "--remove_difficult": (False, "the published code never reads it"),
    "--world_size": (True, "the launcher says how many processes there are: torchrun --nproc_per_node N"),
    "--mask_loss_coef": (True, "this version predicts boxes only, so there is no mask loss"),
    "--dice_loss_coef": (True, "this version predicts boxes only, so there is no mask loss"),
    "--masks": (False, "this version predicts boxes only; train and evaluate without it"),
    "--frozen_weights": (True, "it trains a mask head on a frozen detector, and this version predicts boxes only"),
    "--coco_panoptic_path": (True, "this version predicts boxes only; train and evaluate without it"),
    "--position_embedding_scale": (True, "the published code never reads it: the scale is 2 pi"),
    "--filter_num": (True, "the published code never reads it"),
    "--reset_embedding_layer": (True, "the published code never reads it"),
    "--cache_mode": (False, "image files are not kept in memory; the operating system caches what was read"),
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
