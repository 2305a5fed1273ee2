#!/bin/sh
# Deformable DETR with four levels and 300 queries on PASCAL VOC without pre-training:
# baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.1; settings not published. Here as for Deformable DETR.
# The backbone's initial weights are not published; the published fine-tuning code leaves them random.
# Here SwAV's, as in pre-training.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --backbone_weights swav --dataset_file voc_coco \
    --output_dir exps/Scratch_deformable_voc "$@"
