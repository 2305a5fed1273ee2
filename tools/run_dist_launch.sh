#!/usr/bin/env bash
# Runs a config, or a script, on several processes (torchrun underneath).
#   GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_pretrain_in.sh --batch_size 16
#   GPUS_PER_NODE=8 NODE_RANK=0 MASTER_ADDR=HOST ./tools/run_dist_launch.sh 16 ./configs/UPDETR_pretrain_in.sh    on two nodes:
#   GPUS_PER_NODE=8 NODE_RANK=1 MASTER_ADDR=HOST ./tools/run_dist_launch.sh 16 ./configs/UPDETR_pretrain_in.sh    once on each
# The first argument is the number of processes on all nodes together. Settings, with their defaults:
#   GPUS_PER_NODE   processes a node (all of them, at most 8)
#   NODE_RANK       number of this node (0)
#   MASTER_ADDR, MASTER_PORT   where the first node listens (127.0.0.1, 29500)
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: $0 PROCESSES CONFIG.sh|SCRIPT.py [FLAGS ...]"
processes="$1" target="$2"
shift 2
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "the number of processes is '$processes', it has to be 1 or more"
[ -f "$target" ] || fail "$target does not exist: give a file of configs/, or main.py or finetune_main.py"

per_node="${GPUS_PER_NODE:-$((processes < 8 ? processes : 8))}"
[[ "$per_node" =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE is '$per_node', it has to be 1 or more"
[ $((processes % per_node)) -eq 0 ] || fail "$processes processes can't be spread over nodes of GPUS_PER_NODE=$per_node: give a multiple of it"

# A config starts its script with $LAUNCH in place of `python`.
export LAUNCH="python -m torch.distributed.run --nnodes $((processes / per_node)) --nproc_per_node $per_node \
--node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-127.0.0.1} --master_port ${MASTER_PORT:-29500}"
case "$target" in
    *.sh) exec bash "$target" "$@" ;;
    *.py) exec $LAUNCH "$target" "$@" ;;
    *) fail "$target is neither a config (.sh) nor a script (.py)" ;;
esac
