"""Settings of transfer studies, as data. A flag with the value None is not given, True is a switch.

Everything but the pretext is the same within a study: backbone and its weights, detector, positional encoding, steps,
learning rates, order of the data. Where published settings of the detector differ by pretext, the detector's own
defaults are used for all.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.settings.registry import PRETEXTS

Flags = dict[str, Any]
NONE = "none"  # the row without pre-training
LONGER = 4  # times the steps of pre-training in the rows NAME-longer


@dataclass(frozen=True, kw_only=True)
class Preset:
    """model, pretrain, finetune: flags of all models, of all pre-trainings and of all fine-tunings; pretexts and
    detectors: what one of them adds.

    lr: of fine-tuning, unless `--lr` is given; None: the detector's default. backbone_lr: the backbone's, as a fraction
    of it; 0 freezes the backbone.
    evaluations: of each fine-tuning, evenly spread, at most. published_sizes: images have the sizes of the published
    pipelines instead of the prepared one. configs: (detector, pretext) -> the file in configs/ that pre-trains.
    """

    title: str
    model: Flags
    pretrain: Flags
    finetune: Flags
    pretexts: dict[str, Flags]
    detectors: dict[str, Flags] = field(default_factory=dict)
    finetune_detectors: dict[str, Flags] = field(default_factory=dict)
    lr: float | None = None
    backbone_lr: float = 0.0
    evaluations: int = 4
    published_sizes: bool = False
    processes: int = 1
    configs: dict[tuple[str, str], str] = field(default_factory=dict)


DETECTOR_FLAGS: dict[str, Flags] = {
    "detr": {"pre_norm": True, "position_embedding": "sine"},
    "conditional_detr": {"position_embedding": "sine"},
    "deformable_detr": {"position_embedding": "sine_shifted"},
}


def schedule(batch_size: int, steps: int) -> Flags:
    """The learning rate is divided by ten after four fifths of the steps."""
    return {"batch_size": batch_size, "max_iters": steps, "lr_drop_iters": round(0.8 * steps)}


def pretext_flags(num_patches: int, patch_size: int, max_prop: int) -> dict[str, Flags]:
    patches = {"num_patches": num_patches, "patch_size": patch_size}
    regions = {"max_prop": max_prop, "patch_size": patch_size, "object_embedding_loss": True}
    return {
        "random_query_patch": {**patches, "feature_recon": True},
        "region_prior": {"proposals": "selective_search", **regions},
        "siamese": {"proposals": "selective_search", **patches},
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
        title="a few minutes in all, to try the tool",
        model={**SMALL, "enc_layers": 1, "dec_layers": 2, "hidden_dim": 64, "num_queries": 20},
        pretrain={**schedule(4, 4), "lr": 2e-4, "fre_cnn": True},
        finetune=schedule(4, 8),
        pretexts=pretext_flags(5, 32, 5),
        lr=2e-4,
        backbone_lr=0.1,
        evaluations=2,
    ),
    "cpu": Preset(
        title="two CPU cores, one to three hours for a detector with two fractions and three seeds",
        model=SMALL,
        pretrain={**schedule(4, 2500), "lr": 2e-4, "fre_cnn": True},
        finetune=schedule(4, 1125),
        pretexts=pretext_flags(5, 64, 10),
        lr=4e-4,
    ),
    "gpu-10min": Preset(
        title="one GPU in calls of ten minutes, with --jobs 4 or more and --time_limit 9",
        model={
            **SMALL,
            "enc_layers": 3,
            "hidden_dim": 256,
            "dim_feedforward": 1024,
            "num_queries": 60,
        },
        pretrain={**schedule(32, 3125), "lr": 2e-4, "fre_cnn": True},
        finetune=schedule(16, 1250),
        pretexts=pretext_flags(10, 96, 15),
        lr=2e-4,
        backbone_lr=0.1,
    ),
    "paper": Preset(
        title="published settings: 8 GPUs for days, on all of the data prepared with --image_size 800",
        model={"backbone_weights": "swav"},
        pretrain={"batch_size": 32},
        finetune={"batch_size": 4},
        pretexts={
            "random_query_patch": {},
            "siamese": {"proposals": "edge_boxes"},
            "region_prior": {"proposals": "selective_search", "batch_size": 24},
        },
        detectors={"conditional_detr": {"num_queries": 100}, "detr": {"num_queries": 100}},
        finetune_detectors={
            "conditional_detr": {"epochs": 50, "lr_drop": 40, "lr_backbone": 5e-5, "batch_size": 2},
            "deformable_detr": {"epochs": 50, "lr_drop": 40},
            "detr": {"epochs": 150, "lr_drop": 100, "lr_backbone": 5e-5, "batch_size": 2},
        },
        evaluations=10,
        published_sizes=True,
        processes=8,
        configs={
            ("conditional_detr", "random_query_patch"): "UPDETR_conditional_pretrain_in",
            ("conditional_detr", "region_prior"): "DETReg_conditional_pretrain_in",
            (
                "conditional_detr",
                "siamese",
            ): "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
            ("deformable_detr", "random_query_patch"): "UPDETR_deformable_pretrain_in",
            ("deformable_detr", "region_prior"): "DETReg_top30_in",
            (
                "deformable_detr",
                "siamese",
            ): "r50_deformtr_ms_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w",
            ("detr", "random_query_patch"): "UPDETR_vanilla_pretrain_in",
            ("detr", "region_prior"): "DETReg_top30_in_detr",
            ("detr", "siamese"): "r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """A row of the tables: a pretext, the flags that it changes, and what that means.

    labelled_images: pre-trains on the labelled training images with two boxes or more, without their labels.
    checkpoint: a file to start from instead of a pre-training. against: a row to compare with, beside its pretext's.
    """

    name: str
    changes: Flags = field(default_factory=dict)
    meaning: str = ""
    labelled_images: bool = False
    times: int = 1  # the preset's steps of pre-training
    checkpoint: str = ""
    against: str = ""

    @property
    def pretext(self) -> str:
        return self.name.partition("-")[0]

    @property
    def is_pretrained(self) -> bool:
        """Whether a pre-training of this study makes it."""
        return self.name != NONE and not self.checkpoint


_RANDOM = {"proposals": "random"}, "random boxes instead of proposals"
_TRAINED = {"fre_cnn": None, "lr_backbone": 2e-5}, "the backbone is trained too"
ABLATIONS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "random_query_patch-selective_search",
            {"proposals": "selective_search"},
            "patches of proposals",
        ),
        Variant("random_query_patch-trained_cnn", *_TRAINED),
        Variant(
            "random_query_patch-no_reconstruction",
            {"feature_recon": None},
            "no feature reconstruction loss",
        ),
        Variant("region_prior-random", *_RANDOM),
        Variant(
            "region_prior-edge_boxes",
            {"proposals": "edge_boxes"},
            "EdgeBoxes instead of selective search",
        ),
        Variant(
            "region_prior-labelled_images",
            {},
            "only the images of region_prior-true_boxes",
            labelled_images=True,
        ),
        Variant(
            "region_prior-true_boxes",
            {"proposals": "file:{data}/annotations/true_boxes.json"},
            "ground-truth boxes without classes, of all labelled training images with two or more",
            labelled_images=True,
            against="region_prior-labelled_images",
        ),
        Variant("region_prior-trained_cnn", *_TRAINED),
        Variant(
            "region_prior-no_embedding", {"object_embedding_loss": None}, "no object embedding loss"
        ),
        Variant("siamese-random", *_RANDOM),
        Variant("siamese-edge_boxes", {"proposals": "edge_boxes"}, "EdgeBoxes, as published"),
        Variant("siamese-no_regions", {"feature_loss_coef": 0}, "no region discrimination"),
        Variant("siamese-no_global", {"global_loss_coef": 0}, "no global discrimination"),
        *(
            Variant(f"{name}-longer", {}, f"{LONGER} times the pre-training steps", times=LONGER)
            for name in PRETEXTS
        ),
    )
}


def variant_of(name: str) -> Variant:
    """A pretext as the preset has it, or an ablation."""
    return ABLATIONS.get(name) or Variant(name)


def file_variant(text: str) -> Variant:
    """A row of `--pretrained NAME=FILE`.

    Raises:
        UserError: no such file, or a name that is taken or can't be that of a folder.
    """
    name, _, file = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not file:
        raise UserError(
            f"--pretrained {text}: give NAME=FILE, the name of letters, digits and any of _ . -"
        )
    if name in (NONE, *PRETEXTS, *ABLATIONS):
        raise UserError(
            f"--pretrained {text}: {name} is another row's name; choose one of your own"
        )
    if not Path(file).is_file():
        raise UserError(f"--pretrained {text}: there is no file {file}; correct the path")
    return Variant(name, checkpoint=str(Path(file).resolve()))
