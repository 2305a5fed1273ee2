#!/bin/sh
# DETReg (Bar et al., CVPR 2022), few-shot without base training:
# 30 objects of each of COCO's 80 classes, from DETReg_top30_in.
# Published: 1000 epochs, lr drop after 990.
# The objects: those of Wang et al. (ICML 2020), see DETReg_few_shot_30shot_coco. Evaluation: add --eval_every 50.
# Batch size: not published; here as for full COCO, 8 GPUs x 4 images.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --few_shot all --few_shot_file data/cocosplit --shots 30 \
    --pretrain exps/DETReg_top30_in/checkpoint.pth --batch_size 4 --epochs 1000 --lr_drop 990 \
    --output_dir exps/DETReg_few_shot_30shot_no_base_coco "$@"
