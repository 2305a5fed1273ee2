"""What can be chosen by name: detectors, pretexts, datasets, proposal methods and backbones.

Each is one file and one line here. The line says where the file's builder is ("module:name"), how its checkpoints are
recognised, which flags only it reads, and which defaults it changes. Nothing is imported before it is used, so that a
builder may live in any package that Python finds:

    from util.settings.registry import DETECTORS, DetectorEntry
    DETECTORS["mine"] = DetectorEntry("my_package.my_detector:build", mark=".my_attention.")
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from util.errors import UserError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class DetectorEntry:
    """
    builder: `(settings, backbone, classification) -> Detector`.
    mark: a part of a parameter's name that no other detector has, by which its checkpoints are recognised.
    flags: names of flags that it reads and not every detector does; the others refuse them.
    defaults: flag name -> value, where they differ from those of the table of flags.
    """

    builder: str
    mark: str
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PretextEntry:
    """
    pretext: a subclass of `models.pretext.Pretext`.
    dataset: `(image_set, settings) -> SampleDataset`, what it sees of an image.
    parts: names that its own parameters begin with, which fine-tuning leaves behind.
    flags, defaults: as those of a detector; the defaults are stronger.
    """

    pretext: str
    dataset: str
    parts: tuple[str, ...]
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetEntry:
    """
    builder: `(image_set, settings, classes=None) -> SampleDataset`, see `datasets`.
    images: `(image_set, settings) -> ImageFiles`, the same images for pre-training; empty: those that the builder
        gives, whose labels are then read and not used.
    places: names of the flags that say where they lie, by which flags of other datasets are refused; empty: nothing is
        refused.
    flags, defaults: as those of a detector; the defaults are weaker.
    """

    builder: str
    images: str = ""
    places: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


DETECTORS: dict[str, DetectorEntry] = {
    "detr": DetectorEntry("models.detr:build", mark=".multihead_attn."),
    "conditional_detr": DetectorEntry(
        "models.conditional_detr:build",
        mark=".ca_qpos_sine_proj.",
        defaults={
            "epochs": 50,
            "lr_drop": 40,
            "save_every": 10,
            "num_queries": 300,
            "classification": "focal",
            "set_cost_class": 2.0,
            "cls_loss_coef": 2.0,
        },
    ),
    "deformable_detr": DetectorEntry(
        "models.deformable_detr:build",
        mark=".sampling_offsets.",
        flags=(
            "num_feature_levels",
            "with_box_refine",
            "two_stage",
            "enc_n_points",
            "dec_n_points",
            "ms_deform_attn",
        ),
        defaults={
            "lr": 2e-4,
            "lr_backbone": 2e-5,
            "epochs": 50,
            "lr_drop": 40,
            "save_every": 5,
            "num_queries": 300,
            "dim_feedforward": 1024,
            "position_embedding": "sine_shifted",
            "num_feature_levels": 4,
            "classification": "focal",
            "set_cost_class": 2.0,
            "cls_loss_coef": 2.0,
            "lr_backbone_names": ["backbone.0"],
            "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
        },
    ),
}

PRETEXTS: dict[str, PretextEntry] = {
    "random_query_patch": PretextEntry(
        "models.pretext.random_query_patch:RandomQueryPatch",
        "datasets.pretext.random_query_patch:build_query_patches",
        parts=("patch2query.", "feature_align."),
        flags=("num_patches", "mask_ratio", "feature_loss_coef", "feature_recon", "query_shuffle"),
        defaults={
            "epochs": 60,
            "lr_drop": 40,
            "save_every": 20,
            "image_size": 480,
            "num_classes": 2,
            "classification": "softmax",
            "set_cost_class": 1.0,
            "cls_loss_coef": 1.0,
            "num_workers": 16,
            "lr": 1e-4,
            "lr_linear_proj_mult": 1.0,
            "lr_backbone": None,  # as --lr
        },
    ),
    "region_prior": PretextEntry(
        "models.pretext.region_prior:RegionPrior",
        "datasets.pretext.region_prior:build_region_proposals",
        parts=("feature_embed.",),
        flags=(
            "strategy",
            "max_prop",
            "object_embedding_loss",
            "object_embedding_coef",
            "obj_embedding_head",
        ),
        defaults={
            "image_size": 480,
            "save_every": 5,
            "batch_size": 4,
            "position_embedding": "sine_shifted",
            "proposals": "selective_search",
        },
    ),
    "siamese": PretextEntry(
        "models.pretext.siamese:Siamese",
        "datasets.pretext.siamese:build_two_views",
        parts=("patch2query.", "feature_align.", "enc_head."),
        flags=(
            "num_patches",
            "feature_loss_coef",
            "global_loss_coef",
            "box_disturbance",
            "view_iou",
            "view_shrink",
            "teacher_momentum",
        ),
        defaults={
            "epochs": 60,
            "lr_drop": 40,
            "save_every": 20,
            "image_size": 480,
            "num_classes": 2,
            "classification": "softmax",
            "set_cost_class": 1.0,
            "cls_loss_coef": 1.0,
            "num_workers": 4,
            "lr": 1e-4,
            "lr_linear_proj_mult": 1.0,
            "lr_backbone": 0.0,
            "position_embedding": "sine",
            "proposals": "edge_boxes",
            "feature_loss_coef": 3.0,
        },
    ),
}

DATASETS: dict[str, DatasetEntry] = {
    "coco": DatasetEntry(
        "datasets.labelled.coco:build_coco",
        "datasets.labelled.coco:coco_images",
        places=("coco_path",),
    ),
    "voc": DatasetEntry(
        "datasets.labelled.voc:build_voc",
        "datasets.labelled.voc:voc_images",
        places=("voc_path",),
        flags=("voc_train", "voc_val", "voc_metric"),
    ),
    "voc_coco": DatasetEntry(
        "datasets.labelled.voc_coco:build_voc_coco",
        "datasets.labelled.voc:voc_images",
        places=("voc_path",),
        flags=("voc_train", "voc_val"),
        defaults={"voc_train": ["2012_trainval"]},
    ),
    "airbus_ship": DatasetEntry(
        "datasets.labelled.airbus_ship:build_airbus_ship", places=("airbus_path",)
    ),
    "custom": DatasetEntry(
        "datasets.labelled.custom:build_custom",
        "datasets.labelled.custom:custom_images",
        places=("train_images", "train_annotations", "val_images", "val_annotations"),
    ),
}

# name, or the beginning of many names up to a colon -> builder `(args) -> method`, see `datasets.proposals`
PROPOSALS: dict[str, str] = {
    "random": "datasets.proposals.random:build_random",
    "selective_search": "datasets.proposals.selective_search:build_selective_search",
    "edge_boxes": "datasets.proposals.edge_boxes:build_edge_boxes",
    "file:": "datasets.proposals.from_file:build_from_file",
}


# name, or the beginning of many names up to a colon -> builder `(name, norm, dilation, stages) -> models.backbone.Body`
BACKBONES: dict[str, str] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), "models.resnet:build"),
    "timm:": "models.timm_backbone:build",
}


def names_of(registry: Mapping[str, object]) -> str:
    """All names of a registry in one line; a beginning of many names as `file:NAME`."""
    return ", ".join(f"{known}NAME" if known.endswith(":") else known for known in registry)


def lookup(registry: Mapping[str, Entry], flag: str, name: str) -> Entry:
    """The line of `name`.

    Raises:
        UserError: there is none; it says what `flag` can be.
    """
    if name not in registry:
        raise UserError(f"{flag} {name} is unknown: choose one of {names_of(registry)}")
    return registry[name]


def load(place: str) -> Callable:
    """The object at "module:name"."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)
