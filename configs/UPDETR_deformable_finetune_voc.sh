#!/bin/sh
# UP-DETR's pretext on Deformable DETR with four levels and 300 queries, fine-tuned on VOC:
# baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.4; settings not published. Here as for Deformable DETR.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --dataset_file voc_coco \
    --pretrain exps/UPDETR_deformable_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_finetune_voc "$@"
