#!/bin/sh
# Deformable DETR-R50 (Zhu et al., ICLR 2021) on COCO.
# Published: AP 44.5 after 50 epochs, batch 32: 16 GPUs x 2 images; on 8 GPUs add --batch_size 4
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr \
    --output_dir exps/r50_deformable_detr "$@"
