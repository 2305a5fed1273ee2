#!/usr/bin/env bash
# UP-DETR's pretext on Deformable DETR with one level and 300 queries, fine-tuned on COCO: the baseline of Siamese DETR (CVPR 2023).
# Published: neither number nor settings. Here those of Deformable DETR: 50 epochs with the drop after 40, 32 images in all, so 16 GPUs,
# or 8 with --batch_size 4. The position code is that of the checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --num_feature_levels 1 \
    --pretrain exps/UPDETR_deformable_single_scale_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_single_scale_finetune_coco "$@"
