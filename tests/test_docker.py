"""The Dockerfile: its steps are the commands of docs/installation.md, and what it copies exists. It is not built."""

import fnmatch
import re
import shlex
from pathlib import Path

from tests.documents import ROOT, SCRIPTS

PAGE = ROOT / "docs" / "installation.md"


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, arguments) of each step."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line]
    return [(name, " ".join(arguments.split())) for name, arguments in lines]


def set_up_commands(page: Path) -> list[str]:
    """Return the lines of the block that installs the packages."""
    (block,) = re.findall(r"```bash\n(python3 -m venv .*?)```", page.read_text(), re.S)
    return block.splitlines()


def docker_commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(docker .*?)```", PAGE.read_text(), re.S)
    text = "".join(blocks).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def test_steps_are_the_commands_of_the_page() -> None:
    steps = instructions()
    create, activate, install = set_up_commands(PAGE)
    assert set_up_commands(ROOT / "README.md") == [create, activate, install]
    runs = [arguments for name, arguments in steps if name == "RUN"]
    assert runs[1:] == [create, install]
    (variables,) = (arguments for name, arguments in steps if name == "ENV")
    folder = activate.removeprefix("source ").removesuffix("/bin/activate")
    assert f"PATH=/predetr/{folder}/bin:$PATH" in variables
    order = [name for name, _ in steps]
    assert order[:2] == ["ARG", "FROM"]
    assert order.index("ENV") > order.index("RUN")
    assert steps[-2:] == [("COPY", ". ."), ("CMD", '["bash"]')]


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    (copied,) = (
        arguments.split()[:-1]
        for name, arguments in instructions()
        if name == "COPY" and arguments != ". ."
    )
    words = [word for _, arguments in instructions() for word in arguments.split()]
    assert set(copied) == {word for word in words if word.endswith(".txt")}
    needed = [*copied, *SCRIPTS, "configs", "datasets", "models", "util", "tools", "docs"]
    for name in needed:
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name
    # What git ignores has no place in the image either.
    git = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    folders = {name for name in git if "*" not in name and not name.startswith("build")}
    covered = {pattern.removeprefix("**/") for pattern in ignored}
    assert folders <= covered | {"demo_output"}
    assert fnmatch.fnmatch("demo_output", "*_output")
    assert "*_output" in covered


def test_arguments_of_the_shown_commands_exist() -> None:
    names = {arguments.split("=")[0] for name, arguments in instructions() if name == "ARG"}
    commands = docker_commands()
    assert [command[1] for command in commands] == ["build", "build", "run"]
    for command in commands[:2]:
        given = [
            word for flag, word in zip(command, command[1:], strict=False) if flag == "--build-arg"
        ]
        assert {word.split("=")[0] for word in given} < names
        assert command[-1] == "."
    bases = re.findall(r"BASE=(\S+)", Path(ROOT / "Dockerfile").read_text() + PAGE.read_text())
    assert all("ubuntu" in base and "24.04" in base for base in bases)  # the same packages by apt
    run = commands[2]
    assert run[run.index("python") + 1] in SCRIPTS
    SCRIPTS["finetune_main.py"].parse(run[run.index("python") + 2 :])
