#!/usr/bin/env bash
# Run a config or a script under SLURM, one task per GPU, on as many nodes as needed.
#   ./tools/run_dist_slurm.sh PARTITION JOB_NAME 16 ./configs/DETReg_top30_in.sh --batch_size 12
#   GPUS_PER_NODE=4 CPUS_PER_TASK=8 SRUN_ARGS="--time 2-0" \
#       ./tools/run_dist_slurm.sh PARTITION JOB_NAME 8 main.py --imagenet_path IMAGES
# The third argument is the total number of GPUs. Environment variables (default):
#   GPUS_PER_NODE   GPUs and tasks per node (the total, at most 8)
#   CPUS_PER_TASK   CPU cores per task (5)
#   SRUN_ARGS       further arguments for srun (none)
#   MASTER_PORT     port on the first node (by the job's number, so that jobs can share a node)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh, which may be dash
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -ge 4 ] || fail "usage: $0 PARTITION JOB_NAME GPUS CONFIG.sh|SCRIPT.py [FLAGS ...]"
partition="$1" job="$2" gpus="$3" target="$4"
shift 4
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "GPUS is '$gpus': give a number, 1 or more"
[ -f "$target" ] || fail "$target does not exist: give a config from configs/, main.py or finetune_main.py"
per_node="${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}"
[[ "$per_node" =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE is '$per_node': give a number, 1 or more"
[ $((gpus % per_node)) -eq 0 ] || fail "$gpus GPUs can't be spread evenly over nodes with GPUS_PER_NODE=$per_node: give a multiple of it"
command -v srun > /dev/null || fail "srun is not on the PATH: run this on a SLURM login node, or use tools/run_dist_launch.sh without SLURM"

# Each task starts Python itself and asks SLURM for the address of the first node (util/distributed.py).
run="srun --partition=$partition --job-name=$job --gres=gpu:$per_node --ntasks=$gpus --ntasks-per-node=$per_node"
run="$run --cpus-per-task=${CPUS_PER_TASK:-5} --kill-on-bad-exit=1 ${SRUN_ARGS:-}"
export LAUNCH="$run python"
case "$target" in
    *.sh) exec bash "$target" "$@" ;;
    *.py) exec $LAUNCH "$target" "$@" ;;
    *) fail "$target is neither a config (.sh) nor a script (.py): give a config from configs/, main.py or finetune_main.py" ;;
esac
