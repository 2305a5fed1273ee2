#!/bin/sh
# Deformable DETR-R50 (Zhu et al., ICLR 2021): evaluation on COCO val2017. Published: AP 44.5.
# Another checkpoint: --resume PATH (its architecture is adopted;
# for the published single-scale DC5 model add --dilation)
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --batch_size 2 --eval \
    --resume exps/r50_deformable_detr/checkpoint.pth \
    --output_dir exps/r50_deformable_detr_eval "$@"
