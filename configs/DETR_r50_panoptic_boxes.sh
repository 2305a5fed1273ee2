#!/bin/sh
# DETR-R50 (Carion et al., ECCV 2020): boxes of things and stuff on COCO panoptic, the first of two stages.
# Published: box AP 38.8 (with the masks of the second stage); README: 8 GPUs x 2 images, 300 epochs by default.
# The panoptic annotations are in the COCO folder, or in --coco_panoptic_path.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --dataset_file coco_panoptic \
    --output_dir exps/DETR_r50_panoptic_boxes "$@"
