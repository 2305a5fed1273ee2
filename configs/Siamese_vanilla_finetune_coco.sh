#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) on DETR, post-norm, fine-tuned on COCO.
# Published: AP 42.0; settings not published. Here: 150 epochs, lr drop after 100.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 \
    --pretrain exps/r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w/checkpoint.pth \
    --output_dir exps/Siamese_vanilla_finetune_coco "$@"
