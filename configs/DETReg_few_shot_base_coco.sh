#!/bin/sh
# DETReg (Bar et al., CVPR 2022), few-shot:
# base training on the 60 classes of COCO that VOC does not have, from DETReg_top30_in.
# Published: as for full COCO, 8 GPUs x 4 images (batch 32), 50 epochs.
# The initial weights are not published; here those of full COCO.
# Then DETReg_few_shot_10shot_coco or DETReg_few_shot_30shot_coco.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --few_shot base --pretrain exps/DETReg_top30_in/checkpoint.pth --batch_size 4 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_few_shot_base_coco "$@"
