#!/usr/bin/env bash
# DETReg (Bar et al., CVPR 2022) with DETR, pre-norm, on ImageNet: 30 boxes of selective search an image.
# Published: 8 GPUs, `--batch_size 24` each (192 in all), `--num_workers 8`, 60 epochs; the rate never drops.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector detr --strategy topk --load_backbone swav --object_embedding_loss --object_embedding_coef 1 \
    --lr_backbone 0 --pre_norm --dataset imagenet --max_prop 30 --epochs 60 --lr_drop 200 \
    --output_dir exps/DETReg_top30_in_detr "$@"
