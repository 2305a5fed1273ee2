#!/bin/sh
# DETReg (Bar et al., CVPR 2022), fine-tuned on 10 % of PASCAL VOC
# 2007 and 2012 from DETReg_top30_in, evaluated on VOC 2007 test.
# Published: 2 GPUs x 4 images (batch 8), 200 epochs.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file voc --dataset voc --num_classes 21 --filter_pct 0.1 --pretrain exps/DETReg_top30_in/checkpoint.pth \
    --batch_size 4 --epochs 200 --lr_drop 150 --eval_every 20 \
    --output_dir exps/DETReg_fine_tune_10pct_pascal "$@"
