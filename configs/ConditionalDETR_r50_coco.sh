#!/bin/sh
# Conditional DETR-R50 (Meng et al., ICCV 2021) on COCO.
# Published: AP 41.0 after 50 epochs; 8 GPUs x 2 images.
# Started again, it resumes where it stopped (--resume auto).
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --resume auto \
    --output_dir exps/ConditionalDETR_r50_coco "$@"
