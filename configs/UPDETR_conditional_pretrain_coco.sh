#!/bin/sh
# UP-DETR's pretext on Conditional DETR with 100 queries:
# baseline of Siamese DETR (CVPR 2023), on COCO's images without their labels.
# Published: 16 GPUs x 4 images (batch 64), 120k steps, lr drop after 80k: x 64 / 118287 images = 65 and 43 epochs.
# COCO images have short sides of 480 to 800 in that codebase;
# --image_size 800 makes UP-DETR's 320 to 480 to 533 to 800.
# No AP of its own; see UPDETR_conditional_finetune_voc_from_coco.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext random_query_patch --detector conditional_detr --num_queries 100 --lr_drop 43 --epochs 65 --num_patches 10 --batch_size 4 \
    --feature_recon --fre_cnn --coco_path data/MSCoco --image_size 800 --max_size 1333 \
    --output_dir exps/UPDETR_conditional_pretrain_coco "$@"
