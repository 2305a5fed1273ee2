#!/bin/sh
# DETReg (Bar et al., CVPR 2022), fine-tuned on COCO from DETReg_top30_in.
# Published: AP 45.5 (by Siamese DETR), 8 GPUs x 4 images (batch 32), 50 epochs, about 2 days on V100.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --pretrain exps/DETReg_top30_in/checkpoint.pth --batch_size 4 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_fine_tune_full_coco "$@"
