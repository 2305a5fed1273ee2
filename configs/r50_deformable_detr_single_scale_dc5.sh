#!/bin/sh
# Deformable DETR-DC5-R50 with one level (Zhu et al., ICLR 2021) on COCO.
# Published: AP 41.5 after 50 epochs, batch 32: 16 GPUs x 2 images; on 8 GPUs add --batch_size 4
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --num_feature_levels 1 --dilation \
    --output_dir exps/r50_deformable_detr_single_scale_dc5 "$@"
