#!/usr/bin/env bash
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on PASCAL VOC.
# Published: the number is in the paper alone, not in the code base, and is not repeated here. Rates: as UPDETR_finetune_coco.
# The code base has no VOC: here the trainval images of 2007 and 2012, evaluated on the test images of 2007 by COCO's metric.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm --dataset_file voc_coco --voc_train 2007_trainval 2012_trainval \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_voc "$@"
