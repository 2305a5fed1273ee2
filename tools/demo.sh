#!/usr/bin/env bash
# The whole path in one command: pre-train without labels, fine-tune from that and from scratch, evaluate, one page at the end.
#   bash tools/demo.sh                     on sample scenes that are made on the spot; below 10 minutes on two CPU cores
#   bash tools/demo.sh --coco_path DIR     on your own data in the layout of COCO
#   bash tools/demo.sh --help              further flags
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt
exec env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PY" "$ROOT/tools/demo/run.py" "$@"
