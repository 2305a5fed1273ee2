#!/bin/sh
# DETReg (Bar et al., CVPR 2022) with Deformable DETR on the images of Airbus Ship Detection:
# top 30 selective search boxes per image.
# Published: the name of the dataset only. Settings: as for DETReg_top30_coco.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector deformable_detr --strategy topk --load_backbone swav --object_embedding_loss --lr_backbone 0 \
    --dataset airbus_pretrain --max_prop 30 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_top30_airbus "$@"
