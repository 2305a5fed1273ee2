"""The commands and examples of the documents: extracted from their text and parsed by the scripts' own parsers."""

import importlib
import os
import re
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import finetune_main
import main as pretrain_main
import run_with_submitit
from tools.demo import scenes as sample_scenes
from util.settings import resolve

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.sh"))}
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SCRIPTS = {"main.py": pretrain_main, "finetune_main.py": finetune_main}
TOOLS = {
    f"tools/{path.name}"
    for path in (ROOT / "tools").glob("*.py")
    if re.search(r"^(def parse\(|from .* import main, parse)", path.read_text(), re.M)
}
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:python|torchrun|bash|sh|source|pip|conda|export|srun|git|wget|curl) |\./\S+\.sh\b)"
)
LAUNCHERS = {"tools/run_dist_launch.sh": 2, "tools/run_dist_slurm.sh": 4}  # -> words before SCRIPT

# A text that identifies each kind of Python example -> the test file that runs it.
PYTHON_EXAMPLES = {
    "import finetune, pretrain": "tests/docs/test_migration.py",
    "import Predictor": "tests/test_predictor.py",
    "build_model(": "tests/docs/test_documents.py",
    "torch.hub.load(": "tests/test_hub.py",
    "DETECTORS[": "tests/docs/test_documents.py",
    "onnxruntime.InferenceSession(": "tests/tools/test_export.py",
    "from transformers import": "tests/util/checkpoints/test_hugging_face_folder.py",
}


def shown_commands(path: Path) -> list[str]:
    """Return every command of a document in order: from bash blocks and from code spans, also in tables.

    Skips the first column of a table with the head "published", which has commands of other codebases.
    """
    return [command for command in _code_snippets(path.read_text()) if COMMAND.match(command)]


def _code_snippets(text: str) -> Iterator[str]:
    """Yield each line of bash blocks, and each code span."""
    skip_first_column, row = False, ""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|^\|([^\n]*)\|$|`([^`]+)`", text, re.S | re.M):
        language, block, table_row, span = match.groups()

        if table_row is not None:
            previous_row, row = row, table_row
            if set(row) <= set("-|: "):  # the line below a table's head
                skip_first_column = previous_row.strip().startswith("published")
            cells = re.split(r"(?<!\\)\|", row)[int(skip_first_column) :]
            yield from re.findall(r"`([^`]+)`", "|".join(cells))
        elif span is not None:
            yield " ".join(span.split())
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"\s+#.*", "", line)


def published_commands() -> set[str]:
    """Return the commands in the first column of docs/published_commands.md."""
    text = (ROOT / "docs" / "published_commands.md").read_text()
    cells = [
        re.split(r"(?<!\\)\|", line)[1] for line in text.splitlines() if line.startswith("| `")
    ]
    return {span for cell in cells for span in re.findall(r"`([^`]+)`", cell)}


def python_blocks(path: Path) -> list[str]:
    """Return the code of a document's Python blocks."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def python_examples(kind: str) -> list[str]:
    """Return the Python blocks of all documents that contain `kind`, a key of PYTHON_EXAMPLES."""
    return [code for path in DOCUMENTS for code in python_blocks(path) if kind in code]


def config_words(config: Path, *extra: str, cwd: Path = ROOT) -> list[str]:
    """Return what a config would run, script and flags. `$LAUNCH` prints them in place of Python."""
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(
        ["sh", str(config), *extra],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def parse(words: list[str], resolved: bool = True) -> Namespace:
    """Parse `[script, flag, ...]`. Fails for flags that the script does not have."""
    args = SCRIPTS[words[0]].parse(words[1:])
    return resolve(args) if resolved else args


def without_launcher(words: list[str]) -> list[str]:
    """`torchrun ... SCRIPT FLAGS`, `python [-m torch.distributed.launch ...] SCRIPT FLAGS` -> [SCRIPT, FLAG, ...]"""
    if words[0] == "torchrun" or words[:2] == ["python", "-m"]:
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    return words[1:] if words[0] == "python" else words


def submitted_words(words: list[str]) -> list[str]:
    """`python run_with_submitit.py FLAGS` -> [SCRIPT, FLAG, ...] that each task of the job runs."""
    args = run_with_submitit.parse(words[2:])
    run_with_submitit.check(args)
    training = run_with_submitit.make_training(args)
    return [args.script, *training.flags, "--output_dir", training.output_dir]


def script_words(words: list[str]) -> list[str]:
    """Return [SCRIPT, FLAG, ...] of a command that trains or evaluates, without launcher, with its config's flags."""
    words = words[next(i for i, word in enumerate(words) if not re.match("[A-Z_]+=", word)) :]
    if words[:2] == ["python", "run_with_submitit.py"]:
        return submitted_words(words)
    before = LAUNCHERS.get(words[0].removeprefix("./"), 0)
    if before:
        assert words[before - 1].isdigit(), "the number of processes"
        words = words[before:]

    config = words[0].removeprefix("./")
    if config.startswith("configs/"):
        return config_words(ROOT / config, *words[1:])
    return words if words[0] in SCRIPTS else without_launcher(words)


def check_command(words: list[str]) -> Namespace | None:
    """Check that a command would run if the data existed. Returns the settings of a training command."""
    if words[:3] == ["python", "-m", "tools.demo.scenes"]:
        sample_scenes.get_args_parser().parse_args(words[3:])
        return None
    if words[0] == "python" and words[1] in TOOLS:
        import_tool(words[1]).parse(words[2:])
        return None
    return parse(script_words(words))


def import_tool(name: str) -> ModuleType:
    """Import the module of `tools/NAME.py`."""
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))
