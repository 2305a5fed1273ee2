#!/bin/sh
# DETR-R50 with SwAV's backbone on COCO: the baseline in the table of UP-DETR (Dai et al., CVPR 2021).
# Published: AP 42.1 after 300 epochs; settings not published. Here as for UP-DETR's fine-tuning, from another backbone.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --backbone_weights swav --lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm \
    --output_dir exps/DETR_r50_swav_coco "$@"
