#!/bin/sh
# DETReg on DETR, fine-tuned on COCO: baseline of Siamese DETR (CVPR 2023).
# Published: AP 41.9; settings not published. Here: 150 epochs, lr drop after 100.
# From DETReg's own pre-training on DETR, which is pre-norm; whether the published row is, is not stated.
# The norm order comes from the checkpoint.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 \
    --pretrain exps/DETReg_top30_in_detr/checkpoint.pth \
    --output_dir exps/DETReg_vanilla_finetune_coco "$@"
