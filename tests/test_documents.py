"""Every command of README, CONTRIBUTING and docs/ is read from the text and run, in its order, in a folder that looks like the project.

What takes a cluster is run as it stands but for flags behind it that make model, images and epochs small; it stops after three steps where
no later command of its document needs its files. Launchers are run with a `python` that prints what it is asked to do.
"""
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import (
    CONFIGS,
    DOCUMENTS,
    ROOT,
    SCRIPTS,
    TOOLS,
    check_command,
    config_words,
    parse,
    shown_commands,
    tool,
    without_launcher,
)
from published_files import SMALL, filled, masks, shapes, siamese, siamese_file, updetr
from tiny import MODEL_FLAGS, PRETEXT_FLAGS, write_coco, write_images

from datasets import sample_scenes
from tools import demo
from util.checkpoint import save_checkpoint
from util.flags import DEAD_FLAGS
from util.logger import UserError
from util.weight_files import stored_at

# What stands for the reader's own names.
PLACEHOLDERS = {
    "/path/to/coco": "data/MSCoco", "path/to/coco": "data/MSCoco", "path/to/imagenet": "data/ilsvrc/train", "<checkpoint.pth>": "checkpoint.pth",
    "<OSS_CKPT>": "iter_300000.pth", "NAME.sh": "DETR_r50_coco.sh", "SCRIPT": "finetune_main.py", " FLAGS": " --seed 1", "HOST": "localhost",
    " FILE": " checkpoint.pth", " DIR": " data/MSCoco", " WORD": " matcher",
}
NOT_RUN = {
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "pip install -r requirements.txt -r requirements-extras.txt -c constraints.txt": "fetches packages; its files are read instead",
    "pip install -r requirements.txt -c constraints.txt": "fetches packages; its files are read instead",
    "conda install ...": "of another code base, and no whole command",
    "pip install ...": "of another code base, and no whole command",
}
RUN_ELSEWHERE = {"own_data.md": "test_own_data_page.py"}  # runs the same list of commands
SMALL_TOOLS = {
    "tools/cache_proposals.py": ["--num_workers", "0"], "tools/check_dataset.py": ["--num_workers", "0"],
    "tools/benchmark.py": ["--device", "cpu", "--image_size", "64", "--batch_size", "1", "--turns", "1"],
    "tools/predict.py": ["--device", "cpu", "--num_workers", "0", "--image_size", "64"],
}
SCENES = ["--num_train", "4", "--num_val", "2", "--num_unlabelled", "4"]
FAKE_PYTHON = "#!/bin/sh\n[ \"$1\" = -c ] || printf '%s\\n' \"$@\"\n"

# --------------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the project, data where the documents say, and a `python` that prints its words, also as the environment's."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "outputs", "exps", "proposals", ".venv", ".git") and not path.name.endswith("_output"):
            (tmp_path / path.name).symlink_to(path)
    for folder in (tmp_path / "bin", tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
        (folder / "python").write_text(FAKE_PYTHON)
        (folder / "python").chmod(0o755)
    write_coco(tmp_path / "data" / "MSCoco", train=4, val=2)
    write_images(tmp_path / "data" / "ilsvrc" / "train" / "n01440764")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _no_network(url: str, *args, **kwargs) -> None:
    raise AssertionError(f"fetches {url}")


def given_file(path: str, words: list[str]) -> dict:
    """What a file of somebody else's holds that a command reads: told from its name and the words around it."""
    backbone = ("--backbone", "resnet50", "--dilation") if "dc5" in path or "--dilation" in words else ()
    if "iter_" in path:
        return siamese_file(siamese("conditional_detr", *SMALL))
    if "panoptic" in path:
        return {"model": filled(masks())}
    if "--pretrain" in words and "http" not in path:
        return {"model": filled(updetr(*SMALL, "--pre_norm"))}
    detector = words[words.index("--detector") + 1] if "--detector" in words else "detr"
    norm = ("--pre_norm",) if "--pre_norm" in words else ()
    return {"model": filled(shapes(detector, *SMALL, *backbone, *norm, outputs=92 if detector == "detr" else 91))}


def files_read(words: list[str]) -> list[str]:
    """The checkpoints that a command reads."""
    after = dict(zip(words, words[1:], strict=False))
    named = [after.get(flag) for flag in ("--resume", "--pretrain", "--checkpoint", "--ckpt")]
    if words[0] == "tools/convert_checkpoint.py":
        named.append(words[1])
    return [name for name in named if name and name != "auto"]


def give_files(words: list[str], own: bool) -> None:
    """Files that the reader has from somewhere else. In README (`own`), what lies in outputs/ was written by a command before."""
    for name in files_read(words):
        place = Path(stored_at(name)) if name.startswith("https://") else Path(name)
        if not place.exists():
            assert not (own and name.startswith("outputs/")), f"no command before this one writes {name}"
            save_checkpoint(given_file(name, words), place)


# -------------------------------------------------------------------------------------------------------------- the commands


def small(words: list[str], keeps: bool) -> list[str]:
    """The flags of a command of an entry script with what makes it small behind them."""
    more = ["--device", "cpu", "--num_workers", "0", "--image_size", "64"]
    if not files_read(words):
        more += [*MODEL_FLAGS, "--backbone", "resnet50" if "--dilation" in words else "resnet18", "--backbone_weights", "none"]
        more += PRETEXT_FLAGS if words[0] == "main.py" and "region_prior" not in words else []
    if "--eval" not in words:
        more += ["--batch_size", "2", "--epochs", "2" if "--resume" in words else "1", *([] if keeps else ["--dry_run"])]
    return [*words[1:], *more]


def run_script(words: list[str], later: str, own: bool) -> None:
    """Trains or evaluates in this process; only three steps where no `later` command reads what it writes."""
    folder = dict(zip(words, words[1:], strict=False)).get("--output_dir", "")
    give_files(words, own)
    module = SCRIPTS[words[0]]
    module.main(module.parse(small(words, keeps=bool(folder) and f"{folder}/" in later.replace(" ", "/ "))))


def run_tool(words: list[str], own: bool) -> None:
    give_files(words, own)
    tool(words[0]).main(tool(words[0]).parse([*words[1:], *SMALL_TOOLS.get(words[0], [])]))


def run_shell(words: list[str]) -> list[str]:
    """Runs a launcher or a set-up script with the `python` that prints; returns what it printed."""
    own = ("LAUNCH", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PREDETR_VENV", "PYTHON", "PREDETR_SYSTEM_TORCH")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    environment = {**kept, "PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", shlex.join(words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_launcher(words: list[str]) -> list[str]:
    """What `torchrun` or tools/run_dist_launch.sh would start in each process: [SCRIPT, FLAG, ...]"""
    from torch.distributed.run import get_args_parser

    given = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
    words = words[len(given):]
    if words[0] != "torchrun":
        words = run_shell([*given, *words] if not given else ["env", *given, *words])
        assert words[:2] == ["-m", "torch.distributed.run"]
        words = words[1:]
    launch = get_args_parser().parse_args(words[1:])
    assert launch.nproc_per_node == "8"
    return [launch.training_script, *launch.training_script_args]


def run_set_up(words: list[str]) -> None:
    """tools/demo.sh and tools/test.sh, in an environment that is ready: they hand on their words."""
    names = ["requirements.txt", "requirements-extras.txt", *(["requirements-dev.txt"] if words[1] == "tools/test.sh" else [])]
    joined = b"".join((ROOT / name).read_bytes() for name in [*names, "constraints.txt"])
    digest = subprocess.run(["cksum"], input=joined, capture_output=True, check=True).stdout.decode().replace(" ", "").strip()
    Path(".venv", f".installed-{digest}").touch()
    printed = run_shell(words)
    if words[1] == "tools/demo.sh":
        assert printed[0].endswith("tools/demo.py")
        demo.make_stages(demo.get_args_parser().parse_args(printed[1:]))
    else:
        assert printed[:2] == ["-m", "ruff"]
        assert printed[printed.index("pytest") + 1 :][-len(words[2:]) or None :] == words[2:] or words[2:] == ["--all"] or not words[2:]


def run_command(command: str, later: str = "", own: bool = False) -> None:
    for name, meaning in PLACEHOLDERS.items():
        command, later = command.replace(name, meaning), later.replace(name, meaning)
    words = shlex.split(command)
    if words[-1] == "--help":
        with pytest.raises(SystemExit) as left:
            (SCRIPTS.get(words[1]) or tool(words[1])).parse(["--help"])
        assert left.value.code == 0
    elif words[:3] == ["python", "-m", "datasets.sample_scenes"]:
        sample_scenes.main([*words[3:], *SCENES])
    elif words[0] == "python" and words[1] in TOOLS:
        run_tool(words[1:], own)
    elif words[0] == "bash":
        assert words[1] in ("tools/demo.sh", "tools/test.sh")
        run_set_up(words)
    elif words[0] == "export":
        run_shell(words)
    elif words[0] == "torchrun" or "./tools/run_dist_launch.sh" in words:
        run_script(run_launcher(words), later, own)
    elif words[0].startswith("./configs/"):
        run_script(config_words(Path(words[0]).absolute(), *words[1:]), later, own)
    else:
        run_script(without_launcher(words), later, own)


def sequence(path: Path) -> list[str]:
    """The commands of a document, each as often as it is shown but those that are the same for a second time."""
    return list(dict.fromkeys(shown_commands(path)))


def is_row(path: Path, command: str) -> bool:
    """Whether tests/test_docs_model_zoo.py runs it, with a file of the kind that its row names."""
    return path.name == "model_zoo.md" and command.startswith("python finetune_main.py")


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in RUN_ELSEWHERE], ids=lambda path: path.stem)
def test_every_command_runs(path: Path, project: Path) -> None:
    """In the order of the document, so that each finds what those before it wrote."""
    commands = [command for command in sequence(path) if command not in NOT_RUN and not is_row(path, command)]
    for i, command in enumerate(commands):
        try:
            run_command(command, later="\n".join(commands[i + 1 :]), own=path == ROOT / "README.md")
        except (UserError, SystemExit, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{path.name}: {command}\n{error}") from error
