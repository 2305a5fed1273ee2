#!/bin/sh
# Two-stage Deformable DETR-R50 with iterative box refinement (Zhu et al., ICLR 2021) on COCO.
# Published: AP 46.9 after 50 epochs, batch 32: 16 GPUs x 2 images; on 8 GPUs add --batch_size 4
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --with_box_refine --two_stage \
    --output_dir exps/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage "$@"
