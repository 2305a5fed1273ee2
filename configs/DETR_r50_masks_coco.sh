#!/bin/sh
# DETR-R50 (Carion et al., ECCV 2020): instance segmentation on COCO, a mask head on the frozen detector of the
# authors. Published: the schedule, that of panoptic segmentation; no result for instances alone.
# Another detector, Conditional and Deformable DETR too: --frozen_weights PATH
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --masks --epochs 25 --lr_drop 15 \
    --frozen_weights https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth \
    --output_dir exps/DETR_r50_masks_coco "$@"
