#!/bin/sh
# Deformable DETR on 2 % of COCO's images, from SwAV's backbone:
# baseline in the table of DETReg (Bar et al., CVPR 2022).
# Published: AP 16.02, mean over several draws; settings not published.
# Here as for DETReg_fine_tune_2pct_coco: 8 GPUs x 3 images.
# Evaluation takes longer than one of these short epochs: add --eval_every 50.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --dataset coco --filter_pct .02 --backbone_weights swav \
    --batch_size 3 --epochs 1000 --lr_drop 1000 \
    --output_dir exps/DeformableDETR_swav_2pct_coco "$@"
