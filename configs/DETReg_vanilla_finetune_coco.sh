#!/usr/bin/env bash
# DETReg on DETR, fine-tuned on COCO: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 41.9, without the settings. Here: 150 epochs with the drop after 100.
# From DETReg's own pre-training on DETR, which is pre-norm; whether the row is, is not said. The norm order is that of the checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 \
    --pretrain exps/DETReg_top30_in_detr/checkpoint.pth \
    --output_dir exps/DETReg_vanilla_finetune_coco "$@"
