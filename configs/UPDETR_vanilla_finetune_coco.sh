#!/bin/sh
# UP-DETR's pretext on DETR, post-norm, with 100 queries, fine-tuned on COCO: baseline of Siamese DETR (CVPR 2023).
# Published: AP 40.5; settings not published. Here: 150 epochs, lr drop after 100, the short schedule of UP-DETR,
# and the --lr_backbone of the other fine-tuning runs.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 \
    --pretrain exps/UPDETR_vanilla_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_vanilla_finetune_coco "$@"
