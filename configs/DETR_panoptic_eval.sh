#!/bin/sh
# DETR-R50 (Carion et al., ECCV 2020): evaluation of the authors' panoptic checkpoint on COCO val2017.
# Published: box AP 38.8, mask AP 31.1, PQ 43.4. Another checkpoint: --resume PATH
# Padding lowers AP of DC5 models: add --batch_size 1
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file coco_panoptic --masks --batch_size 2 --no_aux_loss --eval \
    --resume https://dl.fbaipublicfiles.com/detr/detr-r50-panoptic-00ce5173.pth \
    --output_dir exps/DETR_panoptic_eval "$@"
