#!/bin/sh
# UP-DETR's pretext on Conditional DETR with 100 queries, fine-tuned on VOC: baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.9, 50 epochs, lr drop after 40, 2 images per GPU.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/UPDETR_conditional_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_conditional_finetune_voc "$@"
