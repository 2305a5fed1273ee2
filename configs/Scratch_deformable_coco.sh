#!/bin/sh
# Deformable DETR with four levels and 300 queries on COCO without pre-training: baseline of Siamese DETR (CVPR 2023).
# Published: AP 45.5; settings not published. Here as for Deformable DETR.
# The backbone's initial weights are not published; the published fine-tuning code leaves them random.
# Here SwAV's, as in pre-training.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --backbone_weights swav \
    --output_dir exps/Scratch_deformable_coco "$@"
