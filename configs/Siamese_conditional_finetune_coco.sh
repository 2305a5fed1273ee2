#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) on Conditional DETR with 100 queries, fine-tuned on COCO.
# Published: AP 40.5, 50 epochs, lr drop after 40, 2 images per GPU.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 100 --lr_backbone 5e-5 --epochs 50 --lr_drop 40 \
    --pretrain exps/r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w/checkpoint.pth \
    --output_dir exps/Siamese_conditional_finetune_coco "$@"
