#!/usr/bin/env bash
# UP-DETR's pretext on Conditional DETR with 100 queries, fine-tuned on VOC: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.9, 50 epochs with the drop after 40, 2 images a GPU.
# Trained on the trainval images of 2012, evaluated on the test images of 2007 by COCO's metric, `difficult` objects included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector conditional_detr --num_queries 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/UPDETR_conditional_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_conditional_finetune_voc "$@"
