#!/bin/sh
# DETR, post-norm on COCO without pre-training: baseline of Siamese DETR (CVPR 2023).
# Published: AP 39.7; settings not published. Here: 150 epochs, lr drop after 100.
# The backbone's initial weights are not published; the published fine-tuning code leaves them random.
# Here SwAV's, as in pre-training.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --backbone_weights swav \
    --output_dir exps/Scratch_vanilla_coco "$@"
