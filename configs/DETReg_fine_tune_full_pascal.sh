#!/bin/sh
# DETReg (Bar et al., CVPR 2022), fine-tuned on PASCAL VOC 2007 and 2012 from DETReg_top30_in,
# evaluated on VOC 2007 test.
# Published: 8 GPUs x 4 images (batch 32), 100 epochs.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file voc --dataset voc --num_classes 21 --pretrain exps/DETReg_top30_in/checkpoint.pth \
    --batch_size 4 --epochs 100 --lr_drop 70 --eval_every 10 \
    --output_dir exps/DETReg_fine_tune_full_pascal "$@"
