#!/usr/bin/env bash
# Run a config or a script on several GPUs with torchrun, one process per GPU.
#
# One node:
#   GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_pretrain_in.sh --batch_size 16
# Two nodes, one command on each:
#   GPUS_PER_NODE=8 NODE_RANK=0 MASTER_ADDR=HOST ./tools/run_dist_launch.sh 16 ./configs/UPDETR_pretrain_in.sh
#   GPUS_PER_NODE=8 NODE_RANK=1 MASTER_ADDR=HOST ./tools/run_dist_launch.sh 16 ./configs/UPDETR_pretrain_in.sh
#
# The first argument is the total number of processes on all nodes. Environment variables (default):
#   GPUS_PER_NODE   processes per node (the total, at most 8)
#   NODE_RANK       index of this node, from 0 (0)
#   MASTER_ADDR     host of node 0 (127.0.0.1)
#   MASTER_PORT     port on that host (29500; on one node the first free one from there, for several runs at a time)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh, which may be dash
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: $0 PROCESSES CONFIG.sh|SCRIPT.py [FLAGS ...]"
processes="$1" target="$2"
shift 2
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES is '$processes': give a number, 1 or more"
[ -f "$target" ] || fail "$target does not exist: give a config from configs/, main.py or finetune_main.py"

per_node="${GPUS_PER_NODE:-$((processes < 8 ? processes : 8))}"
[[ "$per_node" =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE is '$per_node': give a number, 1 or more"
[ $((processes % per_node)) -eq 0 ] || fail "$processes processes can't be spread evenly over nodes with GPUS_PER_NODE=$per_node: give a multiple of it"

port="${MASTER_PORT:-29500}"
if [ -z "${MASTER_PORT:-}" ] && [ "$processes" -eq "$per_node" ]; then
    # A connection succeeds only if another run listens there.
    while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
    [ "$port" -eq 29500 ] || printf 'port 29500 is in use, this run takes %s\n' "$port" >&2
fi

# Configs start their script with $LAUNCH instead of `python`.
export LAUNCH="python -m torch.distributed.run --nnodes $((processes / per_node)) --nproc_per_node $per_node \
--node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-127.0.0.1} --master_port $port"
case "$target" in
    *.sh) exec bash "$target" "$@" ;;
    *.py) exec $LAUNCH "$target" "$@" ;;
    *) fail "$target is neither a config (.sh) nor a script (.py): give a config from configs/, main.py or finetune_main.py" ;;
esac
