#!/usr/bin/env bash
# DETReg on Conditional DETR with 100 queries: the baseline of Siamese DETR (CVPR 2023), on COCO's images: 30 boxes of selective search.
# Published: no settings, and no number of its own. Here: 50 epochs with the drop after 40, as DETReg on Deformable DETR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector conditional_detr --num_queries 100 --strategy topk --load_backbone swav --object_embedding_loss \
    --lr_backbone 0 --dataset coco_pretrain --max_prop 30 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_conditional_pretrain_coco "$@"
