#!/usr/bin/env bash
# DETReg (Bar et al., CVPR 2022), fine-tuned on 10 % of the images of COCO from DETReg_top30_coco.
# Published: AP 29.12, mean of several draws; 8 GPUs, 3 images each (24 in all), 400 epochs without a drop of the rate.
# Evaluation takes longer than such a short epoch: add --eval_every 50.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --filter_pct .1 --pretrain exps/DETReg_top30_coco/checkpoint.pth \
    --batch_size 3 --epochs 400 --lr_drop 400 \
    --output_dir exps/DETReg_fine_tune_10pct_coco "$@"
