#!/bin/sh
# DETR-DC5-R101 (Carion et al., ECCV 2020) on COCO.
# Published: AP 44.9 after 500 epochs; README: 8 GPUs x 1 image.
# The README's command uses the default schedule instead: --epochs 300 --lr_drop 200
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 500 --lr_drop 400 --backbone resnet101 --dilation --batch_size 1 \
    --output_dir exps/DETR_r101_dc5_coco "$@"
