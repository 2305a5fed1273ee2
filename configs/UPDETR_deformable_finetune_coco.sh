#!/usr/bin/env bash
# UP-DETR's pretext on Deformable DETR with four levels and 300 queries, fine-tuned on COCO: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 45.3, without the settings. Here those of Deformable DETR: 50 epochs with the drop after 40, 32 images
# in all, so 16 GPUs, or 8 with --batch_size 4. The position code is that of the checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr \
    --pretrain exps/UPDETR_deformable_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_finetune_coco "$@"
