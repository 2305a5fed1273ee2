#!/usr/bin/env bash
# An end-to-end demo: pre-train without labels, fine-tune with and without that pre-training, evaluate, one page of results.
#   bash tools/demo.sh                     on synthetic sample scenes; below 10 minutes on two CPU cores
#   bash tools/demo.sh --coco_path DIR     on a custom dataset in the layout of COCO
#   bash tools/demo.sh --help              further flags
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt
exec env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PY" "$ROOT/tools/demo/run.py" "$@"
