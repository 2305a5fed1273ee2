#!/bin/sh
# UP-DETR's pretext on DETR, post-norm, fine-tuned on VOC: baseline of Siamese DETR (CVPR 2023).
# Published: AP 54.4; settings not published. Here: 150 epochs, lr drop after 100.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/UPDETR_vanilla_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_vanilla_finetune_voc "$@"
