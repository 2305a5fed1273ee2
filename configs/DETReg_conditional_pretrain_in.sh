#!/bin/sh
# DETReg on Conditional DETR with 100 queries, on ImageNet: top 30 selective search boxes per image.
# Baseline of Siamese DETR (CVPR 2023).
# Published: neither settings nor an AP of its own. Here: 60 epochs without lr drop, as for DETReg on DETR.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector conditional_detr --num_queries 100 --strategy topk --load_backbone swav --object_embedding_loss \
    --lr_backbone 0 --dataset imagenet --max_prop 30 --epochs 60 --lr_drop 60 \
    --output_dir exps/DETReg_conditional_pretrain_in "$@"
