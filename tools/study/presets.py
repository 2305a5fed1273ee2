"""Settings of transfer studies, as data. A flag with the value None is not given; True is a switch.

Only the pretext task differs within a study. Backbone and its weights, detector, positional encoding, steps, learning
rates and the order of the data are the same. Where published settings of a detector differ between pretext tasks, the
detector's own defaults are used for all.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.settings.registry import PRETEXTS

Flags = dict[str, Any]
NO_PRETRAINING = "none"  # name of the baseline row
LONGER_FACTOR = 4  # pre-training steps of the rows NAME-longer, as a multiple of the preset's


# study.json has a hash of the repr of a preset: renaming a field makes started studies refuse to continue.
@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything about a study that does not depend on the data.

    Attributes:
        title: purpose and cost, for the report and `--list`.
        model, pretrain, finetune: flags of all models, of all pre-trainings and of all fine-tunings.
        pretexts, detectors: flags that one of them adds.
        finetune_detectors: flags that a detector adds in fine-tuning only.
        lr: learning rate of fine-tuning, unless `--lr` is given; None for the detector's default.
        backbone_lr: the backbone's learning rate, as a fraction of `lr`; 0 freezes the backbone.
        evaluations: of each fine-tuning, evenly spaced, at most.
        published_sizes: use the image sizes of the published pipelines instead of the prepared one.
        processes: number of GPUs, one process each.
        configs: (detector, pretext) -> name of the file in configs/ that pre-trains.
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


# Published pretext tasks disagree on these for the same detector. One choice per detector keeps the rows comparable.
DETECTOR_FLAGS: dict[str, Flags] = {
    "detr": {"pre_norm": True, "position_embedding": "sine"},
    "conditional_detr": {"position_embedding": "sine"},
    "deformable_detr": {"position_embedding": "sine_shifted"},
}


def schedule(batch_size: int, steps: int) -> Flags:
    """Return a schedule that divides the learning rate by ten after four fifths of the steps."""
    return {"batch_size": batch_size, "max_iters": steps, "lr_drop_iters": round(0.8 * steps)}


def pretext_flags(
    num_patches: int, patch_size: int, max_prop: int, proposals: str = "selective_search"
) -> dict[str, Flags]:
    """Return the flags of each pretext task at a reduced size.

    Region prior and Siamese use the same proposals, so that they share one cache. Published are selective search for
    region prior and EdgeBoxes for Siamese.
    """
    patches = {"num_patches": num_patches, "patch_size": patch_size}
    regions = {"max_prop": max_prop, "patch_size": patch_size, "object_embedding_loss": True}
    return {
        "random_query_patch": {**patches, "feature_recon": True},
        "region_prior": {"proposals": proposals, **regions},
        "siamese": {"proposals": proposals, **patches},
    }


SMALL_MODEL = {
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "imagenet",
    "enc_layers": 2,
    "dec_layers": 3,
    "hidden_dim": 128,
    "dim_feedforward": 512,
    "num_queries": 30,
    "dropout": 0,
}
# EdgeBoxes have scores: the best few find more objects than those of selective search (docs/results/transfer.md).
CPU_PRETEXTS = pretext_flags(num_patches=5, patch_size=64, max_prop=5, proposals="edge_boxes")
PRESETS: dict[str, Preset] = {
    "cpu-smoke": Preset(
        title="a few minutes in all, to try the tool",
        model={
            **SMALL_MODEL,
            "enc_layers": 1,
            "dec_layers": 2,
            "hidden_dim": 64,
            "num_queries": 20,
        },
        pretrain={**schedule(batch_size=4, steps=4), "lr": 2e-4, "fre_cnn": True},
        finetune=schedule(batch_size=4, steps=8),
        pretexts=pretext_flags(num_patches=5, patch_size=32, max_prop=5),
        lr=2e-4,
        backbone_lr=0.1,
        evaluations=2,
    ),
    # Images of 128 pixels; Deformable DETR sees them in strides of 8 to 64.
    "cpu": Preset(
        title="two CPU cores, about 70 minutes for Deformable DETR with two fractions and three seeds",
        model={**SMALL_MODEL, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 256},
        pretrain={**schedule(batch_size=8, steps=1000), "lr": 4e-4, "fre_cnn": True},
        finetune=schedule(batch_size=4, steps=636),
        pretexts={
            **CPU_PRETEXTS,
            # Two views per image: the model sees as many as it sees images in the other pretext tasks.
            "siamese": {**CPU_PRETEXTS["siamese"], "batch_size": 4},
        },
        lr=4e-4,
        backbone_lr=0.1,
        evaluations=3,
    ),
    "gpu-10min": Preset(
        title="one GPU in calls of ten minutes, with --jobs 4 or more and --time_limit 9",
        model={
            **SMALL_MODEL,
            "enc_layers": 3,
            "hidden_dim": 256,
            "dim_feedforward": 1024,
            "num_queries": 60,
        },
        pretrain={**schedule(batch_size=32, steps=3125), "lr": 2e-4, "fre_cnn": True},
        finetune=schedule(batch_size=16, steps=1250),
        pretexts=pretext_flags(num_patches=10, patch_size=96, max_prop=10, proposals="edge_boxes"),
        lr=4e-4,
        backbone_lr=0.1,
        evaluations=5,
    ),
    "paper": Preset(
        title="published settings: 8 GPUs for days, on all of the data prepared with --image_size 800",
        model={"backbone_weights": "swav"},
        # Images per GPU.
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
    """A row of the tables: a pretext task, an ablation of one, or a checkpoint.

    Attributes:
        name: PRETEXT, PRETEXT-CHANGE, or the name in `--pretrained NAME=FILE`.
        changes: flags of pre-training that differ from the preset's; None removes a flag.
        description: what the changes mean, for the report.
        labelled_images: pre-train only on the labelled training images that have a box, without their labels.
        step_factor: pre-training steps, as a multiple of the preset's.
        checkpoint: file to start from instead of a pre-training of this study.
        compare_with: a row that the report compares it with, besides its pretext task.
    """

    name: str
    changes: Flags = field(default_factory=dict)
    description: str = ""
    labelled_images: bool = False
    step_factor: int = 1
    checkpoint: str = ""
    compare_with: str = ""

    @property
    def pretext(self) -> str:
        return self.name.partition("-")[0]

    @property
    def is_pretrained(self) -> bool:
        """Whether this study pre-trains it."""
        return self.name != NO_PRETRAINING and not self.checkpoint


_RANDOM_BOXES = {"proposals": "random"}, "random boxes instead of proposals"
_TRAINED_BACKBONE = {"fre_cnn": None, "lr_backbone": 2e-5}, "the backbone is trained too"
ABLATIONS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        # Random query patch (UP-DETR)
        Variant(
            "random_query_patch-selective_search",
            {"proposals": "selective_search"},
            "patches of proposals",
        ),
        Variant("random_query_patch-trained_cnn", *_TRAINED_BACKBONE),
        Variant(
            "random_query_patch-no_reconstruction",
            {"feature_recon": None},
            "no feature reconstruction loss",
        ),
        # Region prior (DETReg)
        Variant("region_prior-random", *_RANDOM_BOXES),
        Variant(
            "region_prior-edge_boxes",
            {"proposals": "edge_boxes"},
            "EdgeBoxes",
        ),
        Variant(
            "region_prior-selective_search",
            {"proposals": "selective_search"},
            "selective search, as published",
        ),
        # Ground-truth boxes exist for the labelled images only. The row before them has the same images, so that
        # the two differ in the boxes alone.
        Variant(
            "region_prior-labelled_images",
            {},
            "only the images of region_prior-true_boxes",
            labelled_images=True,
        ),
        Variant(
            "region_prior-true_boxes",
            {"proposals": "file:{data}/annotations/true_boxes.json"},
            "ground-truth boxes without classes, of all labelled training images",
            labelled_images=True,
            compare_with="region_prior-labelled_images",
        ),
        Variant("region_prior-trained_cnn", *_TRAINED_BACKBONE),
        Variant(
            "region_prior-no_embedding", {"object_embedding_loss": None}, "no object embedding loss"
        ),
        # Siamese DETR
        Variant("siamese-random", *_RANDOM_BOXES),
        Variant("siamese-edge_boxes", {"proposals": "edge_boxes"}, "EdgeBoxes, as published"),
        Variant("siamese-selective_search", {"proposals": "selective_search"}, "selective search"),
        Variant("siamese-no_regions", {"feature_loss_coef": 0}, "no region discrimination"),
        Variant("siamese-no_global", {"global_loss_coef": 0}, "no global discrimination"),
        # All pretext tasks
        *(
            Variant(
                f"{name}-longer",
                {},
                f"{LONGER_FACTOR} times the pre-training steps",
                step_factor=LONGER_FACTOR,
            )
            for name in PRETEXTS
        ),
    )
}


def get_variant(name: str) -> Variant:
    """Return an ablation, or a pretext task with the preset's settings."""
    return ABLATIONS.get(name) or Variant(name)


def checkpoint_variant(text: str) -> Variant:
    """Return the row of `--pretrained NAME=FILE`.

    Raises:
        UserError: no such file, or a name that is another row's or can't be a folder's.
    """
    name, _, file = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not file:
        raise UserError(
            f"--pretrained {text}: give NAME=FILE, with letters, digits and any of _ . - in the name"
        )
    if name in (NO_PRETRAINING, *PRETEXTS, *ABLATIONS):
        raise UserError(
            f"--pretrained {text}: {name} is another row's name; choose a different one"
        )
    if not Path(file).is_file():
        raise UserError(f"--pretrained {text}: {file} does not exist; correct the path")
    return Variant(name, checkpoint=str(Path(file).resolve()))
