#!/bin/sh
# UP-DETR (Dai et al., CVPR 2021): evaluation on COCO val2017. Published: AP 43.1 with the authors' checkpoint.
# Another checkpoint: --resume PATH
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --batch_size 2 --eval --no_aux_loss --pre_norm \
    --resume exps/UPDETR_finetune_coco/checkpoint.pth \
    --output_dir exps/UPDETR_eval_coco "$@"
