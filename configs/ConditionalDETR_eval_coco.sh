#!/bin/sh
# Conditional DETR (Meng et al., ICCV 2021): evaluation on COCO val2017. Published: AP 41.0 for R50.
# Another checkpoint: --resume PATH (its architecture is adopted); with DC5 models add --batch_size 1
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --batch_size 2 --eval \
    --resume exps/ConditionalDETR_r50_coco/checkpoint.pth \
    --output_dir exps/ConditionalDETR_eval_coco "$@"
