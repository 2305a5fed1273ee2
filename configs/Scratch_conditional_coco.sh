#!/usr/bin/env bash
# Conditional DETR with 100 queries on COCO without pre-training: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 37.7; schedule and rates are those of its fine-tuning scripts, 50 epochs with the drop after 40, 2 images a GPU.
# Where the backbone starts is not said; the published code for fine-tuning leaves it random. Here SwAV's weights, as pre-training has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 100 --lr_backbone 5e-5 --backbone_weights swav \
    --output_dir exps/Scratch_conditional_coco "$@"
