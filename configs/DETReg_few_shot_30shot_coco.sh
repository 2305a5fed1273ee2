#!/bin/sh
# DETReg (Bar et al., CVPR 2022), few-shot: 30 objects of each of COCO's 80 classes, after DETReg_few_shot_base_coco.
# Published: novel AP 22.6, AP75 24.3 (corrected by the authors in 2023:
# earlier values had an evaluation bug); 150 epochs.
# The objects: those of Wang et al. (ICML 2020), seed 0 in the folder cocosplit of ucbdrive/few-shot-object-detection.
# They are from COCO 2014, whose images COCO 2017 also has.
# To draw others with --seed: add --few_shot_file ''.
# Evaluation takes longer than one of these short epochs: add --eval_every 50.
# Batch size: not published; here as for full COCO, 8 GPUs x 4 images.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --few_shot all --few_shot_file data/cocosplit --shots 30 \
    --pretrain exps/DETReg_few_shot_base_coco/checkpoint.pth --batch_size 4 --epochs 150 --lr_drop 140 \
    --output_dir exps/DETReg_few_shot_30shot_coco "$@"
