#!/bin/sh
# Fine-tune Conditional DETR with 100 queries on PASCAL VOC under SLURM. Arguments as of Siamese DETR's train_voc.sh:
#   sh scripts/train_voc.sh PARTITION CONVERTED_CKPT NUM_GPU JOB_NAME [FLAGS ...]
# That is configs/Siamese_conditional_finetune_voc.sh, which also reads the checkpoint before its conversion.
[ $# -ge 4 ] || { echo "error: usage: $0 PARTITION CONVERTED_CKPT NUM_GPU JOB_NAME [FLAGS ...]" >&2; exit 2; }
root="$(cd "$(dirname "$0")/.." && pwd)" partition="$1" checkpoint="$2" gpus="$3" job="$4"
shift 4
[ ! -f "$PWD/$checkpoint" ] || checkpoint="$PWD/$checkpoint"  # the config changes the folder
exec bash "$root/tools/run_dist_slurm.sh" "$partition" "$job" "$gpus" \
    "$root/configs/Siamese_conditional_finetune_voc.sh" --pretrain "$checkpoint" --output_dir "saves/$job" "$@"
