#!/bin/sh
# Conditional DETR-DC5-R101 (Meng et al., ICCV 2021) on COCO.
# Published: AP 45.0 after 50 epochs; 8 GPUs x 1 image.
# Started again, it resumes where it stopped (--resume auto).
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --backbone resnet101 --dilation --batch_size 1 --resume auto \
    --output_dir exps/ConditionalDETR_r101_dc5_coco "$@"
