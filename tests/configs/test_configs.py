"""Configs and launchers, without training."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.documents import CONFIGS, DOCUMENTS, ROOT, config_words, parse

DETR = {
    "detector": "detr",
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "batch_size": 2,
    "num_queries": 100,
    "pre_norm": False,
    "dilation": False,
}
DETR_500 = {
    **DETR,
    "epochs": 500,
    "lr_drop": 400,
    "backbone_weights": "imagenet",
    "backbone": "resnet50",
}
DETR_PANOPTIC = {
    "_boxes": {"dataset_file": "coco_panoptic", "masks": False, "epochs": 300, "lr_drop": 200},
    "": {"dataset_file": "coco_panoptic", "masks": True, "epochs": 25, "lr_drop": 15},
}
DETR_50 = {**DETR_500, "epochs": 50, "lr_drop": 40}
CONDITIONAL = {
    "detector": "conditional_detr",
    "epochs": 50,
    "lr_drop": 40,
    "batch_size": 2,
    "num_queries": 300,
    "backbone": "resnet50",
    "dilation": False,
    "lr_backbone": 1e-5,
    "set_cost_class": 2.0,
    "cls_loss_coef": 2.0,
    "resume": "auto",
}
UPDETR_PRETRAIN = {
    "pretext": "random_query_patch",
    "epochs": 60,
    "lr_drop": 40,
    "num_patches": 10,
    "num_queries": 100,
    "feature_recon": True,
    "fre_cnn": True,
    "lr": 1e-4,
    "lr_backbone": 0.0,
    "backbone_weights": "swav",
    "image_size": 480,
    "cls_loss_coef": 1.0,
    "set_cost_class": 1.0,
    "classification": "softmax",
    "eos_coef": 0.1,
    "mask_ratio": 0.1,
    "feature_loss_coef": 1.0,
    "position_embedding": "sine",
    "pre_norm": False,
}
DEFORMABLE = {
    "detector": "deformable_detr",
    "lr": 2e-4,
    "lr_backbone": 2e-5,
    "lr_linear_proj_mult": 0.1,
    "batch_size": 2,
    "epochs": 50,
    "lr_drop": 40,
    "num_queries": 300,
    "num_feature_levels": 4,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "dim_feedforward": 1024,
    "dilation": False,
    "with_box_refine": False,
    "two_stage": False,
    "set_cost_class": 2.0,
    "cls_loss_coef": 2.0,
    "backbone": "resnet50",
    "position_embedding": "sine_shifted",
    "backbone_weights": "imagenet",
}
# UP-DETR's pretext on Deformable DETR, in the code base of Siamese DETR: one rate for all parameters.
UPDETR_DEFORMABLE = {
    **UPDETR_PRETRAIN,
    "detector": "deformable_detr",
    "batch_size": 8,
    "num_queries": 300,
    "num_feature_levels": 4,
    "dim_feedforward": 1024,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "lr_linear_proj_mult": 1.0,
}
DETREG_PRETRAIN = {
    "pretext": "region_prior",
    "detector": "deformable_detr",
    "strategy": "topk",
    "proposals": "selective_search",
    "ss_resize": 128,
    "backbone_weights": "swav",
    "object_embedding_loss": True,
    "object_embedding_coef": 1.0,
    "obj_embedding_head": "intermediate",
    "lr_backbone": 0.0,
    "lr": 2e-4,
    "lr_drop": 40,
    "batch_size": 4,
    "num_queries": 300,
    "image_size": 480,
    "num_classes": 91,
    "classification": "focal",
    "cls_loss_coef": 2.0,
    "set_cost_class": 2.0,
    "position_embedding": "sine_shifted",
    "dim_feedforward": 1024,
    "num_feature_levels": 4,
    "clip_max_norm": 0.1,
    "weight_decay": 1e-4,
}
# Siamese DETR: one rate for all parameters, a schedule in steps, and weights of the two discriminations by data and
# detector.
SIAMESE = {
    "pretext": "siamese",
    "proposals": "edge_boxes",
    "num_patches": 10,
    "box_disturbance": 0.1,
    "view_iou": 0.5,
    "view_shrink": True,
    "lr": 1e-4,
    "lr_backbone": 0.0,
    "lr_linear_proj_mult": 1.0,
    "weight_decay": 1e-4,
    "clip_max_norm": 0.1,
    "backbone_weights": "swav",
    "classification": "softmax",
    "cls_loss_coef": 1.0,
    "bbox_loss_coef": 5.0,
    "giou_loss_coef": 2.0,
    "eos_coef": 0.1,
    "set_cost_class": 1.0,
    "set_cost_bbox": 5.0,
    "set_cost_giou": 2.0,
    "position_embedding": "sine",
    "pre_norm": False,
    "dropout": 0.1,
}
SIAMESE_IN = {
    **SIAMESE,
    "imagenet_path": "data/ilsvrc/train",
    "image_size": 480,
    "max_iters": 300_000,
    "lr_drop_iters": 200_000,
    "batch_size": 8,
    "global_loss_coef": 10.0,
    "feature_loss_coef": 3.0,
    "dim_feedforward": 2048,
    "num_queries": 100,
}
SIAMESE_CONDITIONAL_IN = {**SIAMESE_IN, "detector": "conditional_detr", "feature_loss_coef": 5.0}
SIAMESE_COCO = {
    **SIAMESE,
    "detector": "conditional_detr",
    "num_queries": 100,
    "coco_path": "data/MSCoco",
    "image_size": 800,
    "max_iters": 120_000,
    "lr_drop_iters": 80_000,
    "batch_size": 4,
    "global_loss_coef": 0.3,
    "feature_loss_coef": 3.0,
}
SIAMESE_DEFORMABLE = {
    **SIAMESE_IN,
    "detector": "deformable_detr",
    "num_queries": 300,
    "batch_size": 4,
    "dim_feedforward": 1024,
    "num_feature_levels": 4,
}
DETREG_PASCAL = {
    "dataset_file": "voc",
    "voc_path": "data/pascal/VOCdevkit",
    "voc_train": ["2007_trainval", "2012_trainval"],
    "voc_val": ["2007_test"],
    "voc_metric": "11point",
    "num_classes": 21,
    "pretrain": "exps/DETReg_top30_in/checkpoint.pth",
}
DETREG_FEW_SHOT = {
    "coco_path": "data/MSCoco",
    "pretrain": "exps/DETReg_top30_in/checkpoint.pth",
    "batch_size": 4,
    "novel_classes": None,
}
VOC_AS_COCO = {
    "dataset_file": "voc_coco",
    "voc_train": ["2012_trainval"],
    "voc_val": ["2007_test"],
    "filter_pct": -1.0,
}
SIAMESE_DATA = {"coco": {"dataset_file": "coco"}, "voc": VOC_AS_COCO}
# The columns of Siamese DETR's tables: three detectors.
COLUMNS = {
    "vanilla": {**DETR, "epochs": 150, "lr_drop": 100, "lr_backbone": 5e-5},
    "conditional": {**CONDITIONAL, "num_queries": 100, "lr_backbone": 5e-5, "resume": ""},
    "deformable": {**DEFORMABLE, "backbone_weights": "none"},
}
PRE_TRAINED = {
    "UPDETR": {column: f"UPDETR_{column}_pretrain_in" for column in COLUMNS},
    "DETReg": {
        "vanilla": "DETReg_top30_in_detr",
        "conditional": "DETReg_conditional_pretrain_in",
        "deformable": "DETReg_top30_in",
    },
    "Siamese": {
        "vanilla": "r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
        "conditional": "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w",
        "deformable": "r50_deformtr_ms_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w",
    },
}
DETREG_CONDITIONAL = {
    **DETREG_PRETRAIN,
    "max_prop": 30,
    "detector": "conditional_detr",
    "num_queries": 100,
    "lr": 1e-4,
    "dim_feedforward": 2048,
    "num_feature_levels": 1,
}
UPDETR_CONDITIONAL_COCO = {
    **UPDETR_PRETRAIN,
    "detector": "conditional_detr",
    "batch_size": 4,
    "epochs": 65,
    "lr_drop": 43,
    "image_size": 800,
    "max_size": 1333,
    "coco_path": "data/MSCoco",
}
UPDETR_FINETUNE = {
    **DETR,
    "epochs": 300,
    "lr_drop": 200,
    "lr_backbone": 5e-5,
    "pre_norm": True,
    "backbone_weights": "none",
    "pretrain": "exps/UPDETR_pretrain_in/checkpoint.pth",
}
PUBLISHED = {
    "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w": SIAMESE_CONDITIONAL_IN,
    "r50_condtr_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w": {
        **SIAMESE_CONDITIONAL_IN,
        "num_queries": 300,
    },
    "r50_condtr_100q_syncbn_coco_edgebox_rdiscr_gdiscr_gpu16_step12w": SIAMESE_COCO,
    "r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w": {
        **SIAMESE_IN,
        "detector": "detr",
    },
    "r50_deformtr_ms_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w": SIAMESE_DEFORMABLE,
    "r50_deformtr_ss_300q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu64_step30w": {
        **SIAMESE_DEFORMABLE,
        "num_feature_levels": 1,
    },
    "r50_condtr_100q_imgnet_edgebox_gpu32_step30w": {
        **SIAMESE_CONDITIONAL_IN,
        "feature_loss_coef": 0.0,
        "global_loss_coef": 0.0,
    },
    "r50_condtr_100q_imgnet_edgebox_rdiscr_gpu32_step30w": {
        **SIAMESE_CONDITIONAL_IN,
        "global_loss_coef": 0.0,
    },
    "r50_condtr_100q_syncbn_imgnet_edgebox_gdiscr_gpu32_step30w": {
        **SIAMESE_CONDITIONAL_IN,
        "feature_loss_coef": 0.0,
    },
    "r50_condtr_100q_syncbn_coco_edgebox_iou0.3_rdiscr_gdiscr_gpu16_step12w": {
        **SIAMESE_COCO,
        "view_iou": 0.3,
    },
    "r50_condtr_100q_syncbn_coco_edgebox_iou0.7_rdiscr_gdiscr_gpu16_step12w": {
        **SIAMESE_COCO,
        "view_iou": 0.7,
    },
    "r50_condtr_100q_syncbn_coco_randbox_rdiscr_gdiscr_gpu16_step12w": {
        **SIAMESE_COCO,
        "proposals": "random",
    },
    "DETReg_top30_in": {
        **DETREG_PRETRAIN,
        "imagenet_path": "data/ilsvrc/train",
        "max_prop": 30,
        "epochs": 5,
    },
    "DETReg_top30_in100": {
        **DETREG_PRETRAIN,
        "imagenet_path": "data/ilsvrc100/train",
        "max_prop": 30,
        "epochs": 50,
    },
    "DETReg_top5_in100": {
        **DETREG_PRETRAIN,
        "imagenet_path": "data/ilsvrc100/train",
        "max_prop": 5,
        "epochs": 50,
    },
    "DETReg_top30_coco": {
        **DETREG_PRETRAIN,
        "coco_path": "data/MSCoco",
        "max_prop": 30,
        "epochs": 50,
    },
    "DETReg_top30_in_detr": {
        **DETREG_PRETRAIN,
        "imagenet_path": "data/ilsvrc/train",
        "max_prop": 30,
        "epochs": 60,
        "lr_drop": 200,
        "detector": "detr",
        "pre_norm": True,
        "num_queries": 100,
        "lr": 1e-4,
        "cls_loss_coef": 1.0,
        "set_cost_class": 1.0,
        "classification": "softmax",
        "dim_feedforward": 2048,
        "num_feature_levels": 1,
    },
    "DETReg_fine_tune_full_coco": {
        "coco_path": "data/MSCoco",
        "pretrain": "exps/DETReg_top30_in/checkpoint.pth",
        "batch_size": 4,
        "epochs": 50,
        "lr_drop": 40,
    },
    **{
        f"DETReg_fine_tune_{percent}pct_coco": {
            "coco_path": "data/MSCoco",
            "pretrain": "exps/DETReg_top30_coco/checkpoint.pth",
            "filter_pct": percent / 100,
            "seed": 42,
            "batch_size": 3,
            "epochs": epochs,
            "lr_drop": epochs,
        }
        for percent, epochs in ((1, 2000), (2, 1000), (5, 500), (10, 400))
    },
    "DETReg_fine_tune_full_pascal": {
        **DETREG_PASCAL,
        "batch_size": 4,
        "epochs": 100,
        "lr_drop": 70,
        "eval_every": 10,
        "filter_pct": -1.0,
    },
    "DETReg_fine_tune_10pct_pascal": {
        **DETREG_PASCAL,
        "batch_size": 4,
        "epochs": 200,
        "lr_drop": 150,
        "eval_every": 20,
        "filter_pct": 0.1,
    },
    "DETReg_conditional_pretrain_in": {
        **DETREG_CONDITIONAL,
        "imagenet_path": "data/ilsvrc/train",
        "epochs": 60,
        "lr_drop": 60,
    },
    "DETReg_conditional_pretrain_coco": {
        **DETREG_CONDITIONAL,
        "coco_path": "data/MSCoco",
        "epochs": 50,
    },
    "DETReg_top30_airbus": {
        **DETREG_PRETRAIN,
        "imagenet_path": "data/airbus-ship-detection/train_v2",
        "max_prop": 30,
        "epochs": 50,
    },
    "DETReg_fine_tune_airbus": {
        "dataset_file": "airbus_ship",
        "airbus_path": "data/airbus-ship-detection",
        "num_classes": 2,
        "batch_size": 4,
        "epochs": 50,
        "lr_drop": 40,
        "pretrain": "exps/DETReg_top30_airbus/checkpoint.pth",
    },
    "DETReg_few_shot_base_coco": {
        **DETREG_FEW_SHOT,
        "few_shot": "base",
        "epochs": 50,
        "lr_drop": 40,
    },
    **{
        f"DETReg_few_shot_{shots}shot_{name}": {
            **DETREG_FEW_SHOT,
            "few_shot": "all",
            "shots": shots,
            "few_shot_file": "data/cocosplit",
            **more,
        }
        for shots in (10, 30)
        for name, more in (
            (
                "coco",
                {
                    "pretrain": "exps/DETReg_few_shot_base_coco/checkpoint.pth",
                    "epochs": 150,
                    "lr_drop": 140,
                },
            ),
            ("no_base_coco", {"epochs": 1000, "lr_drop": 990}),
        )
    },
    "DETReg_few_shot_base_pascal": {
        **DETREG_PASCAL,
        "few_shot": "base",
        "novel_split": 1,
        "batch_size": 4,
        "epochs": 100,
        "lr_drop": 70,
        "eval_every": 10,
    },
    "DETReg_few_shot_10shot_pascal": {
        **DETREG_PASCAL,
        "few_shot": "all",
        "shots": 10,
        "novel_split": 1,
        "batch_size": 4,
        "epochs": 150,
        "lr_drop": 140,
        "eval_every": 50,
        "pretrain": "exps/DETReg_few_shot_base_pascal/checkpoint.pth",
    },
    "UPDETR_pretrain_in": {
        **UPDETR_PRETRAIN,
        "detector": "detr",
        "batch_size": 32,
        "pre_norm": True,
    },
    "UPDETR_finetune_coco": UPDETR_FINETUNE,
    "UPDETR_finetune_150epochs_coco": {**UPDETR_FINETUNE, "epochs": 150, "lr_drop": 100},
    **{
        f"UPDETR_finetune_{name}": {
            **UPDETR_FINETUNE,
            **VOC_AS_COCO,
            "voc_train": ["2007_trainval", "2012_trainval"],
            "epochs": epochs,
            "lr_drop": drop,
        }
        for name, epochs, drop in (("voc", 300, 200), ("150epochs_voc", 150, 100))
    },
    "UPDETR_eval_coco": {
        "detector": "detr",
        "eval": True,
        "batch_size": 2,
        "pre_norm": True,
        "aux_loss": False,
    },
    "UPDETR_conditional_pretrain_in": {
        **UPDETR_PRETRAIN,
        "detector": "conditional_detr",
        "batch_size": 16,
        "pre_norm": False,
    },
    "UPDETR_conditional_300q_pretrain_in": {
        **UPDETR_PRETRAIN,
        "detector": "conditional_detr",
        "batch_size": 16,
        "num_queries": 300,
    },
    "UPDETR_conditional_300q_finetune_coco": {**CONDITIONAL, "lr_backbone": 5e-5, "resume": ""},
    "UPDETR_conditional_pretrain_coco": {**UPDETR_CONDITIONAL_COCO, "proposals": "random"},
    "UPDETR_conditional_edgebox_pretrain_coco": {
        **UPDETR_CONDITIONAL_COCO,
        "proposals": "edge_boxes",
    },
    "UPDETR_vanilla_pretrain_in": {**UPDETR_PRETRAIN, "detector": "detr", "batch_size": 16},
    **{
        f"{prefix}_{column}_finetune_{data}": {
            **settings,
            **more,
            "pretrain": f"exps/{sources[column]}/checkpoint.pth",
        }
        for prefix, sources in PRE_TRAINED.items()
        for column, settings in COLUMNS.items()
        for data, more in SIAMESE_DATA.items()
        if (prefix, column, data)
        != ("DETReg", "deformable", "coco")  # that is DETReg_fine_tune_full_coco
    },
    **{
        f"Scratch_{column}_{data}": {**settings, **more, "backbone_weights": "swav", "pretrain": ""}
        for column, settings in COLUMNS.items()
        for data, more in SIAMESE_DATA.items()
    },
    **{
        f"{prefix}_conditional_finetune_voc_from_coco": {
            **COLUMNS["conditional"],
            **VOC_AS_COCO,
            "pretrain": f"exps/{source}/checkpoint.pth",
        }
        for prefix, source in (
            ("UPDETR", "UPDETR_conditional_pretrain_coco"),
            ("DETReg", "DETReg_conditional_pretrain_coco"),
            ("Siamese", "r50_condtr_100q_syncbn_coco_edgebox_rdiscr_gdiscr_gpu16_step12w"),
        )
    },
    **{
        f"DeformableDETR_{kind}_{percent}pct_coco": {
            **DEFORMABLE,
            "coco_path": "data/MSCoco",
            "filter_pct": percent / 100,
            "batch_size": 3,
            "epochs": epochs,
            "lr_drop": epochs,
            "backbone_weights": weights,
        }
        for kind, weights in (("supervised", "imagenet"), ("swav", "swav"))
        for percent, epochs in ((1, 2000), (2, 1000), (5, 500), (10, 400))
    },
    "UPDETR_deformable_pretrain_in": UPDETR_DEFORMABLE,
    "UPDETR_deformable_single_scale_pretrain_in": {**UPDETR_DEFORMABLE, "num_feature_levels": 1},
    "UPDETR_deformable_single_scale_finetune_coco": {
        **DEFORMABLE,
        "num_feature_levels": 1,
        "backbone_weights": "none",
    },
    "DETR_r50_coco": DETR_500,
    "DETR_r50_dc5_coco": {**DETR_500, "dilation": True, "batch_size": 1},
    "DETR_r101_coco": {**DETR_500, "backbone": "resnet101"},
    "DETR_r101_dc5_coco": {**DETR_500, "backbone": "resnet101", "dilation": True, "batch_size": 1},
    "DETR_r50_150epochs_coco": {**DETR_500, "epochs": 150, "lr_drop": 100},
    "DETR_r50_50epochs_coco": DETR_50,
    "DETR_r101_50epochs_coco": {**DETR_50, "backbone": "resnet101"},
    "DETR_r50_swav_coco": {
        **DETR,
        "epochs": 300,
        "lr_drop": 200,
        "lr_backbone": 5e-5,
        "pre_norm": True,
        "backbone": "resnet50",
        "backbone_weights": "swav",
    },
    **{
        f"DETR_{name}_panoptic{stage}": {**flags, **DETR_PANOPTIC[stage]}
        for name, flags in (
            ("r50", {"backbone": "resnet50"}),
            ("r50_dc5", {"backbone": "resnet50", "batch_size": 1}),
            ("r101", {"batch_size": 2}),
        )
        for stage in ("_boxes", "")
    },
    "DETR_r50_masks_coco": {
        "dataset_file": "coco",
        "masks": True,
        "epochs": 25,
        "lr_drop": 15,
        "frozen_weights": "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth",
    },
    "DETR_panoptic_eval": {
        "dataset_file": "coco_panoptic",
        "masks": True,
        "eval": True,
        "batch_size": 2,
        "aux_loss": False,
    },
    "DETR_eval_coco": {"detector": "detr", "eval": True, "batch_size": 2, "aux_loss": False},
    "ConditionalDETR_r50_coco": CONDITIONAL,
    "ConditionalDETR_r50_dc5_coco": {**CONDITIONAL, "dilation": True, "batch_size": 1},
    "ConditionalDETR_r101_coco": {**CONDITIONAL, "backbone": "resnet101"},
    "ConditionalDETR_r101_dc5_coco": {
        **CONDITIONAL,
        "backbone": "resnet101",
        "dilation": True,
        "batch_size": 1,
    },
    "ConditionalDETR_eval_coco": {"detector": "conditional_detr", "eval": True, "batch_size": 2},
    "r50_deformable_detr": DEFORMABLE,
    "r50_deformable_detr_single_scale": {**DEFORMABLE, "num_feature_levels": 1},
    "r50_deformable_detr_single_scale_dc5": {
        **DEFORMABLE,
        "num_feature_levels": 1,
        "dilation": True,
    },
    "r50_deformable_detr_plus_iterative_bbox_refinement": {**DEFORMABLE, "with_box_refine": True},
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage": {
        **DEFORMABLE,
        "with_box_refine": True,
        "two_stage": True,
    },
    "r50_deformable_detr_eval": {"detector": "deformable_detr", "eval": True, "batch_size": 2},
}


# ------------------------------------------------------------------------------------------------------------- configs


def test_every_config_is_in_the_table() -> None:
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_gives_the_published_settings(name: str) -> None:
    args = parse(config_words(CONFIGS[name]))
    settings = {flag: getattr(args, flag) for flag in PUBLISHED[name]}
    assert settings == PUBLISHED[name]
    assert args.output_dir == f"exps/{name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_from_any_directory_and_extra_flags_win(name: str, tmp_path: Path) -> None:
    here, there = (
        config_words(CONFIGS[name]),
        config_words(CONFIGS[name], "--seed", "7", "--output_dir", "a b", cwd=tmp_path),
    )
    assert there == [*here, "--seed", "7", "--output_dir", "a b"]
    args = parse(there, resolved=False)
    assert (args.seed, args.output_dir) == (7, "a b")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_has_comment_and_one_command(name: str) -> None:
    """The comment has the publication and its result or hardware; one command follows."""
    lines = CONFIGS[name].read_text().splitlines()
    comment = " ".join(line for line in lines[1:] if line.startswith("#"))
    assert re.search(r"(ECCV|CVPR|ICCV|ICLR) 20\d\d", comment)
    assert "Published: " in comment
    code = [line for line in lines if not line.startswith("#")]
    assert code[:2] == ["set -eu", 'cd "$(dirname "$0")/.."']
    assert "\n".join(code[2:]).count("exec ") == 1
    assert os.access(CONFIGS[name], os.X_OK)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_mentioned_in_documents(name: str) -> None:
    assert any(f"configs/{name}.sh" in path.read_text() for path in DOCUMENTS)


# ------------------------------------------------------------------------------------------------------------ launcher


@pytest.fixture
def fake_python(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` prints its arguments, one per line."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    script.chmod(0o755)
    own = ("LAUNCH", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {**kept, "PATH": f"{script.parent}:{os.environ['PATH']}"}


def launch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "tools" / "run_dist_launch.sh"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_config_runs_on_one_process(fake_python: dict[str, str]) -> None:
    done = subprocess.run(
        ["sh", str(CONFIGS["DETR_r50_coco"])],
        env=fake_python,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == config_words(CONFIGS["DETR_r50_coco"])


@pytest.mark.parametrize(
    ("processes", "settings", "expected"),
    [
        ("2", {}, ("1", 2, 0, "127.0.0.1", 29500)),
        ("8", {"GPUS_PER_NODE": "8"}, ("1", 8, 0, "127.0.0.1", 29500)),
        ("16", {}, ("2", 8, 0, "127.0.0.1", 29500)),
        (
            "16",
            {"GPUS_PER_NODE": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "1234"},
            ("4", 4, 3, "first", 1234),
        ),
    ],
)
@pytest.mark.parametrize("target", ["configs/UPDETR_pretrain_in.sh", "main.py"])
def test_launcher_starts_torchrun_with_the_command(
    fake_python: dict[str, str],
    target: str,
    processes: str,
    settings: dict[str, str],
    expected: tuple,
) -> None:
    from torch.distributed.run import get_args_parser

    done = launch({**fake_python, **settings}, processes, target, "--imagenet_path", "my images")
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "torch.distributed.run"], done.stderr
    run = get_args_parser().parse_args(words[2:])
    assert (
        run.nnodes,
        int(run.nproc_per_node),
        run.node_rank,
        run.master_addr,
        run.master_port,
    ) == expected
    assert run.training_script == "main.py"
    assert run.training_script_args[-2:] == ["--imagenet_path", "my images"]
    assert parse(["main.py", *run.training_script_args]).imagenet_path == "my images"


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (("2",), {}, "usage"),
        (("0", "main.py"), {}, "'0'"),
        (("two", "main.py"), {}, "'two'"),
        (("2", "configs/nothing.sh"), {}, "configs/nothing.sh does not exist"),
        (("2", "README.md"), {}, "README.md"),
        (("12", "main.py"), {}, "12 processes"),
        (("8", "main.py"), {"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE"),
    ],
)
def test_launcher_errors_are_one_line(
    fake_python: dict[str, str], arguments: tuple, settings: dict[str, str], said: str
) -> None:
    done = launch({**fake_python, **settings}, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
