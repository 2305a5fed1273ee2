#!/bin/sh
# UP-DETR's pretext on Conditional DETR with 300 queries, fine-tuned on COCO: baseline of Siamese DETR (CVPR 2023).
# Published: the settings, 50 epochs, lr drop after 40, 2 images per GPU; no AP with 300 queries.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 300 --lr_backbone 5e-5 \
    --pretrain exps/UPDETR_conditional_300q_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_conditional_300q_finetune_coco "$@"
