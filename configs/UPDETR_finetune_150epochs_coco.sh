#!/usr/bin/env bash
# UP-DETR (Dai et al., CVPR 2021): fine-tuning on COCO, the short schedule.
# Published: the number is in the paper alone, not in the code base, and is not repeated here. Rates: as UPDETR_finetune_coco.
# Drop after 100 of 150 epochs: in the proportion of 300 and 200.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --lr_drop 100 --epochs 150 --lr_backbone 5e-5 --pre_norm \
    --pretrain exps/UPDETR_pretrain_in/checkpoint.pth \
    --output_dir exps/UPDETR_finetune_150epochs_coco "$@"
