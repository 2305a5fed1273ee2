#!/usr/bin/env bash
# UP-DETR's pretext on Deformable DETR with four levels and 300 queries, fine-tuned on VOC: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.4, without the settings. Here those of Deformable DETR.
# Trained on the trainval images of 2012, evaluated on the test images of 2007 by COCO's metric, `difficult` objects included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --dataset_file voc_coco \
    --pretrain exps/UPDETR_deformable_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_deformable_finetune_voc "$@"
