"""The set-up's messages on machines where it can't go on, and that a ready environment is reused without pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The set-up and the requirement files in a folder of their own, and a PATH without any Python."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_env.sh", tmp_path / "tools")
    for path in [*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt"]:
        shutil.copy(path, tmp_path)
    for name in ("cat", "cksum", "dirname", "mktemp", "rm", "tr", "uname"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def set_up(project: Path, **environment: str) -> subprocess.CompletedProcess:
    command = "set -euo pipefail; source tools/setup_env.sh requirements.txt; echo using $PY"
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREDETR", "PYTHON"))
    }
    return subprocess.run(
        [BASH, "-c", command],
        cwd=project,
        env={**kept, "PATH": str(project / "bin"), **environment},
        capture_output=True,
        text=True,
    )


def test_no_python(project: Path) -> None:
    done = set_up(project)
    assert done.returncode == 1
    assert done.stderr.startswith("set-up: error: no Python found: install Python 3.10 or later")


def test_an_old_python_is_named(project: Path) -> None:
    tool(project / "bin", "python3", 'case "$2" in *platform*) echo 3.8.18 ;; *) exit 1 ;; esac')
    done = set_up(project)
    assert done.returncode == 1
    assert "Python 3.10 or later is needed, found 3.8.18" in done.stderr


def test_a_python_without_venv_is_named(project: Path) -> None:
    tool(project / "bin", "python3", 'case "$2" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac')
    done = set_up(project)
    assert done.returncode == 1
    assert "no venv module" in done.stderr


def test_a_folder_that_is_no_environment_is_not_cleared(project: Path) -> None:
    tool(project / "bin", "python3", "exit 0")
    (project / "precious").mkdir()
    done = set_up(project, PREDETR_VENV=str(project / "precious"))
    assert done.returncode == 1
    assert "is not a virtual environment" in done.stderr
    assert (project / "precious").is_dir()


# A stand-in for Python: makes an environment of itself, logs what pip is asked, and fails where the test says so.
PYTHON = """
log="{project}/pip.log"
case "$*" in
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; echo >"$last/pyvenv.cfg" ;;
    *"pip install"*--no-index*) exit 1 ;;
    *"pip install"*) echo "$*" >>"$log"; exit {install} ;;
    *"pip download"*) exit {index} ;;
    *"import torch"*) {torch} ;;
esac
"""


def fake_python(project: Path, install: int = 0, index: int = 0, torch: int = 1) -> Path:
    for name in ("mkdir", "cp"):
        (project / "bin" / name).symlink_to(shutil.which(name))
    in_venv = f'case "$0" in */.venv/*) exit 0 ;; *) exit {torch} ;; esac'
    tool(
        project / "bin",
        "python3",
        PYTHON.format(project=project, install=install, index=index, torch=in_venv),
    )
    return project / "pip.log"


def test_says_the_size_installs_once_and_is_reused(project: Path) -> None:
    log = fake_python(project)
    first = set_up(project)
    assert first.returncode == 0, first.stderr
    assert "GB to download" in first.stdout
    assert first.stdout.endswith(f"using {project}/.venv/bin/python\n")
    assert "requirements.txt" in log.read_text()
    assert "constraints.txt" in log.read_text()
    log.unlink()
    second = set_up(project)
    assert second.stdout == f"using {project}/.venv/bin/python\n"
    assert not log.exists()
    (project / "requirements.txt").write_text("numpy\n")
    set_up(project)
    assert log.exists()


def test_a_failed_installation_is_not_taken_for_a_ready_one(project: Path) -> None:
    fake_python(project, install=1)
    for _ in range(2):
        done = set_up(project)
        assert done.returncode == 1
        assert "pip could not install the packages" in done.stderr


def test_without_an_index_the_torch_that_is_there_is_used(project: Path) -> None:
    log = fake_python(project, install=1, index=1, torch=0)
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert "using the torch and torchvision of" in done.stdout
    assert "GB to download" not in done.stdout
    assert "requirements.txt" in log.read_text()  # what the index might still give


def test_with_an_index_the_tested_versions_are_installed(project: Path) -> None:
    fake_python(project, torch=0)
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert "GB to download" in done.stdout
