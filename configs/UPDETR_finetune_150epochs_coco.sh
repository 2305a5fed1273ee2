#!/bin/sh
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on COCO, the short schedule.
# Published: AP is in the paper only, not in the codebase, and is not repeated here.
# Learning rates: as for UPDETR_finetune_coco.
# lr drop after 100 of 150 epochs, the same proportion as 200 of 300.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 100 --epochs 150 --lr_backbone 5e-5 --pre_norm \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_150epochs_coco "$@"
