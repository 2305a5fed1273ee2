#!/bin/sh
# Conditional DETR's name of configs/ConditionalDETR_r101_coco.sh.
# On 8 processes, or GPUS_PER_NODE; flags are passed on.
root="$(dirname "$0")/.."
exec bash "$root/tools/run_dist_launch.sh" "${GPUS_PER_NODE:-8}" "$root/configs/ConditionalDETR_r101_coco.sh" \
    --output_dir output/conddetr_r101_epoch50 "$@"
