#!/bin/sh
# UP-DETR's pretext with EdgeBoxes in place of random boxes, Conditional DETR, 100 queries:
# ablation of Siamese DETR (CVPR 2023) on COCO's images.
# Published: 16 GPUs x 4 images (batch 64), 120k steps, lr drop after 80k; no AP. See UPDETR_conditional_pretrain_coco.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext random_query_patch --detector conditional_detr --num_queries 100 --lr_drop 43 --epochs 65 --num_patches 10 --batch_size 4 \
    --feature_recon --fre_cnn --proposals edge_boxes --coco_path data/MSCoco --image_size 800 --max_size 1333 \
    --output_dir exps/UPDETR_conditional_edgebox_pretrain_coco "$@"
