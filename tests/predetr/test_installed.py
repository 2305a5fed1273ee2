"""The installed package: what is in it, that names of other packages stay theirs, and the commands from elsewhere."""

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
    """What `pip install -e .` puts into site-packages, beside another project's package `datasets`."""
    pytest.importorskip("setuptools", minversion="77")
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    for path in ROOT.iterdir():  # links, so that nothing is written into this tree
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
    """Runs code with the site and without this tree, in another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_only_the_door_is_installed(site: Path, tmp_path: Path) -> None:
    (info,) = site.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["predetr"]
    done = python(
        "import importlib.util as u; print(*[u.find_spec(n) for n in sys.argv[1:]])",
        site,
        tmp_path,
        "engine",
    )
    assert done.stdout == "None\n", done.stderr


def test_importing_it_leaves_packages_of_others_alone(site: Path, tmp_path: Path) -> None:
    code = "before = list(sys.path); import predetr, datasets; print(datasets.__file__, sys.path == before)"
    done = python(code, site, tmp_path)
    assert done.stdout == f"{site}/datasets/__init__.py True\n", done.stderr


def test_names_bring_the_packages_of_the_project(site: Path, tmp_path: Path) -> None:
    done = python(
        "from predetr import build_model; import datasets; print(datasets.__file__)", site, tmp_path
    )
    assert done.stdout == f"{ROOT}/datasets/__init__.py\n", done.stderr


def test_a_package_of_the_same_name_is_refused_in_one_line(site: Path, tmp_path: Path) -> None:
    done = python("import datasets; from predetr import build_model", site, tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: the package datasets of {site}/datasets/__init__.py is already imported, and {ROOT} has one of "
        "this name: use PreDETR in a Python process of its own"
    )


def test_a_copy_without_the_project_says_how_to_install_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "predetr", tmp_path / "predetr")
    done = python("from predetr import build_model", tmp_path, tmp_path)
    assert done.stderr.splitlines()[-1].endswith("is installed without it: pip install -e FOLDER")


@pytest.mark.parametrize(
    ("command", "script"),
    [("pretrain", "main.py"), ("finetune", "finetune_main.py"), ("predict", "tools/predict.py")],
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
def test_every_name_of_the_door_is_there(name: str) -> None:
    if not hasattr(pytest.importorskip(predetr._MODULES[name]), name):
        pytest.skip("not in this tree yet")
    assert callable(getattr(predetr, name))


def listed(path: Path) -> dict[str, list[str]]:
    """Requirements of a file, by the word before the colon of the comment above them."""
    groups: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            name = line[2:].split(":")[0]
        elif line:
            groups.setdefault(name, []).append(line)
    return groups


def test_extras_are_those_of_the_requirement_files() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (dev,) = listed(ROOT / "requirements-dev.txt").values()
    groups = listed(ROOT / "requirements-extras.txt")
    assert extras == {**groups, "all": [f"predetr[{','.join(groups)}]"], "dev": dev}


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == predetr.__version__
