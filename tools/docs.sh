#!/usr/bin/env bash
# Set up the environment if needed, then build the documentation as a site, with its links checked.
#   bash tools/docs.sh            writes site/index.html, which opens without a server (its search needs one)
#   bash tools/docs.sh --serve    shows it at http://127.0.0.1:8000 and updates it when a page changes
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt requirements-extras.txt requirements-dev.txt
cd "$ROOT"
exec "$PY" tools/build_site.py "$@"
