"""Every flag of both entry scripts: one `Flag` per row.

Parsers, help, defaults and checks are built from this table.

A row has the general default. A dataset, detector or pretext may change it in its entry of `util.settings.registry`;
the pretext's default wins over the detector's, and the detector's over the dataset's. The entries also list the flags
that only they read. `--help` shows all of this.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from util.settings.flag import FINETUNE, PRETRAIN, SCRIPTS, Flag, flags_in
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS
from util.settings.value_types import (
    batch_size,
    device,
    finite,
    fraction,
    non_negative,
    positive,
    proposal_method,
    strategy,
    voc_image_set,
)

# Headings of `--help`, in its order.
GROUPS = (
    "run",
    "data",
    "training with fewer labels",
    "pretext task",
    "proposals",
    "model",
    "matching and losses",
    "optimization",
    "evaluation",
)
RUN, DATA, FEWER_LABELS, PRETEXT, PROPOSALS, MODEL, LOSSES, OPTIMIZATION, EVALUATION = GROUPS

# A schedule counts epochs or steps. Flags of one kind reset those of the other.
_EPOCH_FLAGS = ("epochs", "lr_drop", "lr_drop_epochs")
_STEP_FLAGS = ("max_iters", "lr_drop_iters")

# DETReg's dataset names -> (flag, folder below --data_root) that mean the same.
DATASET_PATHS = {
    "imagenet": ("imagenet_path", "ilsvrc/train"),
    "imagenet100": ("imagenet_path", "ilsvrc100/train"),
    "coco_pretrain": ("coco_path", "MSCoco"),
    "coco": ("coco_path", "MSCoco"),
    "voc": ("voc_path", "pascal/VOCdevkit"),
    "airbus": ("airbus_path", "airbus-ship-detection"),
    "airbus_pretrain": ("imagenet_path", "airbus-ship-detection/train_v2"),
}


def _predicts_embeddings(settings: Mapping[str, Any]) -> bool:
    return bool(settings["object_embedding_loss"])


def _reconstructs_features(settings: Mapping[str, Any]) -> bool:
    # Siamese DETR's region discrimination uses the same weight and has no switch.
    return settings["pretext"] != "random_query_patch" or bool(settings["feature_recon"])


FLAGS: tuple[Flag, ...] = (
    # ------------------------------------------------------------------------------------------------------ run
    *flags_in(
        RUN,
        SCRIPTS,
        Flag(
            "output_dir",
            "folder for the checkpoints, log and pages of this run",
            str,
            default="",
            default_help="not set, nothing is saved",
            metavar="DIR",
            aliases=("--output_path",),  # in a command of DETR's README
            per_launch=True,
        ),
        Flag(
            "resume",
            "checkpoint to resume or, with --eval, to evaluate; auto: the newest one in --output_dir, if it has any",
            str,
            default="",
            metavar="PATH|URL|auto",
            per_launch=True,
        ),
    ),
    *flags_in(
        RUN,
        (FINETUNE,),
        Flag(
            "pretrain",
            "checkpoint to start from, pre-trained on a pretext task or trained with labels",
            str,
            default="",
            metavar="PATH|URL",
            per_launch=True,
        ),
        Flag(
            "frozen_weights",
            "checkpoint of a detector that stays frozen while its mask head trains",
            str,
            metavar="PATH|URL",
            aliases=("--frozen_weigths",),  # as DETR's README spells it
            requires=("--masks", lambda settings: settings["masks"]),
        ),
    ),
    *flags_in(
        RUN,
        SCRIPTS,
        Flag("overwrite", "replace the files of an earlier run in --output_dir", per_launch=True),
        Flag(
            "dry_run",
            "check settings and data, run three training steps, estimate time and memory, and stop",
            per_launch=True,
        ),
        Flag(
            "device",
            "device to run on",
            device,
            default_help="cuda if available, else cpu",
            metavar="cuda|cuda:N|cpu",
            per_launch=True,
        ),
        Flag("seed", "random seed; each process adds its rank", int, default=42, metavar="INT"),
        Flag("random_seed", "draw a new seed instead of --seed; it is saved with the run"),
        Flag(
            "num_workers",
            "number of dataloader workers per process; by default at most the number of CPU cores",
            non_negative(),
            default=2,
            metavar="N",
            per_launch=True,
        ),
        Flag(
            "amp",
            "mixed precision; bf16 runs the network in bfloat16, fp16 in float16 with scaled losses, for GPUs without "
            "bfloat16; boxes, matching and losses are float32",
            str,
            choices=("no", "bf16", "fp16"),
            default="no",
        ),
        Flag(
            "compile",
            "compile backbone, encoder and decoder with torch.compile; the first steps then take minutes",
            per_launch=True,
        ),
        Flag(
            "activation_checkpoint",
            "save memory: compute activations of encoder and backbone again in the backward pass; steps are slower",
        ),
        Flag(
            "bucket_aspect",
            "batches of images of similar size after their augmentation, padded to multiples of 64 pixels, 32 in "
            "pre-training: less padding and fewer distinct shapes. The samples of an epoch stay the same, their order "
            "does not. Evaluation has batches of images of equal size, without padding: the detections of an image "
            "are those that it has alone",
        ),
        Flag(
            "tf32",
            "on NVIDIA GPUs, compute float32 convolutions and matrix products in TF32, with 10 bits of mantissa",
            str,
            choices=("yes", "no"),
            default_help="PyTorch's: convolutions only",
        ),
        Flag(
            "start_epoch",
            "first epoch, counted from 0, when --resume has only weights",
            non_negative(),
            default=0,
            metavar="EPOCH",
            schedule_unit="epochs",
            per_launch=True,
        ),
        Flag(
            "save_every",
            "number of epochs between numbered checkpoints; one more is saved before each learning rate drop",
            positive(),
            default=100,
            metavar="EPOCHS",
        ),
        Flag(
            "save_every_steps",
            "also save within an epoch, after every this many optimizer steps, to checkpoint_step_NNN.pth; it is "
            "written in the background",
            positive(),
            default_help="never",
            metavar="STEPS",
            requires=("--output_dir", lambda settings: bool(settings["output_dir"])),
        ),
        Flag(
            "save_every_minutes",
            "also save within an epoch when this many minutes have passed since the last checkpoint",
            positive(float),
            default_help="never",
            metavar="MINUTES",
            requires=("--output_dir", lambda settings: bool(settings["output_dir"])),
        ),
        Flag(
            "keep_last",
            "number of checkpoint_step_NNN.pth to keep, the newest ones",
            positive(),
            default=2,
            metavar="N",
            requires=(
                "--save_every_steps or --save_every_minutes",
                lambda settings: bool(
                    settings["save_every_steps"] or settings["save_every_minutes"]
                ),
            ),
        ),
        Flag(
            "stop_after_minutes",
            "stop after this many minutes of training and evaluation as after SIGTERM: save, with exit status 143",
            positive(float),
            default_help="never",
            metavar="MINUTES",
            per_launch=True,
        ),
        Flag(
            "max_nonfinite",
            "a step whose loss or gradient is NaN or infinite is skipped; after this many in a row the run saves and "
            "ends with an error",
            positive(),
            default=10,
            metavar="STEPS",
        ),
        Flag(
            "log_every",
            "also write losses, learning rate and images per second to log_steps.txt every N batches of an epoch",
            positive(),
            default_help="never",
            metavar="N",
        ),
        Flag(
            "tensorboard",
            "also write the values of log.txt and log_steps.txt for TensorBoard, to tensorboard/ in --output_dir",
            per_launch=True,
            requires=("--output_dir", lambda settings: bool(settings["output_dir"])),
        ),
        Flag(
            "wandb",
            "also send the values of log.txt and log_steps.txt to Weights & Biases; WANDB_MODE, WANDB_PROJECT, "
            "WANDB_ENTITY and WANDB_NAME are W&B's own settings",
            per_launch=True,
            requires=("--output_dir", lambda settings: bool(settings["output_dir"])),
        ),
        Flag(
            "profile",
            "profile this many training steps after a warm-up; trace and table are written to profile/ in --output_dir",
            positive(),
            default_help="none",
            metavar="STEPS",
            per_launch=True,
            requires=("--output_dir", lambda settings: bool(settings["output_dir"])),
        ),
        Flag(
            "dist_url",
            "URL at which distributed processes find each other, the init_method of torch.distributed",
            str,
            default="env://",
            metavar="URL",
            per_launch=True,
        ),
        Flag(
            "dist_timeout_minutes",
            "minutes that a process waits for the others in a collective before it ends with an error; evaluation and "
            "the checks of the data keep the others waiting for rank 0",
            positive(float),
            default=120.0,
            metavar="MINUTES",
            per_launch=True,
        ),
        Flag(
            "reproduce_published",
            "behave like the published code where this project departs from it; see docs/differences.md",
        ),
    ),
    # ----------------------------------------------------------------------------------------------------- data
    *flags_in(
        DATA,
        (PRETRAIN,),
        Flag(
            "imagenet_path",
            "unlabelled images: a folder tree, a text file of paths, tar files or a quoted pattern of tar files",
            str,
            default_help="the images of --dataset_file",
            metavar="PATH",
        ),
    ),
    *flags_in(
        DATA,
        SCRIPTS,
        Flag(
            "dataset_file",
            "type of dataset; main.py uses its images without labels; custom: see --train_images",
            str,
            choices=DATASETS,
            default="coco",
        ),
        Flag(
            "coco_path",
            "COCO folder: annotations/ next to train2017/ and val2017/, or next to images/train2017/",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "coco_panoptic_path",
            "COCO panoptic folder: annotations/, panoptic_train2017/ and panoptic_val2017/; images are in --coco_path",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "voc_path",
            "VOCdevkit folder with VOC2007/ and VOC2012/",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "voc_train",
            "image sets to train on, year and list, such as 2012_trainval",
            voc_image_set,
            default=["2007_trainval", "2012_trainval"],
            metavar="SET",
            multiple=True,
            data_specific=True,
        ),
        Flag(
            "voc_val",
            "image sets to evaluate on, year and list",
            voc_image_set,
            default=["2007_test"],
            metavar="SET",
            multiple=True,
            data_specific=True,
        ),
        Flag(
            "airbus_path",
            "Airbus Ship folder: train_v2/ next to train_ship_segmentations_v2.csv",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "data_root",
            "folder with MSCoco/, pascal/VOCdevkit/ and airbus-ship-detection/, used if no other path is given",
            str,
            default="data",
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "dataset",
            "DETReg's name of a dataset below --data_root; sets --dataset_file and its path, and in main.py --pretext "
            "region_prior and --detector deformable_detr, unless given",
            str,
            choices=tuple(DATASET_PATHS),
            data_specific=True,
        ),
        Flag(
            "train_images",
            "custom dataset: training images; annotations name files relative to this folder",
            str,
            metavar="DIR",
            data_specific=True,
        ),
    ),
    *flags_in(
        DATA,
        (FINETUNE,),
        Flag(
            "root_path",
            "Siamese DETR's name of the dataset's folder; with --dataset_file voc it means voc_coco",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "train_annotations",
            "custom dataset: COCO file, or folder of VOC XML files; defines the classes",
            str,
            metavar="FILE|DIR",
            data_specific=True,
        ),
        Flag(
            "val_images",
            "custom dataset: validation images",
            str,
            metavar="DIR",
            data_specific=True,
        ),
        Flag(
            "val_annotations",
            "custom dataset: annotations of the validation images; classes are matched by name",
            str,
            metavar="FILE|DIR",
            data_specific=True,
        ),
    ),
    *flags_in(
        DATA,
        SCRIPTS,
        Flag(
            "image_size",
            "short side of images at evaluation, in pixels; training sizes scale with it",
            positive(),
            default=800,
            default_help={PRETRAIN: "480", FINETUNE: "800"},
            metavar="PIXELS",
        ),
        Flag(
            "max_size",
            "maximum long side of images, in pixels",
            positive(),
            default_help={
                PRETRAIN: "600 at --image_size 480, scaled with it",
                FINETUNE: "1333, scaled with --image_size",
            },
            metavar="PIXELS",
        ),
    ),
    *flags_in(
        DATA,
        SCRIPTS,
        Flag(
            "exif",
            "EXIF orientation of images: apply it, if boxes are as viewers show the images, or ignore it",
            str,
            choices=("ignore", "apply"),
            default_help="ignore, except for images whose rotated size is the one in the annotations",
            data_specific=True,
        ),
    ),
    # ---------------------------------------------------------------------------------------------- fewer labels
    *flags_in(
        FEWER_LABELS,
        (FINETUNE,),
        Flag(
            "filter_pct",
            "fraction of the training images to use, above 0 and at most 1, drawn by --seed",
            fraction,
            default=-1.0,  # DETReg's "all"
            default_help="all images",
            metavar="FRACTION",
            data_specific=True,
        ),
        Flag(
            "split_file",
            "train on the images in this file, from tools/make_split.py or a run's subset.json",
            str,
            default_help="all images",
            metavar="FILE",
            data_specific=True,
        ),
        Flag(
            "few_shot",
            "few-shot stage: train on all objects of base classes, or on --shots or --few_shot_file of novel or all "
            "classes; AP is reported for base and novel classes",
            str,
            choices=("base", "novel", "all"),
            data_specific=True,
        ),
        Flag(
            "shots",
            "few-shot: number of objects per class, drawn by --seed",
            positive(),
            metavar="K",
            data_specific=True,
        ),
        Flag(
            "few_shot_file",
            "few-shot: objects to train on, a COCO file or subset.json; with --shots, a folder of published files",
            str,
            metavar="PATH",
            data_specific=True,
        ),
        Flag(
            "novel_classes",
            "few-shot: names of the novel classes",
            str,
            default_help="coco: the 20 classes of VOC; voc, voc_coco: by --novel_split",
            metavar="NAME",
            multiple=True,
            data_specific=True,
        ),
        Flag(
            "novel_split",
            "few-shot: number of the published split of VOC's classes into base and novel",
            int,
            choices=(1, 2, 3),
            default=1,
            data_specific=True,
        ),
    ),
    # --------------------------------------------------------------------------------------------------- pretext
    *flags_in(
        PRETEXT,
        (PRETRAIN,),
        Flag(
            "pretext",
            "pretext task to pre-train on",
            str,
            choices=PRETEXTS,
            default_help="random_query_patch",
        ),
        Flag(
            "num_patches",
            "number of query patches per image; divides --num_queries",
            positive(),
            default=10,
            metavar="N",
        ),
        Flag(
            "patch_size",
            "side of the query patches, or of the crops of --object_embedding_loss, in pixels",
            positive(),
            default=128,
            metavar="PIXELS",
        ),
        Flag(
            "mask_ratio",
            "fraction of the queries that get no patch features in training",
            float,
            default=0.1,
            metavar="FRACTION",
            value_range="[0, 1)",
        ),
        Flag("query_shuffle", "assign queries to patches at random in each step"),
        Flag("feature_recon", "add a loss that reconstructs the patch features"),
        Flag(
            "feature_loss_coef",
            "weight of the feature reconstruction loss; for siamese of region discrimination, where 0 removes it",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
            requires=("--feature_recon", _reconstructs_features),
        ),
        Flag(
            "device_augment",
            "augment the colors of query patches and views on the device, a batch at once, instead of in the "
            "dataloader workers",
            per_launch=True,
        ),
        Flag(
            "reduced_decode",
            "decode large JPEG files at 1/2, 1/4 or 1/8 of their size where image and patches are resized to less than "
            "that; pixels differ a little",
        ),
        Flag("fre_cnn", "freeze the backbone, as --lr_backbone 0 does"),
        Flag(
            "view_iou",
            "IoU of the two views of an image: the minimum, or exact with --no_view_shrink",
            positive(float),
            default=0.5,
            metavar="IOU",
            value_range="(0, 1)",
        ),
        Flag(
            "view_shrink",
            "make the IoU of the two views exactly --view_iou, not at least that",
            default=True,
            off_switch="--no_view_shrink",
        ),
        Flag(
            "box_disturbance",
            "maximum shift of the corners of a query's box, as a fraction of its sides",
            non_negative(float),
            default=0.1,
            metavar="FRACTION",
            value_range="[0, 0.5)",
        ),
        Flag(
            "global_loss_coef",
            "weight of global discrimination; 0 removes it",
            non_negative(float),
            default=10.0,
            metavar="WEIGHT",
        ),
        Flag(
            "teacher_momentum",
            "initial momentum of a teacher network (EMA) that gives the targets, 0 to 1; 0.99 is a good value",
            finite,
            default_help="not set, no teacher",
            metavar="MOMENTUM",
            value_range="[0, 1]",
        ),
        Flag("object_embedding_loss", "also predict an embedding of each proposal's crop"),
        Flag(
            "object_embedding_coef",
            "weight of the object embedding loss",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
            requires=("--object_embedding_loss", _predicts_embeddings),
        ),
        Flag(
            "obj_embedding_head",
            "target embedding; intermediate: mean of backbone stage 2, head: SwAV's projection head",
            str,
            choices=("intermediate", "head"),
            default="intermediate",
            requires=("--object_embedding_loss", _predicts_embeddings),
        ),
    ),
    # ------------------------------------------------------------------------------------------------- proposals
    *flags_in(
        PROPOSALS,
        (PRETRAIN,),
        Flag(
            "proposals",
            "proposal method: {proposals}; see docs/proposals.md",
            proposal_method,
            default="random",
            metavar="METHOD|file:PATH",
        ),
        Flag(
            "cache_path",
            "read proposals from a cache that tools/cache_proposals.py wrote",
            str,
            default="",
            metavar="DIR",
        ),
        Flag(
            "strategy",
            "how to choose from the ranked proposals: topk takes the highest-ranked, random draws uniformly, mc draws "
            "higher ranks with higher probability",
            strategy,
            default="topk",
            metavar="topk|random|mc",
        ),
        Flag(
            "max_prop",
            "maximum number of proposals per image; the mean number with --strategy mc",
            positive(),
            default=30,
            metavar="N",
        ),
        Flag(
            "ss_resize",
            "selective_search: resize images to a square with this side, in pixels; 0 keeps their size",
            non_negative(),
            default=128,
            metavar="PIXELS",
        ),
        Flag(
            "ss_rank",
            "selective_search: order of the boxes; shuffled draws another one in each epoch, as published; agreement "
            "puts boxes first that many others overlap, and drops near duplicates",
            str,
            choices=("shuffled", "agreement"),
            default="shuffled",
        ),
        Flag(
            "edge_model",
            "edge_boxes: OpenCV's structured edge model, model.yml.gz",
            str,
            default="",
            default_help="not set, image gradients serve as edges",
            metavar="FILE",
        ),
    ),
    # ----------------------------------------------------------------------------------------------------- model
    *flags_in(
        MODEL,
        SCRIPTS,
        Flag(
            "detector",
            "detector architecture to train",
            str,
            choices=DETECTORS,
            default="detr",
            aliases=("--model",),
        ),
        Flag(
            "backbone",
            "backbone network: {backbones}",
            str,
            default="resnet50",
            metavar="NAME",
        ),
        Flag(
            "backbone_weights",
            "initial weights of the backbone; none: random",
            str,
            default_help={
                PRETRAIN: "swav for resnet50, else imagenet; none with a checkpoint",
                FINETUNE: "imagenet; none with a checkpoint",
            },
            metavar="swav|imagenet|none|PATH|URL",
            aliases=("--load_backbone",),
            per_launch=True,
        ),
        Flag(
            "backbone_norm",
            "batch norm of the backbone: frozen statistics, or live ones that are trained",
            str,
            choices=("frozen", "live"),
            default_help="frozen; live with random weights",
        ),
        Flag("dilation", "DC5: dilate the last backbone stage, for a stride of 16 instead of 32"),
        Flag(
            "position_embedding",
            "positional encoding; sine_shifted: sine at the centers of the feature map's cells",
            str,
            choices=("sine", "sine_shifted", "learned"),
            default="sine",
        ),
        Flag("enc_layers", "number of encoder layers", positive(), default=6, metavar="N"),
        Flag("dec_layers", "number of decoder layers", positive(), default=6, metavar="N"),
        Flag(
            "dim_feedforward",
            "width of the transformer's feed-forward networks, in channels",
            positive(),
            default=2048,
            metavar="DIM",
        ),
        Flag(
            "hidden_dim",
            "width of the transformer, in channels; a multiple of 4 and of --nheads",
            positive(),
            default=256,
            metavar="DIM",
        ),
        Flag(
            "nheads",
            "number of attention heads per layer",
            positive(),
            default=8,
            metavar="N",
        ),
        Flag(
            "dropout",
            "dropout probability in the transformer",
            float,
            default=0.1,
            metavar="P",
            value_range="[0, 1)",
        ),
        Flag(
            "num_queries",
            "number of object queries per image",
            positive(),
            default=100,
            metavar="N",
        ),
        Flag("pre_norm", "apply layer norm before each transformer block, not after it"),
        Flag(
            "num_feature_levels",
            "number of feature levels: up to three from the backbone, the others by strided convolutions",
            positive(),
            default=1,
            metavar="N",
        ),
        Flag("with_box_refine", "refine boxes from one decoder layer to the next"),
        Flag("two_stage", "initialize queries from encoder proposals"),
        Flag(
            "enc_n_points",
            "number of sampling points per head and level in the encoder",
            positive(),
            default=4,
            metavar="N",
        ),
        Flag(
            "dec_n_points",
            "number of sampling points per head and level in the decoder",
            positive(),
            default=4,
            metavar="N",
        ),
        Flag(
            "ms_deform_attn",
            "implementation of deformable attention; auto: triton on a GPU, else pytorch",
            str,
            choices=("auto", "pytorch", "triton"),
            default="auto",
            per_launch=True,
        ),
    ),
    *flags_in(
        MODEL,
        (PRETRAIN,),
        Flag(
            "num_classes",
            "number of classes of the head; region_prior: with 1 class it predicts objectness alone",
            positive(),
            default=91,
            metavar="N",
        ),
    ),
    *flags_in(
        MODEL,
        (FINETUNE,),
        Flag(
            "num_classes",
            "number of classes of the head: largest category id + 1",
            positive(),
            default=91,
            default_help="91; coco_panoptic: 250; voc, voc_coco: 20; airbus_ship: 1; custom: as in the annotations",
            metavar="N",
        ),
        Flag("masks", "add a mask head, for instance or (coco_panoptic) panoptic segmentation"),
    ),
    # ------------------------------------------------------------------------------------------------------ losses
    *flags_in(
        LOSSES,
        (FINETUNE,),
        Flag(
            "classification",
            "classification loss: softmax cross-entropy with a no-object class, or sigmoid focal loss",
            str,
            choices=("softmax", "focal"),
            default="softmax",
        ),
    ),
    *flags_in(
        LOSSES,
        (FINETUNE,),
        Flag(
            "mask_loss_coef",
            "weight of the focal loss of masks",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
            requires=("--masks", lambda settings: settings["masks"]),
        ),
        Flag(
            "dice_loss_coef",
            "weight of the dice loss of masks",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
            requires=("--masks", lambda settings: settings["masks"]),
        ),
    ),
    *flags_in(
        LOSSES,
        SCRIPTS,
        Flag(
            "aux_loss",
            "disable the auxiliary losses on all decoder layers but the last",
            default=True,
            off_switch="--no_aux_loss",
        ),
        Flag(
            "set_cost_class",
            "weight of the classification cost in matching",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
        ),
        Flag(
            "set_cost_bbox",
            "weight of the L1 box cost in matching",
            non_negative(float),
            default=5.0,
            metavar="WEIGHT",
        ),
        Flag(
            "set_cost_giou",
            "weight of the generalized IoU cost in matching",
            non_negative(float),
            default=2.0,
            metavar="WEIGHT",
        ),
        Flag(
            "cls_loss_coef",
            "weight of the classification loss",
            non_negative(float),
            default=1.0,
            metavar="WEIGHT",
        ),
        Flag(
            "bbox_loss_coef",
            "weight of the L1 box loss",
            non_negative(float),
            default=5.0,
            metavar="WEIGHT",
        ),
        Flag(
            "giou_loss_coef",
            "weight of the generalized IoU loss",
            non_negative(float),
            default=2.0,
            metavar="WEIGHT",
        ),
        Flag(
            "eos_coef",
            "weight of the no-object class in softmax classification, relative to the others",
            positive(float),
            default=0.1,
            metavar="WEIGHT",
            requires=(
                "--classification softmax",
                lambda settings: settings["classification"] == "softmax",
            ),
        ),
        Flag(
            "focal_alpha",
            "weight of positives in the focal loss, at most 1",
            finite,
            default=0.25,
            metavar="ALPHA",
            requires=(
                "--classification focal",
                lambda settings: settings["classification"] == "focal",
            ),
        ),
    ),
    # ------------------------------------------------------------------------------------------------ optimization
    *flags_in(
        OPTIMIZATION,
        SCRIPTS,
        Flag(
            "lr",
            "learning rate of the transformer and the heads",
            positive(float),
            default=1e-4,
            metavar="LR",
            published=True,
        ),
        Flag(
            "lr_backbone",
            "learning rate of the backbone; 0 freezes it",
            non_negative(float),
            default=1e-5,
            default_help={PRETRAIN: "1e-5; random_query_patch: as --lr", FINETUNE: "1e-5"},
            metavar="LR",
            published=True,
        ),
        Flag(
            "batch_size",
            "number of images per process, that is per GPU; auto: the largest that fits into memory",
            batch_size,
            default=2,
            metavar="N|auto",
        ),
        Flag(
            "accumulate",
            "number of batches whose gradients one optimizer step averages, as if this many times the GPUs were used; "
            "--max_iters and --lr_drop_iters count optimizer steps, --log_every counts batches",
            positive(),
            default=1,
            metavar="N",
        ),
        Flag(
            "weight_decay",
            "weight decay of the optimizer",
            non_negative(float),
            default=1e-4,
            metavar="DECAY",
            published=True,
        ),
        Flag(
            "epochs",
            "number of epochs to train",
            positive(),
            default=300,
            metavar="N",
            schedule_unit="epochs",
            overrides=_STEP_FLAGS,
            published=True,
        ),
        Flag(
            "lr_drop",
            "divide the learning rates by 10 every this many epochs",
            positive(),
            default=200,
            metavar="EPOCHS",
            schedule_unit="epochs",
            overrides=(*_STEP_FLAGS, "lr_drop_epochs"),
            published=True,
        ),
        Flag(
            "lr_drop_epochs",
            "divide the learning rates by 10 after each of these epochs, instead of --lr_drop",
            positive(),
            metavar="EPOCH",
            multiple=True,
            schedule_unit="epochs",
            overrides=(*_STEP_FLAGS, "lr_drop"),
        ),
        Flag(
            "max_iters",
            "number of steps to train, instead of --epochs; a finished run that resumes with more starts a new epoch",
            positive(),
            metavar="STEPS",
            schedule_unit="steps",
            overrides=_EPOCH_FLAGS,
        ),
        Flag(
            "lr_drop_iters",
            "divide the learning rates by 10 every this many steps; goes with --max_iters",
            positive(),
            metavar="STEPS",
            schedule_unit="steps",
            overrides=_EPOCH_FLAGS,
        ),
        Flag(
            "lr_backbone_names",
            "train parameters whose name contains one of these strings with --lr_backbone",
            str,
            default=["backbone"],
            metavar="STRING",
            multiple=True,
        ),
        Flag(
            "lr_linear_proj_names",
            "train parameters whose name contains one of these strings with --lr times --lr_linear_proj_mult",
            str,
            default=[],
            metavar="STRING",
            multiple=True,
        ),
        Flag(
            "lr_linear_proj_mult",
            "factor on the learning rate of --lr_linear_proj_names",
            positive(float),
            default=0.1,
            metavar="FACTOR",
            requires=(
                "--lr_linear_proj_names",
                lambda settings: bool(settings["lr_linear_proj_names"]),
            ),
        ),
        Flag(
            "ema",
            "keep a moving average of the weights with this decay, such as 0.9998, which is evaluated and saved as the "
            "model; 0: no average, and with --eval the weights without it",
            non_negative(float),
            default=0.0,
            metavar="DECAY",
            value_range="[0, 1)",
        ),
        Flag("sgd", "use SGD with momentum 0.9 instead of AdamW"),
        Flag(
            "clip_max_norm",
            "maximum L2 norm of the gradient; 0 or less disables clipping",
            finite,
            default=0.1,
            metavar="NORM",
            published=True,
        ),
    ),
    # -------------------------------------------------------------------------------------------------- evaluation
    *flags_in(
        EVALUATION,
        SCRIPTS,
        Flag(
            "eval_batch_size",
            "number of images per process in a batch of evaluation",
            positive(),
            default_help="--batch_size",
            metavar="N",
        ),
    ),
    *flags_in(
        EVALUATION,
        (PRETRAIN,),
        Flag(
            "eval",
            "evaluate --resume by class-agnostic AP and AR on the validation images of --dataset_file, and stop",
            per_launch=True,
        ),
        Flag(
            "viz",
            "draw proposals, predictions of the --resume checkpoint and ground truth on some validation images, in "
            "objects.png",
            per_launch=True,
        ),
        Flag(
            "eval_every",
            "number of epochs between evaluations by class-agnostic AP and AR; the last epoch is evaluated too",
            positive(),
            default=0,
            default_help="never",
            metavar="EPOCHS",
        ),
    ),
    *flags_in(
        EVALUATION,
        (FINETUNE,),
        Flag(
            "eval", "evaluate the checkpoint of --resume or --pretrain, and stop", per_launch=True
        ),
        Flag(
            "eval_every",
            "number of epochs between evaluations; the last epoch is evaluated too",
            positive(),
            default=1,
            metavar="EPOCHS",
        ),
        Flag(
            "voc_metric",
            "definition of AP on VOC that is reported; both are saved",
            str,
            choices=("11point", "area"),
            default="11point",
            data_specific=True,
        ),
        Flag(
            "coco_evaluator",
            "implementation of the COCO metrics, with equal results; auto: hotcoco if installed, else pycocotools",
            str,
            choices=("auto", "hotcoco", "pycocotools"),
            default="auto",
        ),
    ),
)

# Flags of the published codebases that are rejected: flag -> (takes a value, reason).
UNSUPPORTED_FLAGS: dict[str, tuple[bool, str]] = {
    "--remove_difficult": (False, "the published code never reads it"),
    "--world_size": (
        True,
        "the launcher sets the number of processes: torchrun --nproc_per_node N",
    ),
    "--position_embedding_scale": (True, "the published code never reads it: the scale is 2 pi"),
    "--filter_num": (True, "the published code never reads it"),
    "--split": (
        True,
        "Siamese DETR did not publish the files of its VOC folds; with your own, use --dataset_file custom "
        "--train_annotations meta/voc_trainval2012_splitN.cocostyle.json --train_images VOC2012/JPEGImages",
    ),
    "--reset_embedding_layer": (True, "the published code never reads it"),
    "--cache_mode": (
        False,
        "image files are not kept in memory; the operating system caches them",
    ),
}


def flags_of(script: str) -> dict[str, Flag]:
    """Return name -> flag for the flags of one script, in the order of the table."""
    return {flag.name: flag for flag in FLAGS if script in flag.scripts}


def all_flags(script: str) -> dict[str, Flag]:
    """Return name -> flag for the flags of both scripts; if both define one, the definition of `script`.

    `Settings` have a value for each of them, so shared code can read any setting under either script.
    """
    return {**{flag.name: flag for flag in FLAGS}, **flags_of(script)}


def names_where(condition: Callable[[Flag], Any]) -> set[str]:
    """Return the names of the flags that meet a condition."""
    return {flag.name for flag in FLAGS if condition(flag)}


def flag_readers(name: str, registry: Mapping[str, Any]) -> list[str]:
    """Return which entries of a registry list the flag as their own; empty if every entry reads it."""
    return [other for other, entry in registry.items() if name in entry.flags]


def flags_of_others(registry: Mapping[str, Any], chosen: str) -> Iterable[str]:
    """Return the flags that other entries of a registry read and the chosen one does not, sorted."""
    names = {name for entry in registry.values() for name in entry.flags}
    return sorted(names - set(registry[chosen].flags))
