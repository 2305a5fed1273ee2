#!/usr/bin/env bash
# UP-DETR's pretext on Conditional DETR with 100 queries: the baseline of Siamese DETR (CVPR 2023), on COCO's images without their labels.
# Published: 16 GPUs, 4 images each (64 in all), 120k steps with the drop after 80k: x 64 / 118287 images = 65 and 43 epochs.
# COCO images have short sides of 480 to 800 in that code base; --image_size 800 makes UP-DETR's 320 to 480 to 533 to 800.
# It has no number of its own; see UPDETR_conditional_finetune_voc_from_coco.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} main.py \
    --pretext random_query_patch --detector conditional_detr --num_queries 100 --lr_drop 43 --epochs 65 --num_patches 10 --batch_size 4 \
    --feature_recon --fre_cnn --coco_path data/MSCoco --image_size 800 --max_size 1333 \
    --output_dir exps/UPDETR_conditional_pretrain_coco "$@"
