#!/bin/sh
# DETR-R50 (Carion et al., ECCV 2020): evaluation of the authors' checkpoint on COCO val2017. Published: AP 42.0.
# Another checkpoint: --resume PATH (its architecture is adopted). DC5 models were trained with one image per GPU and
# lose AP on padded images: add --batch_size 1
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --batch_size 2 --no_aux_loss --eval \
    --resume https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth \
    --output_dir exps/DETR_eval_coco "$@"
