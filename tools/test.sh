#!/usr/bin/env bash
# Set up the environment if needed, then run ruff, mypy and pytest. Less than 20 minutes on two CPU cores.
#   bash tools/test.sh              all tests except those marked slow
#   bash tools/test.sh --all        all tests
#   bash tools/test.sh -k matcher   other arguments are passed to pytest
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt requirements-dev.txt

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--all" ]; then selection=(); else arguments+=("$argument"); fi
done

cd "$ROOT"
# One thread per process: the tests are small, and more threads than cores would slow them down.
export OMP_NUM_THREADS=1
if [ -n "$SETUP_SYSTEM" ] && ! "$PY" -c 'import mypy, ruff' 2>/dev/null; then
    echo "tests: ruff or mypy is not installed and can't be downloaded: skipping lint and type check"
else
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m mypy
fi
workers=()
# Each worker starts with one half of the tests, so that a module's fixtures run once; a free one takes from the other.
if "$PY" -c 'import xdist' 2>/dev/null; then workers=(-n 2 --dist worksteal); fi
"$PY" -m pytest ${workers[@]+"${workers[@]}"} ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
