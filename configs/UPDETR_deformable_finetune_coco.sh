#!/bin/sh
# UP-DETR's pretext on Deformable DETR with four levels and 300 queries, fine-tuned on COCO:
# baseline of Siamese DETR (CVPR 2023).
# Published: AP 45.3; settings not published. Here as for Deformable DETR: 50 epochs, lr drop after 40, batch 32
# (16 GPUs, or 8 with --batch_size 4). The positional encoding comes from the checkpoint.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr \
    --pretrain exps/UPDETR_deformable_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_finetune_coco "$@"
