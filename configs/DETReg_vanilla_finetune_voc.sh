#!/bin/sh
# DETReg on DETR, fine-tuned on PASCAL VOC: baseline of Siamese DETR (CVPR 2023).
# Published: AP 57.0; settings not published. Here: 150 epochs, lr drop after 100.
# From DETReg's own pre-training on DETR, which is pre-norm; whether the published row is, is not stated.
# The norm order comes from the checkpoint.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/DETReg_top30_in_detr/checkpoint.pth \
    --output_dir exps/DETReg_vanilla_finetune_voc "$@"
