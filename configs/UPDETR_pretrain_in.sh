#!/bin/sh
# UP-DETR (Dai et al., CVPR 2021): random query patch detection on ImageNet, with a frozen SwAV ResNet-50.
# Published: 8 V100 x 32 images (batch 256), 60 epochs, about 5 days. No AP of its own; see UPDETR_finetune_coco.sh.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --lr_drop 40 --epochs 60 --pre_norm --num_patches 10 --batch_size 32 --feature_recon --fre_cnn \
    --imagenet_path data/ilsvrc/train \
    --output_dir exps/UPDETR_pretrain_in "$@"
