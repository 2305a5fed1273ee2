#!/bin/sh
# DETR-R101 (Carion et al., ECCV 2020) on COCO.
# Published: AP 43.5 after 500 epochs; README: 8 GPUs x 2 images.
# The README's command uses the default schedule instead: --epochs 300 --lr_drop 200
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 500 --lr_drop 400 --backbone resnet101 \
    --output_dir exps/DETR_r101_coco "$@"
