"""Every line of the published READMEs runs in its published form, or is answered with commands that run.

The first column of docs/published_commands.md: script name, order and flags as published, on small data and with flags
added that make model and images small. Launchers run with a `python` that prints its arguments.
"""

import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import detr_main
import run_with_submitit
from datasets import build_dataset, build_labelled
from tests.docs.test_documents import (
    given_file,
    project,  # noqa: F401  (a fixture)
    provide_files,
    run_shell,
    run_tool,
    small,
)
from tests.docs.test_published_commands import ROWS
from tests.documents import ROOT, SCRIPTS, parse, submitted_words, without_launcher
from tests.tiny import write_coco, write_images, write_panoptic, write_voc
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError

# What a reader replaces -> what the tests use.
NAMES = {
    "./configs/<config file>.sh": "./configs/DETReg_fine_tune_full_coco.sh",
    "exps/<config file>": "exps/DETReg_fine_tune_full_coco",
    "<path to config file>": "./configs/r50_deformable_detr.sh",
    "<path to pre-trained model>": "outputs/deformable.pth",
    "<checkpoint.pth>": "outputs/conditional.pth",
    "<output_path>": "conditional",
    "<YOUR_PARTITION>": "gpu",
    "<PARTITION>": "gpu",
    "<partition>": "gpu",
    "<NUM_PROCESS>": "0",
    "<PATH/TO/DATA/ROOT>": "data/ilsvrc/train",
    "<PATH/TO/DATA/META>": "images.txt",
    "<PATH/TO/SAVE/DIR>": "boxes",
    "<DATASET>": "imagenet",
    "<CONFIG>": "configs/selfsup/siamese_detr/main/"
    "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w.py",
    "<NUM_GPU>": "8",
    "<JOB_NAME>": "detr",
    "<OSS_CKPT>": "iter_300000.pth",
    "<SAVE_DIR>": "converted",
    "<CONVERTED_CKPT>": "outputs/condtr_converted.pth",
    "/path/to/coco_panoptic": "data/MSCoco_panoptic",
    "/path/to/coco": "data/MSCoco",
    "path/to/coco": "data/MSCoco",
    "path/to/imagenet": "data/ilsvrc/train",
    "path/to/save_model": "save_model",
    "/output/path": "output/path",
}
FOLDERS = {"sh run.sh": "scripts/", "sh train_": "scripts/"}  # where these are here
NOT_RUN = {
    "torch.hub.load": "tests/test_hub.py",
    "Installation and data": "sets up an environment, or arranges data",
}
COUNTS = {"works": 26, "answered": 6}  # as docs/published_commands.md says


def variants(line: str) -> list[str]:
    """Return a line with its optional part, and without; or one for each choice in brackets."""
    match = re.search(r" ?\[([^\]]+)\]", line)
    if match is None:
        return [line]
    choices = match[1].split("|") if "|" in match[1] else ["", match[1]]
    return [" ".join(f"{line[: match.start()]} {c} {line[match.end() :]}".split()) for c in choices]


def published_lines() -> list[str]:
    """Return each line that a published README tells to type to train, evaluate, convert or search boxes."""
    spans = [
        line
        for section, published, *_ in ROWS
        if section not in NOT_RUN
        for line in re.findall(r"`([^`]+)`", published.replace("\\|", "|"))
    ]
    lines = [line for span in spans for line in variants(span)]
    return [line for line in lines if not line.startswith(tuple(NOT_RUN))]


LINES = published_lines()


def with_names(line: str) -> str:
    for name, meaning in NAMES.items():
        line = line.replace(name, meaning)
    for start, folder in FOLDERS.items():
        if line.startswith(start):
            line = line.replace("sh ", f"sh {folder}", 1)
    return line


def started_by(line: str) -> list[str]:
    """Return [script, flag, ...] that a line starts, through its launcher."""
    words = shlex.split(line)
    if words[0] == "python":
        return without_launcher(words)
    if not Path(words[0]).exists() and "=" not in words[0] and words[0] not in ("sh", "bash"):
        raise AssertionError(f"{words[0]} does not exist")
    printed = run_shell(["env", *words])
    if words[0].startswith("./configs/"):
        return printed
    return printed[next(i for i, word in enumerate(printed) if word.endswith(".py")) :]


def run(words: list[str], shrink: bool = True) -> None:
    """Run a script or tool in this process, three steps if it trains."""
    name = str(words[0]).removeprefix(f"{ROOT}/").removeprefix(f"{Path.cwd()}/")
    words = [name, *words[1:]]
    if name.startswith("tools/"):
        run_tool(words, strict=False)
        return
    provide_files(words, strict=False)
    # Of the codebases with one script, main.py trains with labels.
    kind = "main.py" if name == "main.py" and _pre_trains(words) else "finetune_main.py"
    flags = small([kind, *words[1:]], keeps=False) if shrink else words[1:]
    script = {**SCRIPTS, "detr_main.py": detr_main}[name]
    script.main(script.parse(flags))


def _pre_trains(words: list[str]) -> bool:
    return "--imagenet_path" in words or "--pretext" in words


def answers(message: str) -> list[list[str]]:
    """Return the commands that a message suggests."""
    return [shlex.split(line) for line in message.splitlines() if line.startswith("  ")]


def run_line(line: str) -> str:
    """Run a published line, or else each command that it is answered with. Returns which: works, or answered."""
    words = started_by(line)
    try:
        run(words)
        return "works"
    except UserError as error:
        message = str(error)
    commands = answers(message)
    assert commands, f"{line}\nends in an error that names no command:\n{message}"
    for command in commands:
        run(without_launcher(command), shrink=False)  # it has the added flags already
    return "answered"


def given_files() -> None:
    """Write checkpoints whose name does not tell what they contain, and a list of images."""
    for name, detector in (("conditional", "conditional_detr"), ("deformable", "deformable_detr")):
        content = given_file("checkpoint.pth", ["finetune_main.py", "--detector", detector])
        save_checkpoint(content, Path("outputs", f"{name}.pth"))
    save_checkpoint(given_file("condtr", []), Path("outputs", "condtr_converted.pth"))
    folder = Path("data/ilsvrc/train")
    images = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    Path("images.txt").write_text("".join(f"{path}\n" for path in images[:2]))


def expected(line: str) -> str:
    """Codebases with a single script train with labels by `main.py`, which is answered; the rest works."""
    single_script = re.search(r" main\.py ", line) and "--imagenet_path" not in line
    return "answered" if single_script else "works"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[-40:])
def test_published_line(line: str, project: Path) -> None:  # noqa: F811
    given_files()
    run_this = run_submitit if "submitit" in line else run_line
    assert run_this(with_names(line)) == expected(line)


def run_submitit(line: str) -> str:
    """tests/test_submitit.py submits it to a SLURM of test programs, and trains by submitit's own executors."""
    words = shlex.split(line)
    args = run_with_submitit.parse(words[2:])
    assert (args.nodes, args.ngpus, args.timeout) == (4, 8, 3000)
    run(submitted_words(words))
    return "works"


def test_document_has_the_counts() -> None:
    assert Counter(map(expected, LINES)) == COUNTS
    text = (ROOT / "docs" / "published_commands.md").read_text()
    assert f"{COUNTS['works']} work as published" in text
    assert f"{COUNTS['answered']} are answered" in text


# ---------------------------------------------------------------------------------------------------------- layouts


def _detr_coco(root: Path) -> list[str]:
    write_coco(root / "coco")
    return ["finetune_main.py", "--coco_path", str(root / "coco")]


def _conditional_coco(root: Path) -> list[str]:
    words = _detr_coco(root)
    (root / "coco" / "images").mkdir()
    for name in ("train2017", "val2017"):
        shutil.move(root / "coco" / name, root / "coco" / "images")
    return words


def _detr_panoptic(root: Path) -> list[str]:
    write_panoptic(write_coco(root / "coco"), root / "coco_panoptic")
    paths = ["--coco_path", str(root / "coco"), "--coco_panoptic_path", str(root / "coco_panoptic")]
    return ["finetune_main.py", "--dataset_file", "coco_panoptic", *paths]


def _updetr_imagenet(root: Path) -> list[str]:
    for name in ("n06785654", "n04584207"):
        write_images(root / "imagenet" / name)
    return ["main.py", "--imagenet_path", str(root / "imagenet")]


def _detreg_imagenet(name: str) -> Callable[[Path], list[str]]:
    def write(root: Path) -> list[str]:
        for split in ("train", "val"):
            write_images(root / "data" / name / split / "n01440764")
        return ["main.py", "--dataset", name.replace("ilsvrc", "imagenet")]

    return write


def _detreg_coco(root: Path) -> list[str]:
    write_coco(root / "data" / "MSCoco")
    return ["finetune_main.py", "--dataset", "coco"]


def _detreg_pascal(root: Path) -> list[str]:
    write_voc(root / "data" / "pascal" / "VOCdevkit")
    return ["finetune_main.py", "--dataset", "voc"]


def _siamese_links(root: Path) -> list[str]:
    write_coco(root / "coco2017")
    (root / "data" / "datasets").mkdir(parents=True)
    (root / "data" / "datasets" / "mscoco2017").symlink_to(root / "coco2017")
    return ["finetune_main.py", "--root_path", "data/datasets/mscoco2017"]


LAYOUTS = {
    "UP-DETR, DETR: COCO": _detr_coco,
    "UP-DETR: ImageNet": _updetr_imagenet,
    "DETR: panoptic COCO": _detr_panoptic,
    "Conditional DETR: COCO": _conditional_coco,
    "DETReg: ImageNet": _detreg_imagenet("ilsvrc"),
    "DETReg: ImageNet-100": _detreg_imagenet("ilsvrc100"),
    "DETReg: COCO": _detreg_coco,
    "DETReg: PASCAL VOC": _detreg_pascal,
    "Siamese DETR: links": _siamese_links,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = LAYOUTS[name](tmp_path)
    settings = parse(words)
    if words[0] == "main.py":
        splits = [build_dataset("train", settings)]
    else:
        splits = build_labelled(settings)
    assert min(map(len, splits)) > 0


def test_every_layout_is_in_the_document() -> None:
    text = (ROOT / "docs" / "published_commands.md").read_text()
    assert re.findall(r"^\| ([\w-][^|`]+: [^|`]+) \|", text, re.M) == list(LAYOUTS)
