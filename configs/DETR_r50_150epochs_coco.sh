#!/bin/sh
# DETR-R50 (Carion et al., ECCV 2020) on COCO, the short schedule.
# Published: AP 39.5 after 150 epochs.
# The epoch of the lr drop is not published; here 100, the same proportion as 200 of 300.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 \
    --output_dir exps/DETR_r50_150epochs_coco "$@"
