#!/bin/sh
# DETReg (Bar et al., CVPR 2022) few-shot on PASCAL VOC:
# base training on the 15 base classes of split 1, from DETReg_top30_in.
# Published: the split, by Wang et al. (ICML 2020); no results for DETReg.
# Schedule: as for DETReg_fine_tune_full_pascal.
# For the other splits: --novel_split 2 or 3, here and in DETReg_few_shot_10shot_pascal.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file voc --dataset voc --num_classes 21 --few_shot base --novel_split 1 --pretrain exps/DETReg_top30_in/checkpoint.pth \
    --batch_size 4 --epochs 100 --lr_drop 70 --eval_every 10 \
    --output_dir exps/DETReg_few_shot_base_pascal "$@"
