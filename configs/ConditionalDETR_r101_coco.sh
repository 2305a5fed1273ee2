#!/bin/sh
# Conditional DETR-R101 (Meng et al., ICCV 2021) on COCO.
# Published: AP 42.8 after 50 epochs; 8 GPUs x 2 images.
# Started again, it resumes where it stopped (--resume auto).
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --backbone resnet101 --resume auto \
    --output_dir exps/ConditionalDETR_r101_coco "$@"
