#!/bin/sh
# DETReg (Bar et al., CVPR 2022) few-shot on PASCAL VOC: 10 objects of each class, after DETReg_few_shot_base_pascal.
# Published: the split, by Wang et al. (ICML 2020); no results for DETReg. Schedule: as for DETReg_few_shot_10shot_coco.
# The objects are drawn with --seed.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file voc --dataset voc --num_classes 21 --few_shot all --shots 10 --novel_split 1 \
    --pretrain exps/DETReg_few_shot_base_pascal/checkpoint.pth --batch_size 4 --epochs 150 --lr_drop 140 --eval_every 50 \
    --output_dir exps/DETReg_few_shot_10shot_pascal "$@"
