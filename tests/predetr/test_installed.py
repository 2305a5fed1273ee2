"""The installed package: what it contains, import conflicts with other packages, and its commands."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import predetr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """site-packages after `pip install -e .`, with a package `datasets` of another project."""
    pytest.importorskip("setuptools", minversion="77")
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    for path in ROOT.iterdir():  # links, because the build writes next to pyproject.toml
        if path.suffix == ".py" or path.is_dir():
            (project / path.name).symlink_to(path)
    build = (
        "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", build, str(site)], cwd=project, check=True, capture_output=True
    )
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "datasets").mkdir()
    (site / "datasets" / "__init__.py").write_text("load_dataset = None\n")
    return site


def python(code: str, site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """Run code with these site-packages and without this tree, in another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_only_predetr_is_installed(site: Path, tmp_path: Path) -> None:
    (info,) = site.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["predetr"]
    done = python(
        "import importlib.util as u; print(*[u.find_spec(n) for n in sys.argv[1:]])",
        site,
        tmp_path,
        "engine",
    )
    assert done.stdout == "None\n", done.stderr


def test_import_leaves_other_packages_alone(site: Path, tmp_path: Path) -> None:
    code = "before = list(sys.path); import predetr, datasets; print(datasets.__file__, sys.path == before)"
    done = python(code, site, tmp_path)
    assert done.stdout == f"{site}/datasets/__init__.py True\n", done.stderr


def test_first_use_of_a_name_makes_the_project_importable(site: Path, tmp_path: Path) -> None:
    done = python(
        "from predetr import build_model; import datasets; print(datasets.__file__)", site, tmp_path
    )
    assert done.stdout == f"{ROOT}/datasets/__init__.py\n", done.stderr


def test_import_conflict_is_one_line(site: Path, tmp_path: Path) -> None:
    done = python("import datasets; from predetr import build_model", site, tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {site}/datasets/__init__.py is already imported as datasets, a name that {ROOT} uses too; "
        "use PreDETR in a separate Python process"
    )


def test_install_without_the_project_folder_says_how_to_fix_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "predetr", tmp_path / "predetr")
    done = python("from predetr import build_model", tmp_path, tmp_path)
    assert done.stderr.splitlines()[-1].endswith("is installed without it: pip install -e FOLDER")


@pytest.mark.parametrize(
    ("command", "script"),
    [
        pytest.param("pretrain", "main.py", marks=pytest.mark.slow),  # starts as finetune does
        ("finetune", "finetune_main.py"),
        ("predict", "tools/predict.py"),
    ],
)
def test_commands_run_from_any_folder(
    site: Path, tmp_path: Path, command: str, script: str
) -> None:
    (info,) = site.glob("*.dist-info")
    assert (
        f"predetr-{command} = predetr.commands:{command}\n"
        in (info / "entry_points.txt").read_text()
    )
    done = python(f"from predetr.commands import {command}; {command}()", site, tmp_path, "--help")
    assert done.stdout.startswith(f"usage: {script} "), done.stderr


@pytest.mark.parametrize("name", predetr.__all__)
def test_every_public_name_exists(name: str) -> None:
    if not hasattr(pytest.importorskip(predetr._MODULES[name]), name):
        pytest.skip("not in this tree yet")
    assert callable(getattr(predetr, name))


def read_requirements(path: Path) -> dict[str, list[str]]:
    """Return the requirements of a file, by the word before the colon in the comment above them."""
    groups: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            if ":" in line:  # not the second line of a comment
                name = line[2:].split(":")[0]
        elif line:
            groups.setdefault(name, []).append(line)
    return groups


def test_extras_match_the_requirement_files() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (dev,) = read_requirements(ROOT / "requirements-dev.txt").values()
    groups = read_requirements(ROOT / "requirements-extras.txt")
    web = read_requirements(ROOT / "requirements-web.txt")  # not in `all`: it needs another Pillow
    assert extras == {**groups, **web, "all": [f"predetr[{','.join(groups)}]"], "dev": dev}


def test_changelog_starts_with_this_version() -> None:
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == predetr.__version__
