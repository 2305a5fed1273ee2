#!/bin/sh
# DETReg (Bar et al., CVPR 2022) with Deformable DETR on ImageNet-100: top 5 selective search boxes per image.
# Published: 8 GPUs x 24 images (batch 192), --num_workers 8, 50 epochs.
# The images: python tools/link_imagenet100.py --imagenet data/ilsvrc --output_dir data/ilsvrc100
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext region_prior --detector deformable_detr --strategy topk --load_backbone swav --object_embedding_loss --lr_backbone 0 \
    --dataset imagenet100 --max_prop 5 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_top5_in100 "$@"
