#!/usr/bin/env bash
# DETR-DC5-R50 (Carion et al., ECCV 2020) on COCO.
# Published: AP 43.3 after 500 epochs; README: 8 GPUs, 1 image each.
# The README's command has no schedule, which means 300 epochs with the drop after 200; for that: --epochs 300 --lr_drop 200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 500 --lr_drop 400 --dilation --batch_size 1 \
    --output_dir exps/DETR_r50_dc5_coco "$@"
