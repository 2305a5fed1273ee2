#!/bin/sh
# UP-DETR's pretext on Deformable DETR with one level and 300 queries, fine-tuned on COCO:
# baseline of Siamese DETR (CVPR 2023).
# Published: neither AP nor settings. Here as for Deformable DETR: 50 epochs, lr drop after 40, batch 32 (16 GPUs,
# or 8 with --batch_size 4). The positional encoding comes from the checkpoint.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --num_feature_levels 1 \
    --pretrain exps/UPDETR_deformable_single_scale_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_single_scale_finetune_coco "$@"
