#!/bin/sh
# DETReg (Bar et al., CVPR 2022) with Deformable DETR on ImageNet: top 30 selective search boxes per image.
# Published: 8 GPUs x 24 images (batch 192), --num_workers 8, 5 epochs; no lr drop.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector deformable_detr --strategy topk --load_backbone swav --object_embedding_loss --lr_backbone 0 \
    --dataset imagenet --max_prop 30 --epochs 5 --lr_drop 40 \
    --output_dir exps/DETReg_top30_in "$@"
