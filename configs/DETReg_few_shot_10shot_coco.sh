#!/usr/bin/env bash
# DETReg (Bar et al., CVPR 2022), few shots: 10 objects of each of COCO's 80 classes, after DETReg_few_shot_base_coco.
# Published: novel AP 13.7, AP75 15.1 (corrected by the authors in 2023: earlier numbers had an error in the evaluation); 150 epochs.
# The objects: those of Wang et al. (ICML 2020), folder cocosplit, where seed 0 lies, of ucbdrive/few-shot-object-detection, of COCO 2014, whose images
# COCO 2017 has too. Drawn here by --seed instead: add --few_shot_file ''.
# Evaluation takes longer than such a short epoch: add --eval_every 50.
# Batch size: as full COCO, 8 GPUs, 4 images each; it is not published.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --few_shot all --few_shot_file data/cocosplit --shots 10 \
    --pretrain exps/DETReg_few_shot_base_coco/checkpoint.pth --batch_size 4 --epochs 150 --lr_drop 140 \
    --output_dir exps/DETReg_few_shot_10shot_coco "$@"
