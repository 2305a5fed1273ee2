#!/bin/sh
# UP-DETR's pretext on Deformable DETR with one level and 300 queries: baseline of Siamese DETR (CVPR 2023) on ImageNet.
# Published: 32 GPUs x 8 images (batch 256), 300k steps, lr drop after 200k: x 256 / 1.28M images = 60 and 40 epochs.
# --position_embedding sine: that codebase does not shift the encoding by half a cell as Deformable DETR does.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --detector deformable_detr --num_feature_levels 1 --position_embedding sine --lr_drop 40 --epochs 60 --num_patches 10 --batch_size 8 \
    --feature_recon --fre_cnn --imagenet_path data/ilsvrc/train \
    --output_dir exps/UPDETR_deformable_single_scale_pretrain_in "$@"
