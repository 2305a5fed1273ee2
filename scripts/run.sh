#!/bin/sh
# Search EdgeBoxes, with the arguments of Siamese DETR's tools/hpcplayers/run.sh:
#   sh scripts/run.sh PARTITION NUM_PROCESS DATA_ROOT DATA_META SAVE_DIR DATASET [FLAGS of tools/cache_proposals.py ...]
# DATA_META is a list of images, one path per line relative to DATA_ROOT. Writes the proposal cache
# SAVE_DIR/edgebox/DATASET, for --cache_path. PARTITION is used where SLURM is, otherwise the search runs here.
[ $# -ge 6 ] || { echo "error: usage: $0 PARTITION NUM_PROCESS DATA_ROOT DATA_META SAVE_DIR DATASET" >&2; exit 2; }
tool="$(cd "$(dirname "$0")/.." && pwd)/tools/cache_proposals.py"
partition="$1" processes="$2" images="$3" list="$4" folder="$5/edgebox/$6"
shift 6
launch=""
! command -v srun > /dev/null || launch="srun --partition=$partition --ntasks=1 --cpus-per-task=$processes"
exec $launch python "$tool" --images "$images" --list "$list" --proposals edge_boxes --num_workers "$processes" \
    --output_dir "$folder" "$@"
