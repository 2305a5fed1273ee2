#!/bin/sh
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on PASCAL VOC.
# Published: AP is in the paper only, not in the codebase, and is not repeated here.
# Learning rates: as for UPDETR_finetune_coco.
# The codebase has no VOC: here trained on VOC 2007 and 2012 trainval, evaluated on VOC 2007 test with COCO metrics.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm --dataset_file voc_coco --voc_train 2007_trainval 2012_trainval \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_voc "$@"
