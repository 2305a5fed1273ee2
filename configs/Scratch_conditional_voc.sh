#!/bin/sh
# Conditional DETR with 100 queries on PASCAL VOC without pre-training: baseline of Siamese DETR (CVPR 2023).
# Published: AP 49.9; schedule and learning rates of its fine-tuning scripts,
# 50 epochs, lr drop after 40, 2 images per GPU.
# The backbone's initial weights are not published; the published fine-tuning code leaves them random.
# Here SwAV's, as in pre-training.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 100 --lr_backbone 5e-5 --backbone_weights swav --dataset_file voc_coco \
    --output_dir exps/Scratch_conditional_voc "$@"
