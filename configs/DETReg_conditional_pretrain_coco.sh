#!/bin/sh
# DETReg on Conditional DETR with 100 queries, on COCO's images: top 30 selective search boxes per image.
# Baseline of Siamese DETR (CVPR 2023).
# Published: neither settings nor an AP of its own. Here: 50 epochs, lr drop after 40, as for DETReg on Deformable DETR.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector conditional_detr --num_queries 100 --strategy topk --load_backbone swav --object_embedding_loss \
    --lr_backbone 0 --dataset coco_pretrain --max_prop 30 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_conditional_pretrain_coco "$@"
