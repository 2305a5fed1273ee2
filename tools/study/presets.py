"""Settings of transfer studies, as data. A flag's value None leaves the flag out, True is a switch.

Within one study everything but the pretext is the same: backbone and its weights, detector, position code, fine-tuning
steps, rates, order of the data. Where published settings differ by pretext in what belongs to the detector, the
detector's own are taken for all.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.settings.registry import PRETEXTS

Flags = dict[str, Any]
NONE = "none"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Preset:
    """batch: images a step in (pre-training, fine-tuning), in one process. images: how many each sees in all; None: as
    the config says.
    rates: of fine-tuning, the first is taken unless one was chosen; empty: the detector's own. backbone_rate: share of
    it at which the CNN learns; 0: it is frozen; None: as the flags say. finetune: detector -> its flags. own_sizes:
    images have the sizes of the published pipelines, not those of the prepared data. evaluations: of a fine-tuning,
    evenly spread, at most. configs: (detector, pretext) -> file in configs/ that pre-training starts from."""

    title: str
    model: Flags
    batch: tuple[int, int]
    images: tuple[int, int] | None
    pretrain: Flags
    rates: tuple[float, ...]
    backbone_rate: float | None
    pretexts: dict[str, Flags]
    finetune: dict[str, Flags] = field(default_factory=dict)
    detectors: dict[str, Flags] = field(default_factory=dict)
    own_sizes: bool = False
    evaluations: int = 5
    processes: int = 1
    configs: dict[tuple[str, str], str] = field(default_factory=dict)


DETECTOR_FLAGS: dict[str, Flags] = {
    "detr": {"pre_norm": True, "position_embedding": "sine"},
    "conditional_detr": {"position_embedding": "sine"},
    "deformable_detr": {"position_embedding": "sine_shifted"},
}
RATE_DROP = 0.8  # of the steps, then the rate is a tenth


def _pretexts(num_patches: int, patch_size: int, max_prop: int) -> dict[str, Flags]:
    return {
        "random_query_patch": {"num_patches": num_patches, "patch_size": patch_size, "feature_recon": True},
        "region_prior": {
            "proposals": "selective_search",
            "max_prop": max_prop,
            "patch_size": patch_size,
            "object_embedding_loss": True,
        },
        "siamese": {"proposals": "selective_search", "num_patches": num_patches, "patch_size": patch_size},
    }


SMALL = {
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "imagenet",
    "enc_layers": 2,
    "dec_layers": 3,
    "hidden_dim": 128,
    "dim_feedforward": 512,
    "num_queries": 30,
    "dropout": 0,
}
PRESETS: dict[str, Preset] = {
    "cpu-smoke": Preset(
        "minutes for everything, to try the tool",
        {**SMALL, "enc_layers": 1, "dec_layers": 2, "hidden_dim": 64, "num_queries": 20},
        (4, 4),
        (16, 32),
        {"lr": 2e-4, "fre_cnn": True},
        (2e-4, 4e-4),
        0.1,
        _pretexts(5, 32, 5),
        evaluations=2,
    ),
    "cpu": Preset(
        "two CPU cores, one to three hours for a detector, two fractions and three seeds",
        SMALL,
        (4, 4),
        (10_000, 4_500),
        {"lr": 2e-4, "fre_cnn": True},
        (4e-4, 2e-4, 8e-4),
        0.0,
        _pretexts(5, 64, 10),
        evaluations=4,
    ),
    "gpu-10min": Preset(
        "one GPU in runs of ten minutes, with --jobs 4 or more and --time_limit 9",
        {**SMALL, "enc_layers": 3, "hidden_dim": 256, "dim_feedforward": 1024, "num_queries": 60},
        (32, 16),
        (100_000, 20_000),
        {"lr": 2e-4, "fre_cnn": True},
        (2e-4, 1e-4, 4e-4),
        0.1,
        _pretexts(10, 96, 15),
        evaluations=4,
    ),
    "paper": Preset(
        "published settings: 8 GPUs for days. Prepare all of the data with --image_size 800",
        {"backbone_weights": "swav"},
        (32, 4),
        None,
        {},
        (),
        None,
        {
            "random_query_patch": {},
            "siamese": {"proposals": "edge_boxes"},
            "region_prior": {"proposals": "selective_search", "batch_size": 24},
        },
        finetune={
            "conditional_detr": {"epochs": 50, "lr_drop": 40, "lr_backbone": 5e-5, "batch_size": 2},
            "deformable_detr": {"epochs": 50, "lr_drop": 40},
            "detr": {"epochs": 150, "lr_drop": 100, "lr_backbone": 5e-5, "batch_size": 2},
        },
        detectors={"conditional_detr": {"num_queries": 100}, "detr": {"num_queries": 100}},
        own_sizes=True,
        evaluations=10,
        processes=8,
        configs={
            ("conditional_detr", "random_query_patch"): "UPDETR_conditional_pretrain_in",
            ("conditional_detr", "region_prior"): "DETReg_conditional_pretrain_in",
            ("conditional_detr", "siamese"): "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
            ("deformable_detr", "random_query_patch"): "UPDETR_deformable_pretrain_in",
            ("deformable_detr", "region_prior"): "DETReg_top30_in",
            ("deformable_detr", "siamese"): "r50_deformtr_ms_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w",
            ("detr", "random_query_patch"): "UPDETR_vanilla_pretrain_in",
            ("detr", "region_prior"): "DETReg_top30_in_detr",
            ("detr", "siamese"): "r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """A row of the tables: a pretext and what differs from its preset. true_boxes: pre-trains on the labelled training
    images with two boxes or more, all others on unlabelled.txt. times: how often the preset's images of pre-training.
    checkpoint: a file to start from in place of a pre-training. against: the row that it differs from in one thing,
    where that is not its pretext's.
    """

    name: str
    pretext: str
    changes: Flags = field(default_factory=dict)
    true_boxes: bool = False
    says: str = ""
    times: int = 1
    checkpoint: str = ""
    against: str = ""


_TRAINED = {"fre_cnn": None, "lr_backbone": 2e-5}
_LONGER = 4  # times the preset's images
ABLATIONS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "random_query_patch-selective_search",
            "random_query_patch",
            {"proposals": "selective_search"},
            says="patches of proposals",
        ),
        Variant("random_query_patch-trained_cnn", "random_query_patch", _TRAINED, says="the CNN learns too"),
        Variant(
            "random_query_patch-no_reconstruction",
            "random_query_patch",
            {"feature_recon": None},
            says="without the feature loss",
        ),
        Variant(
            "region_prior-random", "region_prior", {"proposals": "random"}, says="random boxes in place of proposals"
        ),
        Variant(
            "region_prior-edge_boxes",
            "region_prior",
            {"proposals": "edge_boxes"},
            says="EdgeBoxes in place of selective search",
        ),
        Variant(
            "region_prior-labelled_images",
            "region_prior",
            {},
            True,
            says="on the images of region_prior-true_boxes alone",
        ),
        Variant(
            "region_prior-true_boxes",
            "region_prior",
            {"proposals": "file:{data}/annotations/true_boxes.json"},
            True,
            says="true boxes, without classes, of all labelled training images that have two or more, also where "
            "fine-tuning has fewer labels",
            against="region_prior-labelled_images",
        ),
        Variant("region_prior-trained_cnn", "region_prior", _TRAINED, says="the CNN learns too"),
        Variant(
            "region_prior-no_embedding",
            "region_prior",
            {"object_embedding_loss": None},
            says="without the object embedding loss",
        ),
        Variant("siamese-random", "siamese", {"proposals": "random"}, says="random boxes in place of proposals"),
        Variant(
            "siamese-edge_boxes",
            "siamese",
            {"proposals": "edge_boxes"},
            says="EdgeBoxes, as published, in place of selective search",
        ),
        Variant("siamese-no_regions", "siamese", {"feature_loss_coef": 0}, says="without region discrimination"),
        Variant("siamese-no_global", "siamese", {"global_loss_coef": 0}, says="without global discrimination"),
        *(
            Variant(f"{name}-longer", name, times=_LONGER, says=f"{_LONGER} times as many steps of pre-training")
            for name in ("random_query_patch", "region_prior", "siamese")
        ),
    )
}


def foreign_variant(words: str) -> Variant:
    """A row of `--pretrained NAME=FILE`.

    Raises:
        UserError: no such file, or a name that is taken or can't be that of a folder.
    """
    name, _, file = words.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not file:
        raise UserError(f"--pretrained {words}: give NAME=FILE, the name of letters, digits and any of _ . -")
    if name in (NONE, UNTRAINED, *PRETEXTS, *ABLATIONS):
        raise UserError(f"--pretrained {words}: {name} is another row's name; choose one of your own")
    if not Path(file).is_file():
        raise UserError(f"--pretrained {words}: there is no file {file}")
    return Variant(name, "", checkpoint=str(Path(file).resolve()))


def variant_of(name: str) -> Variant:
    """A pretext as its preset has it, or an ablation."""
    return ABLATIONS.get(name) or Variant(name, name)


def pretext_flags(preset: Preset, variant: Variant) -> Flags:
    """
    Raises:
        UserError: the preset has nothing for this pretext.
    """
    if variant.pretext not in preset.pretexts:
        raise UserError(
            f"--pretexts {variant.pretext}: the preset has no settings for it ({', '.join(preset.pretexts)})"
        )
    return {**preset.pretexts[variant.pretext], **variant.changes}
