#!/bin/sh
# DETR-R101 (Carion et al., ECCV 2020): panoptic segmentation on COCO, the second stage: a mask head on the frozen
# detector of DETR_r101_panoptic_boxes. Published: box AP 40.1, mask AP 33, PQ 45.1; README: 8 GPUs x 2 images.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file coco_panoptic --masks \
    --epochs 25 --lr_drop 15 --frozen_weights exps/DETR_r101_panoptic_boxes/checkpoint.pth \
    --output_dir exps/DETR_r101_panoptic "$@"
