#!/usr/bin/env bash
# DETR, post-norm on COCO without pre-training: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 39.7, without the settings. Here: 150 epochs with the drop after 100.
# Where the backbone starts is not said; the published code for fine-tuning leaves it random. Here SwAV's weights, as pre-training has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --backbone_weights swav \
    --output_dir exps/Scratch_vanilla_coco "$@"
