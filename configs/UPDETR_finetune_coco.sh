#!/bin/sh
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on COCO.
# Published: AP 43.1 (README; 42.8 in the paper), 8 V100 x 2 images (batch 16), 300 epochs, about 6 days.
# --lr_backbone 5e-5 is the authors' later value. The 5e-4 of the first published command loses AP.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_coco "$@"
