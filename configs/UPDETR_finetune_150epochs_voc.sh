#!/usr/bin/env bash
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on PASCAL VOC, the short schedule.
# Published: the number is in the paper alone, not in the code base, and is not repeated here. Rates: as UPDETR_finetune_coco.
# Drop after 100 of 150 epochs: in the proportion of 300 and 200.
# The code base has no VOC: here the trainval images of 2007 and 2012, evaluated on the test images of 2007 by COCO's metric.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 100 --epochs 150 --lr_backbone 5e-5 --pre_norm --dataset_file voc_coco --voc_train 2007_trainval 2012_trainval \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_150epochs_voc "$@"
