#!/usr/bin/env bash
# Deformable DETR with four levels and 300 queries on PASCAL VOC without pre-training: the baseline of Siamese DETR (CVPR 2023).
# Published: AP 56.1, without the settings. Here those of Deformable DETR.
# Where the backbone starts is not said; the published code for fine-tuning leaves it random. Here SwAV's weights, as pre-training has.
# Trained on the trainval images of 2012, evaluated on the test images of 2007 by COCO's metric, `difficult` objects included.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --detector deformable_detr --backbone_weights swav --dataset_file voc_coco \
    --output_dir exps/Scratch_deformable_voc "$@"
