#!/bin/sh
# DETR-DC5-R50 (Carion et al., ECCV 2020): panoptic segmentation on COCO, the second stage: a mask head on the frozen
# detector of DETR_r50_dc5_panoptic_boxes. Published: box AP 40.2, mask AP 31.9, PQ 44.6; README: 8 GPUs x 1 image.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file coco_panoptic --masks \
    --epochs 25 --lr_drop 15 --frozen_weights exps/DETR_r50_dc5_panoptic_boxes/checkpoint.pth \
    --batch_size 1 \
    --output_dir exps/DETR_r50_dc5_panoptic "$@"
