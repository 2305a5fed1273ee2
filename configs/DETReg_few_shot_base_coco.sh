#!/usr/bin/env bash
# DETReg (Bar et al., CVPR 2022), few shots: base training on the 60 classes of COCO that VOC does not have, from DETReg_top30_in.
# Published: trained like full COCO, 8 GPUs, 4 images each (32 in all), 50 epochs. What it starts from is not said; here that of full COCO.
# Then DETReg_few_shot_10shot_coco or DETReg_few_shot_30shot_coco.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset coco --few_shot base --pretrain exps/DETReg_top30_in/checkpoint.pth --batch_size 4 --epochs 50 --lr_drop 40 \
    --output_dir exps/DETReg_few_shot_base_coco "$@"
