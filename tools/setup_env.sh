# Set up the project's virtual environment and put its Python into $PY. To be sourced:
#   source tools/setup_env.sh requirements.txt [requirements-extras.txt ...]
#
# What is already installed is reused, so the second run needs no network. Environment variables, all optional:
#   PYTHON=/path/to/python3   Python to create the environment with, 3.10 or later
#   PREDETR_VENV=DIR          folder of the environment (default: .venv in the project)
#   PREDETR_SYSTEM_TORCH=1    use the torch and torchvision that this Python already has, instead of downloading them
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CACHE_DIR, ...) work too.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${PREDETR_VENV:-$ROOT/.venv}"
PY="$VENV/bin/python"

setup_say() { printf 'set-up: %s\n' "$*"; }
setup_fail() { printf 'set-up: error: %s\n' "$*" >&2; exit 1; }

# Put the first command that is Python 3.10 or later into $BASE_PY.
setup_find_python() {
    local candidate found=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            BASE_PY="$candidate"
            return
        fi
        if [ -z "$found" ]; then
            found="$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || true)"
        fi
        [ -z "${PYTHON:-}" ] || break
    done
    if [ -n "$found" ]; then
        setup_fail "Python 3.10 or later is needed, found $found: install a newer one, or set its path: PYTHON=/path/to/python3 bash tools/..."
    fi
    setup_fail "no Python found${PYTHON:+ at PYTHON=$PYTHON}: install Python 3.10 or later, or set its path: PYTHON=/path/to/python3 bash tools/..."
}

setup_make_venv() {
    "$BASE_PY" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        setup_fail "this Python has no venv module: install it (Debian, Ubuntu: apt install python3-venv) and run again"
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        setup_fail "$VENV exists and is not a virtual environment: move it, or choose another folder with PREDETR_VENV=DIR"
    fi
    setup_say "creating a virtual environment in $VENV ($("$BASE_PY" --version))"
    "$BASE_PY" -m venv --clear "$VENV" || setup_fail "the virtual environment could not be created in $VENV: see the message above"
}

setup_has_torch() { "$1" -c 'import torch, torchvision' >/dev/null 2>&1; }

# Return 0 if the package index answers. Downloads one small package and deletes it.
setup_index_answers() {
    local folder status=0
    folder="$(mktemp -d)"
    "$PY" -m pip download --quiet --no-deps --retries 1 --dest "$folder" packaging >/dev/null 2>&1 || status=1
    rm -rf "$folder"
    return $status
}

setup_download_size() {
    case "$(uname -s)/$(uname -m)" in
        Linux/x86_64 | Linux/aarch64)
            echo "about 3 GB to download, 7 GB on disk (on Linux, PyTorch comes with its CUDA libraries)" ;;
        *) echo "about 0.4 GB to download, 1.5 GB on disk" ;;
    esac
}

# For machines without a package index whose Python has torch (GPU images): an environment on top of that Python's packages.
setup_on_system_torch() {
    local packages
    setup_say "using the torch and torchvision of $("$BASE_PY" -c 'import sys; print(sys.executable)'), with its other packages; $1"
    setup_make_venv
    # With a .pth file: --system-site-packages does not see the packages of a Python that is itself an environment.
    packages="$("$BASE_PY" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))')"
    "$PY" -c 'import sys, sysconfig
with open(sysconfig.get_path("purelib") + "/packages_below.pth", "w") as file: file.write(sys.argv[1] + "\n")' "$packages"
    "$PY" -m pip install --quiet --retries 1 "${SETUP_FILES[@]}" >/dev/null 2>&1 ||
        setup_say "not all packages of ${SETUP_NAMES[*]} could be downloaded; continuing with those that are installed"
    "$PY" -c 'import torch, torchvision, scipy, pycocotools, numpy, PIL, tqdm, jinja2' ||
        setup_fail "a package of requirements.txt is missing (see above) and the package index can't be reached: install it for this Python"
    SETUP_SYSTEM=1
}

setup_install() {
    setup_say "installing ${SETUP_NAMES[*]}: $(setup_download_size), less if pip has packages in its cache"
    "$PY" -m pip install --disable-pip-version-check "${SETUP_FILES[@]}" -c "$ROOT/constraints.txt" ||
        setup_fail "pip could not install the packages (see above): check network and disk space, then run the same command again"
}

setup_main() {
    local name digest stamp
    SETUP_NAMES=("$@")
    SETUP_FILES=()
    SETUP_SYSTEM=""
    for name in "$@"; do SETUP_FILES+=(-r "$ROOT/$name"); done
    digest="$(cd "$ROOT" && cat "$@" constraints.txt | cksum | tr -d ' ')"
    stamp="$VENV/.installed-$digest"
    if [ -f "$stamp" ] && "$PY" -c '' 2>/dev/null; then
        SETUP_SYSTEM="$(cat "$stamp")"
        return
    fi

    setup_find_python
    if [ -z "${PREDETR_SYSTEM_TORCH:-}" ] || ! setup_has_torch "$BASE_PY"; then
        [ -z "${PREDETR_SYSTEM_TORCH:-}" ] || setup_fail "PREDETR_SYSTEM_TORCH is set, but $BASE_PY has no torch and torchvision: install them or unset it"
        "$PY" -c '' 2>/dev/null || setup_make_venv
        # First without the network: after a change of the requirement files all packages may be installed already.
        if ! "$PY" -m pip install --quiet --disable-pip-version-check --no-index "${SETUP_FILES[@]}" \
                -c "$ROOT/constraints.txt" >/dev/null 2>&1; then
            if setup_has_torch "$BASE_PY" && ! setup_index_answers; then
                setup_on_system_torch "the package index can't be reached"
            else
                setup_install
            fi
        fi
    else
        setup_on_system_torch "as PREDETR_SYSTEM_TORCH is set"
    fi
    printf '%s' "$SETUP_SYSTEM" >"$stamp"
    setup_say "ready: $("$PY" -c 'import sys, torch; print("Python", sys.version.split()[0] + ",", "torch", torch.__version__)')"
}

setup_main "$@"
