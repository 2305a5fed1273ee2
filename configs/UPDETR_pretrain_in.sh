#!/usr/bin/env bash
# UP-DETR (Dai et al., CVPR 2021): random query patch detection on ImageNet, with the SwAV ResNet-50 frozen.
# Published: 8 V100, 32 images each (256 in all), 60 epochs, about 5 days. It has no number of its own; see UPDETR_finetune_coco.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} main.py \
    --lr_drop 40 --epochs 60 --pre_norm --num_patches 10 --batch_size 32 --feature_recon --fre_cnn \
    --imagenet_path data/ilsvrc/train \
    --output_dir exps/UPDETR_pretrain_in "$@"
