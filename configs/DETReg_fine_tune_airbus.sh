#!/bin/sh
# DETReg (Bar et al., CVPR 2022), fine-tuned on Airbus Ship Detection from DETReg_top30_airbus.
# Published: the name of the dataset and two outputs; the codebase can't read it.
# Settings: as for DETReg_fine_tune_full_coco.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset airbus --num_classes 2 --pretrain exps/DETReg_top30_airbus/checkpoint.pth --batch_size 4 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_fine_tune_airbus "$@"
