"""The documents' commands: read from their text, and taken apart by our own parsers."""

import importlib
import os
import re
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import finetune_main
import main as pretrain_main
from tools.demo import scenes as sample_scenes
from util.settings import resolve

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.sh"))}
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SCRIPTS = {"main.py": pretrain_main, "finetune_main.py": finetune_main}
TOOLS = {
    f"tools/{path.name}"
    for path in (ROOT / "tools").glob("*.py")
    if "\ndef parse(" in path.read_text()
}
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:python|torchrun|bash|sh|source|pip|conda|export|srun|git|wget|curl) |\./\S+\.sh\b)"
)


def shown_commands(path: Path) -> list[str]:
    """Every command of a document in its order: those of its bash blocks and those in backticks, in tables too.

    The first column of a table with the head "published" holds commands of other code bases, and is left out.
    """
    return [command for command in _shown(path.read_text()) if COMMAND.match(command)]


def _shown(text: str) -> Iterator[str]:
    theirs, row = False, ""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```|^\|([^\n]*)\|$|`([^`]+)`", text, re.S | re.M):
        language, block, last_row, span = *found.groups()[:2], row, found[4]
        if found[3] is not None:
            row = found[3]
            theirs = last_row.strip().startswith("published") if set(row) <= set("-|: ") else theirs
            cells = re.split(r"(?<!\\)\|", row)[int(theirs) :]
            yield from re.findall(r"`([^`]+)`", "|".join(cells))
        elif span is not None:
            yield " ".join(span.split())
        elif language == "bash":
            yield from (
                re.sub(r"\s+#.*", "", line) for line in block.replace("\\\n", " ").splitlines()
            )


def config_words(config: Path, *extra: str, cwd: Path = ROOT) -> list[str]:
    """What a config would run: the script and its flags, printed by `$LAUNCH` in place of Python."""
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(
        ["bash", str(config), *extra],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def parse(words: list[str], resolved: bool = True) -> Namespace:
    """The flags of `[script, flag, ...]`. Fails for flags that the script does not take."""
    args = SCRIPTS[words[0]].parse(words[1:])
    return resolve(args) if resolved else args


def without_launcher(words: list[str]) -> list[str]:
    """`torchrun ... SCRIPT FLAGS`, `python [-m torch.distributed.launch ...] SCRIPT FLAGS` -> [SCRIPT, FLAG, ...]"""
    if words[0] == "torchrun" or words[:2] == ["python", "-m"]:
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    return words[1:] if words[0] == "python" else words


def script_words(words: list[str]) -> list[str]:
    """A command that trains or evaluates, without its launcher and with the words of its config: [SCRIPT, FLAG, ...]"""
    words = words[next(i for i, word in enumerate(words) if not re.match("[A-Z_]+=", word)) :]
    before = {"tools/run_dist_launch.sh": 2, "tools/run_dist_slurm.sh": 4}.get(
        words[0].removeprefix("./"), 0
    )
    if before:
        assert words[before - 1].isdigit(), "the number of processes"
        words = words[before:]
    config = words[0].removeprefix("./")
    if config.startswith("configs/"):
        return config_words(ROOT / config, *words[1:])
    return words if words[0] in SCRIPTS else without_launcher(words)


def check_command(words: list[str]) -> Namespace | None:
    """Fails unless the command can be run as it stands, with the data in place. Returns the settings of a training
    command.
    """
    if words[:3] == ["python", "-m", "tools.demo.scenes"]:
        sample_scenes.get_args_parser().parse_args(words[3:])
        return None
    if words[0] == "python" and words[1] in TOOLS:
        tool(words[1]).parse(words[2:])
        return None
    return parse(script_words(words))


def tool(name: str):
    """The module of `tools/NAME.py`."""
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))
