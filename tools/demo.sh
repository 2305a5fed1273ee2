#!/usr/bin/env bash
# End-to-end demo: pre-train without labels, fine-tune with and without that pre-training, evaluate, and write one page
# of results (demo_output/result.html).
#   bash tools/demo.sh                     on synthetic images; about 9 minutes on two CPU cores
#   bash tools/demo.sh --coco_path DIR     on a custom dataset in COCO's layout
#   bash tools/demo.sh --help              all flags
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt
exec env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PY" "$ROOT/tools/demo/run.py" "$@"
