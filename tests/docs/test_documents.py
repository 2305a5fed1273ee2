"""Every command of README, CONTRIBUTING and docs/ is read from the text and run, in its order, in a folder that looks
like the project.

What takes a cluster is run as it stands but for flags behind it that make model, images and epochs small; it stops
after three steps where no later command of its document needs its files. Launchers are run with a `python` that prints
what it is asked to do.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.docs.test_model_zoo import row_command
from tests.docs.test_model_zoo import rows as checkpoint_rows
from tests.documents import (
    DOCUMENTS,
    ROOT,
    SCRIPTS,
    TOOLS,
    config_words,
    shown_commands,
    tool,
    without_launcher,
)
from tests.published_files import (
    SMALL,
    detreg,
    filled,
    masks,
    shapes,
    siamese,
    siamese_file,
    updetr,
)
from tests.tiny import (
    MODEL_FLAGS,
    PRETEXT_FLAGS,
    VOC_LISTS,
    write_airbus,
    write_coco,
    write_images,
    write_shots,
    write_voc,
)
from tools.demo import run as demo
from tools.demo import scenes as sample_scenes
from util.checkpoints.checkpoint import save_checkpoint
from util.checkpoints.weight_files import stored_at
from util.errors import UserError
from util.settings import registry
from util.settings.table import REFUSED_FLAGS

# What stands for the reader's own names.
PLACEHOLDERS = {
    "/path/to/coco": "data/MSCoco",
    "path/to/coco": "data/MSCoco",
    "path/to/imagenet": "data/ilsvrc/train",
    "NAME.sh": "DETR_r50_coco.sh",
    "<checkpoint.pth>": "checkpoint.pth",
    "<OSS_CKPT>": "iter_300000.pth",
    "SCRIPT": "finetune_main.py",
    " FLAGS": " --seed 1",
    "PARTITION": "gpu",
    " FILE": " checkpoint.pth",
    " DIR": " data/MSCoco",
    " WORD": " matcher",
}
NOT_RUN = {
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "pip install -r requirements.txt -r requirements-extras.txt -c constraints.txt": "fetches packages; its files "
    "are read instead",
    "pip install -r requirements.txt -c constraints.txt": "fetches packages; its files are read instead",
    "pip install -e .": "installs; tests/predetr/test_installed.py does, into a folder of its own",
    "curl -L -o model.yml.gz "
    "https://github.com/opencv/opencv_extra/raw/4.x/testdata/cv/ximgproc/model.yml.gz": "fetches a file",
    "python tools/transfer_study.py report outputs/study --output outputs/transfer.md": "needs the runs of an hour; "
    "tests/tools/study/test_report.py writes such a report",
}
RUN_ELSEWHERE = {"own_data.md": "test_own_data_page.py"}  # runs the same list of commands
NEEDS = {
    "README.md": ("skimage", "matplotlib"),
    "proposals.md": ("cv2",),
    "large_data.md": ("cv2",),
}  # extras
SMALL_TOOLS = {
    "tools/cache_proposals.py": ["--num_workers", "0"],
    "tools/check_dataset.py": ["--num_workers", "0"],
    "tools/make_split.py": ["--filter_pct", "0.5"],
    "tools/transfer_study.py prepare": ["--image_size", "64", "--fractions", "1", "0.5"],
    "tools/transfer_study.py run": [
        "--list",
        "--fractions",
        "1",
        "0.5",
    ],  # its runs are those of tests/tools/study/test_runner.py
    "tools/benchmark.py": [
        "--device",
        "cpu",
        "--image_size",
        "64",
        "--batch_size",
        "1",
        "--turns",
        "1",
    ],
    "tools/predict.py": ["--device", "cpu", "--num_workers", "0", "--image_size", "64"],
}
SCENES = ["--num_train", "4", "--num_val", "2", "--num_unlabelled", "4"]
PRINTER = '#!/bin/sh\n[ "$1" = -c ] || printf \'%s\\n\' "$@"\n'  # in place of programs; `python -c` says nothing

# --------------------------------------------------------------------------------------------------------------- the
# folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the project, data where the documents say, and a `python` that prints its words, also as the
    environment's.
    """
    for path in ROOT.iterdir():
        if path.name not in (
            "data",
            "outputs",
            "exps",
            "proposals",
            ".venv",
            ".git",
        ) and not path.name.endswith("_output"):
            (tmp_path / path.name).symlink_to(path)
    for program in ("bin/python", "bin/srun", ".venv/bin/python"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).write_text(PRINTER)
        (tmp_path / program).chmod(0o755)
    write_coco(tmp_path / "data" / "MSCoco", train=4, val=2)
    write_shots(tmp_path / "data" / "MSCoco", tmp_path / "data" / "cocosplit")
    write_voc(
        tmp_path / "data" / "pascal" / "VOCdevkit", {**VOC_LISTS, "2012_train": 4, "2012_val": 2}
    )
    Image.new("RGB", (240, 200)).save(tmp_path / "photograph.jpg")
    write_airbus(tmp_path / "data" / "airbus-ship-detection")
    for name in ("ilsvrc", "ilsvrc100"):
        write_images(tmp_path / "data" / name / "train" / "photographs")
    pack_images(
        tmp_path / "data" / "ilsvrc" / "train" / "photographs", tmp_path / "data" / "shards"
    )
    for name in (ROOT / "datasets" / "imagenet100.txt").read_text().split():
        (tmp_path / "data" / "ilsvrc" / "train" / name).mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pack_images(images: Path, target: Path, shards: int = 16) -> None:
    """One of the images in each of many tar files."""
    paths = sorted(images.iterdir())
    target.mkdir()
    for number in range(shards):
        with tarfile.open(target / f"train-{number:03d}.tar", "w") as tar:
            tar.add(paths[number % len(paths)], f"{number}.png")


def _no_network(url: str, *args, **kwargs) -> None:
    raise AssertionError(f"fetches {url}")


def given_file(path: str, words: list[str]) -> dict:
    """What a file of somebody else's holds that a command reads: told from its name and the words around it."""
    backbone = (
        ("--backbone", "resnet50", "--dilation") if "dc5" in path or "--dilation" in words else ()
    )
    if "iter_" in path or "siamese" in words or "condtr" in path:
        deformable = "--deform" in words
        return siamese_file(
            siamese(
                "deformable_detr" if deformable else "conditional_detr",
                *SMALL,
                channels=896 if deformable else 512,
            )
        )
    if "panoptic" in path:
        return {"model": filled(masks())}
    usual = "deformable_detr" if "DETReg" in path else "detr"
    detector = words[words.index("--detector") + 1] if "--detector" in words else usual
    if "updetr" in words or words[0] == "tools/visualize_pretext.py":
        return {"model": filled(updetr(*SMALL))}
    if "DETReg_top" in path or "detreg" in words:
        return {"model": filled(detreg(detector, *SMALL))}
    if "--pretrain" in words and "DETReg" not in path and "http" not in path:
        return {"model": filled(updetr(*SMALL, "--pre_norm"))}
    norm = ("--pre_norm",) if "--pre_norm" in words else ()
    return {
        "model": filled(
            shapes(detector, *SMALL, *backbone, *norm, outputs=92 if detector == "detr" else 91)
        )
    }


def files_read(words: list[str]) -> list[str]:
    """The checkpoints that a command reads."""
    after = dict(zip(words, words[1:], strict=False))
    named = [after.get(flag) for flag in ("--resume", "--pretrain", "--checkpoint", "--ckpt")]
    if words[0] == "tools/convert_checkpoint.py":
        named.append(words[1])
    return [name for name in named if name and name != "auto"]


def give_files(words: list[str], own: bool) -> None:
    """Files that the reader has from somewhere else. In README (`own`), what lies in outputs/ was written by a command
    before.
    """
    for name in files_read(words):
        place = Path(stored_at(name)) if name.startswith("https://") else Path(name)
        written_before = name.startswith("outputs/") and place.exists()
        assert written_before or not (own and name.startswith("outputs/")), (
            f"no command before this one writes {name}"
        )
        if not written_before:
            save_checkpoint(given_file(name, words), place)


# -------------------------------------------------------------------------------------------------------------- the
# commands


def small(words: list[str], keeps: bool) -> list[str]:
    """The flags of a command of an entry script with what makes it small behind them."""
    more = ["--device", "cpu", "--num_workers", "0", "--image_size", "64"]
    if not files_read(words):
        more += [
            *MODEL_FLAGS,
            "--backbone",
            "resnet50" if "--dilation" in words else "resnet18",
            "--backbone_weights",
            "none",
        ]
        if words[0] == "main.py":
            more += (
                ["--max_prop", "5", "--patch_size", "32"]
                if "region_prior" in words
                else PRETEXT_FLAGS
            )
            more += [] if importlib.util.find_spec("cv2") else ["--proposals", "random"]
    if "--eval" not in words:
        more += ["--filter_pct", "0.75"] if "--filter_pct" in words else []
        more += (
            ["--novel_classes", "red"] if "--few_shot" in words and "data/MSCoco" in words else []
        )
        more += [
            "--batch_size",
            "2",
            "--epochs",
            "2" if "--resume" in words else "1",
            *([] if keeps else ["--dry_run"]),
        ]
    return [*words[1:], *more]


def run_script(words: list[str], later: str, own: bool) -> None:
    """Trains or evaluates in this process; only three steps where no `later` command reads what it writes."""
    folder = dict(zip(words, words[1:], strict=False)).get("--output_dir", "")
    keeps = folder.startswith("outputs/") and bool(re.search(rf"{folder}\b", later))
    give_files(words, own)
    SCRIPTS[words[0]].main(SCRIPTS[words[0]].parse(small(words, keeps)))


def run_tool(words: list[str], own: bool) -> None:
    give_files(words, own)
    more = SMALL_TOOLS.get(" ".join(words[:2]), SMALL_TOOLS.get(words[0], []))
    tool(words[0]).main(tool(words[0]).parse([*words[1:], *more]))


def run_shell(words: list[str]) -> list[str]:
    """Runs a launcher or a set-up script with the `python` that prints; returns what it printed."""
    own = (
        "LAUNCH",
        "GPUS_PER_NODE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PREDETR_VENV",
        "PYTHON",
        "PREDETR_SYSTEM_TORCH",
    )
    kept = {name: value for name, value in os.environ.items() if name not in own}
    environment = {**kept, "PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", shlex.join(words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_launcher(words: list[str]) -> list[str]:
    """What `torchrun`, tools/run_dist_launch.sh or tools/run_dist_slurm.sh would start in each process: [SCRIPT, FLAG,
    ...]
    """
    from torch.distributed.run import get_args_parser

    if words[0] != "torchrun":
        words = run_shell(["env", *words])
        if "torch.distributed.run" not in words:  # under SLURM each task is a Python
            assert any(word.startswith("--ntasks=") for word in words)
            return words[words.index("python") + 1 :]
        words = words[1:]
    launch = get_args_parser().parse_args(words[1:])
    assert int(launch.nproc_per_node) > 1
    return [launch.training_script, *launch.training_script_args]


def run_set_up(words: list[str]) -> None:
    """tools/demo.sh and tools/test.sh, in an environment that is ready: they hand on their words."""
    names = [
        "requirements.txt",
        "requirements-extras.txt",
        *(["requirements-dev.txt"] if words[1] == "tools/test.sh" else []),
    ]
    joined = b"".join((ROOT / name).read_bytes() for name in [*names, "constraints.txt"])
    digest = (
        subprocess.run(["cksum"], input=joined, capture_output=True, check=True)
        .stdout.decode()
        .replace(" ", "")
        .strip()
    )
    Path(".venv", f".installed-{digest}").touch()
    printed = run_shell(words)
    if words[1] == "tools/demo.sh":
        assert printed[0].endswith("tools/demo/run.py")
        demo.make_stages(demo.get_args_parser().parse_args(printed[1:]))
    else:
        assert printed[:2] == ["-m", "ruff"]
        assert (
            printed[printed.index("pytest") + 1 :][-len(words[2:]) or None :] == words[2:]
            or words[2:] == ["--all"]
            or not words[2:]
        )


def run_command(command: str, later: str = "", own: bool = False) -> None:
    for name, meaning in PLACEHOLDERS.items():
        command, later = command.replace(name, meaning), later.replace(name, meaning)
    words = shlex.split(command)
    if words[-1] == "--help":
        with pytest.raises(SystemExit) as left:
            (SCRIPTS.get(words[1]) or tool(words[1])).parse(["--help"])
        assert left.value.code == 0
    elif words[:3] == ["python", "-m", "tools.demo.scenes"]:
        sample_scenes.main([*words[3:], *SCENES])
    elif words[0] == "python" and words[1] in TOOLS:
        run_tool(words[1:], own)
    elif words[0] == "bash":
        assert words[1] in ("tools/demo.sh", "tools/test.sh")
        run_set_up(words)
    elif words[0] == "torchrun" or "./tools/run_dist_" in command:
        run_script(run_launcher(words), later, own)
    elif words[0].startswith("./configs/"):
        run_script(config_words(Path(words[0]).absolute(), *words[1:]), later, own)
    else:
        run_script(without_launcher(words), later, own)


def sequence(path: Path) -> list[str]:
    """The commands of a document, each as often as it is shown but those that are the same for a second time."""
    return list(dict.fromkeys(shown_commands(path)))


def is_row(path: Path, command: str) -> bool:
    """Whether tests/docs/test_model_zoo.py runs it, with a file of the kind that its row names."""
    return path.name == "model_zoo.md" and command.startswith("python finetune_main.py")


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if path.name not in RUN_ELSEWHERE],
    ids=lambda path: path.stem,
)
def test_every_command_runs(path: Path, project: Path) -> None:
    """In the order of the document, so that each finds what those before it wrote."""
    for package in NEEDS.get(path.name, ()):
        pytest.importorskip(package)
    commands = [
        command
        for command in sequence(path)
        if command not in NOT_RUN and not is_row(path, command)
    ]
    for i, command in enumerate(commands):
        try:
            run_command(command, later="\n".join(commands[i + 1 :]), own=path == ROOT / "README.md")
        except (UserError, SystemExit, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{path.name}: {command}\n{error}") from error


def test_no_command_is_left_out() -> None:
    """The only ones that are not run are listed, with the reason."""
    shown = {command for path in DOCUMENTS for command in shown_commands(path)}
    assert set(NOT_RUN) <= shown
    rows = [
        command
        for command in shown_commands(ROOT / "docs" / "model_zoo.md")
        if is_row(ROOT / "docs" / "model_zoo.md", command)
    ]
    assert rows == [row_command(row) for row in checkpoint_rows()]
    assert len(shown) > 60


def test_files_of_packages_are_readable() -> None:
    """What the documents give to pip."""
    requirements = pytest.importorskip("packaging.requirements")
    named = {word for command in NOT_RUN for word in command.split() if word.endswith(".txt")}
    assert named == {"requirements.txt", "requirements-extras.txt", "constraints.txt"}
    for name in named:
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert [requirements.Requirement(line) for line in lines if line]


# --------------------------------------------------------------------------------------------------- what is named in
# the text


def code_of(path: Path) -> str:
    """All text of a document that is code: blocks, and what stands in backticks; not the commands of other code
    bases.
    """
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    if path.name == "published_commands.md":
        text = re.sub(r"^\| `.*?(?<!\\)\|", "|", text, flags=re.M)
    return "\n".join(
        [*re.findall(r"```bash\n(.*?)```", path.read_text(), re.S), *re.findall(r"`([^`]+)`", text)]
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if link.startswith("http"):
            continue
        target = (path.parent / link) if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for name in re.findall(
        r"(?:^|[\s(/=])((?:configs|tools|tests|docs|models|datasets|util)/[\w./-]+\.\w+)",
        code_of(path),
        re.M,
    ):
        assert "NAME" in name or (ROOT / name).exists(), name


def anchors(path: Path) -> set[str]:
    """What the headings of a document are linked by."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def known_flags(capsys: pytest.CaptureFixture) -> set[str]:
    """Every flag of scripts and tools, from their `--help`, and those that are refused with the reason."""
    for module in [*SCRIPTS.values(), *map(tool, TOOLS)]:
        with pytest.raises(SystemExit):
            module.parse(["--help"])
    parsers = [
        demo.get_args_parser().format_help(),
        sample_scenes.get_args_parser().format_help(),
        capsys.readouterr().out,
    ]
    return set(re.findall(r"--\w+", "\n".join(parsers))) | set(REFUSED_FLAGS)


OTHERS_FLAGS = {
    "--nproc_per_node",
    "--use_env",
    "--all",
    "--time",
}  # of torchrun, the older launcher, tools/test.sh, srun


def test_named_flags_exist(capsys: pytest.CaptureFixture) -> None:
    known = known_flags(capsys) | OTHERS_FLAGS
    for path in DOCUMENTS:
        unknown = set(re.findall(r"(?<![\w-])--\w+", code_of(path))) - known
        assert not unknown, f"{path.name}: {unknown}"


def test_readme_names_every_part_that_can_be_chosen() -> None:
    """Its table of choices and the registries are the same."""
    rows = re.findall(r"^\| [^|]+ \| `(--\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    named = {flag: set(re.findall(r"(?:^|[,;] )`([^`]+)`", values)) for flag, values in rows}
    assert named["--pretext"] == set(registry.PRETEXTS)
    assert named["--detector"] == set(registry.DETECTORS)
    assert named["--dataset_file"] == set(registry.DATASETS)
    assert named["--proposals"] == {
        f"{name}PATH" if name.endswith(":") else name for name in registry.PROPOSALS
    }


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_the_python_example_of_the_readme_runs() -> None:
    (code,) = (block for block in python_blocks(ROOT / "README.md") if "build_model" in block)
    small = '"none", backbone="resnet18", enc_layers=1, dec_layers=2)'
    code = code.replace('"none")', small).replace("256, 320", "64, 96")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["outputs"]["pred_boxes"].shape == (1, 300, 4)
    assert set(names["results"][0]) == {"scores", "labels", "boxes"}


def test_the_python_example_of_contributing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector of one's own is known to the script that it starts."""
    started = []
    monkeypatch.setattr(
        "util.runs.session.run_script",
        lambda main, parse: started.append(parse(["--detector", "mine", "--eval"])),
    )
    monkeypatch.setitem(
        registry.DETECTORS, "mine", registry.DETECTORS["detr"]
    )  # removed again afterwards
    (code,) = python_blocks(ROOT / "CONTRIBUTING.md")
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})
    assert started[0].detector == "mine"


def test_python_examples_are_run() -> None:
    """All here but that of torch.hub, which tests/test_hub.py runs, and of Predictor, in tests/test_predictor.py."""
    assert {path.name: len(python_blocks(path)) for path in DOCUMENTS if python_blocks(path)} == {
        "README.md": 3,
        "CONTRIBUTING.md": 1,
    }


def test_citation_and_licence() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [reference["year"] for reference in citation["references"]] == [
        2020,
        2021,
        2021,
        2021,
        2022,
        2023,
    ]
    assert citation["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
