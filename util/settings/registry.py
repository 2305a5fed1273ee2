"""Registries: what can be chosen by name, that is detectors, pretexts, datasets, proposal methods and backbones.

Each is one file and one entry here. The entry says where the builder is ("module:name"), which flags only it reads and
which defaults it changes. Builders are imported when they are used, so they may be in any package that Python finds:

    from util.settings.registry import DETECTORS, DetectorEntry
    DETECTORS["mine"] = DetectorEntry("my_package.my_detector:build", state_dict_marker=".my_attention.")
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from util.errors import UserError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class DetectorEntry:
    """A detector.

    Attributes:
        builder: `(settings, backbone, classification) -> Detector`.
        state_dict_marker: Part of a parameter name that no other detector has. Its checkpoints are recognized by it.
        flags: Names of flags that it reads and some other detectors do not. Those reject them.
        defaults: Flag name -> value that replaces the general default.
    """

    builder: str
    state_dict_marker: str
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PretextEntry:
    """A pretext task.

    Attributes:
        pretext: Subclass of `models.pretext.Pretext`.
        dataset: `(image_set, settings) -> SampleDataset`, the samples that it trains on.
        parameter_prefixes: Prefixes of its own parameters, which fine-tuning drops.
        flags: As in `DetectorEntry`.
        defaults: As in `DetectorEntry`, and win over the detector's.
    """

    pretext: str
    dataset: str
    parameter_prefixes: tuple[str, ...]
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetEntry:
    """A labelled dataset.

    Attributes:
        builder: `(image_set, settings, classes=None) -> SampleDataset`, see `datasets`.
        images: `(image_set, settings) -> ImageFiles`, its images for pre-training. If empty, pre-training uses the
            builder's images and ignores their labels.
        path_flags: Names of the flags with its paths. Paths and flags of other datasets are then rejected; if empty,
            nothing is.
        flags: As in `DetectorEntry`.
        defaults: As in `DetectorEntry`. The detector's and the pretext's win over them.
    """

    builder: str
    images: str = ""
    path_flags: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


# Defaults of detectors and pretexts are those of the published codebases.
DETECTORS: dict[str, DetectorEntry] = {
    "detr": DetectorEntry("models.detr:build", state_dict_marker=".multihead_attn."),
    "conditional_detr": DetectorEntry(
        "models.conditional_detr:build",
        state_dict_marker=".ca_qpos_sine_proj.",
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
        state_dict_marker=".sampling_offsets.",
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
        "datasets.pretext.random_query_patch:build_query_patch_dataset",
        parameter_prefixes=("patch2query.", "feature_align."),
        flags=("num_patches", "mask_ratio", "feature_loss_coef", "feature_recon", "query_shuffle"),
        defaults={
            "epochs": 60,
            "lr_drop": 40,
            "save_every": 20,
            "image_size": 480,
            # The head is softmax over 2 classes and "no object" with every detector, as in Siamese DETR's code.
            "num_classes": 2,
            "classification": "softmax",
            "set_cost_class": 1.0,
            "cls_loss_coef": 1.0,
            "num_workers": 16,
            "lr": 1e-4,
            "lr_linear_proj_mult": 1.0,
            "lr_backbone": None,  # the same as --lr, see `util.settings.resolving`
        },
    ),
    "region_prior": PretextEntry(
        "models.pretext.region_prior:RegionPrior",
        "datasets.pretext.region_prior:build_region_prior_dataset",
        parameter_prefixes=("feature_embed.",),
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
        "datasets.pretext.siamese:build_siamese_dataset",
        parameter_prefixes=("patch2query.", "feature_align.", "enc_head."),
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
            # The head is softmax over 2 classes and "no object" with every detector, as in Siamese DETR's code.
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
        path_flags=("coco_path",),
    ),
    "coco_panoptic": DatasetEntry(
        "datasets.labelled.coco_panoptic:build_coco_panoptic",
        "datasets.labelled.coco:coco_images",
        path_flags=("coco_path", "coco_panoptic_path"),
    ),
    "voc": DatasetEntry(
        "datasets.labelled.voc:build_voc",
        "datasets.labelled.voc:voc_images",
        path_flags=("voc_path",),
        flags=("voc_train", "voc_val", "voc_metric"),
    ),
    "voc_coco": DatasetEntry(
        "datasets.labelled.voc_coco:build_voc_coco",
        "datasets.labelled.voc:voc_images",
        path_flags=("voc_path",),
        flags=("voc_train", "voc_val"),
        defaults={"voc_train": ["2012_trainval"]},
    ),
    "airbus_ship": DatasetEntry(
        "datasets.labelled.airbus_ship:build_airbus_ship", path_flags=("airbus_path",)
    ),
    "custom": DatasetEntry(
        "datasets.labelled.custom:build_custom",
        "datasets.labelled.custom:custom_images",
        path_flags=("train_images", "train_annotations", "val_images", "val_annotations"),
    ),
}

# Name, or prefix with a colon such as "file:" -> builder `(settings) -> method`, see `datasets.proposals`.
PROPOSALS: dict[str, str] = {
    "random": "datasets.proposals.random:build_random",
    "selective_search": "datasets.proposals.selective_search:build_selective_search",
    "edge_boxes": "datasets.proposals.edge_boxes:build_edge_boxes",
    "file:": "datasets.proposals.from_file:build_from_file",
}

# Name, or prefix with a colon such as "timm:" -> builder `(name, norm, dilation, stages) -> models.backbone.Body`.
BACKBONES: dict[str, str] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), "models.resnet:build"),
    "timm:": "models.timm_backbone:build",
}


def list_names(registry: Mapping[str, object]) -> str:
    """Return all names of a registry, joined by commas; a prefix as `file:NAME`."""
    return ", ".join(f"{name}NAME" if name.endswith(":") else name for name in registry)


def lookup(registry: Mapping[str, Entry], flag: str, name: str) -> Entry:
    """Return the entry of `name`.

    Raises:
        UserError: There is none. The message lists what `flag` accepts.
    """
    if name not in registry:
        raise UserError(f"{flag} {name} is unknown: choose one of {list_names(registry)}")
    return registry[name]


def import_object(path: str) -> Callable:
    """Import the object at "module:name"."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
