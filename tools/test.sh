#!/usr/bin/env bash
# Sets up what is missing, then ruff, mypy and the tests. Two processes; below 20 minutes on two cores.
#   bash tools/test.sh              all tests but those marked slow
#   bash tools/test.sh --all        all tests
#   bash tools/test.sh -k matcher   anything else goes to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt requirements-dev.txt

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--all" ]; then selection=(); else arguments+=("$argument"); fi
done

cd "$ROOT"
# One thread a process: the tests are small, and more threads than cores would make them slower.
export OMP_NUM_THREADS=1
if [ -n "$SETUP_SYSTEM" ] && ! "$PY" -c 'import mypy, ruff' 2>/dev/null; then
    echo "tests: ruff or mypy is missing and can't be fetched: lint and type check are skipped"
else
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m mypy
fi
workers=()
if "$PY" -c 'import xdist' 2>/dev/null; then workers=(-n 2); fi
"$PY" -m pytest ${workers[@]+"${workers[@]}"} ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
