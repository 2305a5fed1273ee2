#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) with Conditional DETR with 100 queries,
# on COCO's images: ablation, view IoU 0.7.
# Published: 16 GPUs x 4 images (batch 64), 120k steps, lr drop after 80k.
# EdgeBoxes runs during training, on image gradients.
# As published: --edge_model model.yml.gz. Faster: --cache_path, see docs/proposals.md.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext siamese --detector conditional_detr --num_queries 100 --max_iters 120000 --lr_drop_iters 80000 --batch_size 4 \
    --feature_loss_coef 3 --global_loss_coef 0.3 --view_iou 0.7 --coco_path data/MSCoco --image_size 800 \
    --output_dir exps/r50_condtr_100q_syncbn_coco_edgebox_iou0.7_rdiscr_gdiscr_gpu16_step12w "$@"
