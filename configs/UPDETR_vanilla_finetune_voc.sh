#!/usr/bin/env bash
# UP-DETR's pretext on DETR, post-norm, fine-tuned on VOC: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 54.4, without the settings. Here: 150 epochs with the drop after 100.
# Trained on the trainval images of 2012, evaluated on the test images of 2007 by COCO's metric, `difficult` objects included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/UPDETR_vanilla_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_vanilla_finetune_voc "$@"
