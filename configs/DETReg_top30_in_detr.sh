#!/bin/sh
# DETReg (Bar et al., CVPR 2022) with DETR, pre-norm, on ImageNet: top 30 selective search boxes per image.
# Published: 8 GPUs x 24 images (batch 192), --num_workers 8, 60 epochs; no lr drop.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector detr --strategy topk --load_backbone swav --object_embedding_loss --object_embedding_coef 1 \
    --lr_backbone 0 --pre_norm --dataset imagenet --max_prop 30 --epochs 60 --lr_drop 200 \
    --output_dir exps/DETReg_top30_in_detr "$@"
