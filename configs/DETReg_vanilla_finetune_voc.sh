#!/usr/bin/env bash
# DETReg on DETR, fine-tuned on PASCAL VOC: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 57.0, without the settings. Here: 150 epochs with the drop after 100.
# From DETReg's own pre-training on DETR, which is pre-norm; whether the row is, is not said. The norm order is that of the checkpoint.
# Trained on the trainval images of 2012, evaluated on the test images of 2007 by COCO's metric, `difficult` objects included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/DETReg_top30_in_detr/checkpoint.pth \
    --output_dir exps/DETReg_vanilla_finetune_voc "$@"
