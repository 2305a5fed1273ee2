#!/bin/sh
# DETR, post-norm on PASCAL VOC without pre-training: baseline of Siamese DETR (CVPR 2023).
# Published: AP 47.8; settings not published. Here: 150 epochs, lr drop after 100.
# The backbone's initial weights are not published; the published fine-tuning code leaves them random.
# Here SwAV's, as in pre-training.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --backbone_weights swav --dataset_file voc_coco \
    --output_dir exps/Scratch_vanilla_voc "$@"
