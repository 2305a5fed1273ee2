#!/bin/sh
# UP-DETR's pretext on Conditional DETR with 100 queries: baseline of Siamese DETR (CVPR 2023) on ImageNet.
# Published: 16 GPUs x 16 images (batch 256), 300k steps, lr drop after 200k: about 60 and 40 epochs.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --detector conditional_detr --num_queries 100 --lr_drop 40 --epochs 60 --num_patches 10 --batch_size 16 \
    --feature_recon --fre_cnn --imagenet_path data/ilsvrc/train \
    --output_dir exps/UPDETR_conditional_pretrain_in "$@"
