"""Run every command of README, CONTRIBUTING and docs/, in order, in a folder that looks like the project.

Each command gets extra flags that make model, images and epochs small. It stops after three steps unless a later
command of its document needs its files. Launchers run with a `python` that prints its arguments. Flags, files, links
and Python examples of the documents are checked too.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import run_with_submitit
from tests.docs.test_model_zoo import row_command
from tests.docs.test_model_zoo import rows as checkpoint_rows
from tests.documents import (
    DOCUMENTS,
    PYTHON_EXAMPLES,
    ROOT,
    SCRIPTS,
    TOOLS,
    config_words,
    import_tool,
    published_commands,
    python_blocks,
    python_examples,
    shown_commands,
    submitted_words,
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
    write_few_shot_files,
    write_images,
    write_panoptic,
    write_voc,
)
from tools.demo import run as demo
from tools.demo import scenes as sample_scenes
from tools.demo import stages as demo_stages
from util.checkpoints.checkpoint import save_checkpoint
from util.checkpoints.weight_files import cached_path
from util.errors import UserError
from util.settings import registry
from util.settings.table import UNSUPPORTED_FLAGS

# What a reader would replace by names of their own -> what the tests use.
PLACEHOLDERS = {
    "/path/to/coco": "data/MSCoco",
    "path/to/coco": "data/MSCoco",
    "path/to/imagenet": "data/ilsvrc/train",
    "/output/path": "output/path",
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
    "source .venv/bin/activate": "changes the shell in which it is typed",
    "pip install -r requirements.txt -r requirements-extras.txt -c constraints.txt": "downloads packages; the files "
    "are parsed instead",
    "pip install -r requirements.txt -c constraints.txt": "downloads packages; the files are parsed instead",
    "pip install -r requirements-web.txt": "downloads packages; the file is parsed instead",
    **dict.fromkeys(
        (
            "python tools/web_demo.py --checkpoint outputs/coco/checkpoint.pth",
            "python tools/web_demo.py --checkpoint outputs/coco/checkpoint.pth detr_resnet50 "
            "--examples data/MSCoco/val2017",
        ),
        "serves a page until it is stopped; tests/tools/test_web_demo.py serves one",
    ),
    "pip install -e .": "tests/predetr/test_installed.py does it, into a temporary folder",
    "curl -L -o model.yml.gz "
    "https://github.com/opencv/opencv_extra/raw/4.x/testdata/cv/ximgproc/model.yml.gz": "downloads a file",
    **dict.fromkeys(
        (
            "python tools/export.py --checkpoint outputs/coco/checkpoint.pth --out detector.onnx      "
            "--preprocessing --postprocessing",
            "python tools/export.py --checkpoint outputs/coco/checkpoint.pth --out detector.pt2",
        ),
        "records a graph, which takes long; tests/tools/test_export.py writes such files",
    ),
    **dict.fromkeys(
        (
            "python tools/self_training.py --checkpoint outputs/few/checkpoint_best.pth      --images data/unlabelled "
            "--output_dir outputs/round1 -- --epochs 20 --batch_size 8",
            "python tools/self_training.py --checkpoint outputs/first/checkpoint.pth      --images data/unlabelled "
            "--snap_to data/boxes --threshold 0.3 --output_dir outputs/second      -- --epochs 20 --batch_size 8",
        ),
        "trains; tests/tools/test_self_training.py does a round",
    ),
    "python tools/soak.py --output_dir outputs/soak --rounds 8 --epochs 12": "trains for half an hour; "
    "tests/tools/test_soak.py runs a short one",
    "python tools/replay.py outputs/coco/nonfinite/step_000123_rank_0.pth": "needs a step that was skipped; "
    "tests/test_engine.py writes one and replays it",
    "python tools/kill_runs.py --kills 20": "takes minutes; tests/tools/test_kill_runs.py, marked slow, does it",
    "python tools/transfer_study.py report outputs/study --output outputs/transfer.md": "needs runs of an hour; "
    "tests/tools/study/test_report.py writes such a report",
}
RUN_ELSEWHERE = {"docs/custom_dataset.md": "test_custom_dataset.py"}  # runs the same commands
REQUIRED_EXTRAS = {
    "README.md": ("skimage", "matplotlib"),
    "docs/outputs.md": ("matplotlib",),
    "docs/proposals.md": ("cv2",),
    "docs/large_data.md": ("cv2",),
    "docs/visualization.md": ("cv2",),
}
ON_CPU = ["--device", "cpu", "--num_workers", "0", "--image_size", "64"]
SMALL_TOOLS = {
    "tools/cache_proposals.py": ["--num_workers", "0"],
    "tools/check_dataset.py": ["--num_workers", "0"],
    "tools/make_split.py": ["--filter_pct", "0.5"],
    "tools/transfer_study.py prepare": ["--image_size", "64", "--fractions", "1", "0.5"],
    # tests/tools/study/test_runner.py runs what this lists
    "tools/transfer_study.py run": ["--list", "--fractions", "1", "0.5"],
    # tests/tools/test_benchmark.py runs every subject
    "tools/benchmark.py step": [
        *("--device", "cpu", "--turns", "1", "--size", "64", "64", "--no_peers", "--no_roof"),
        *(*MODEL_FLAGS, "--lr_backbone", "0"),
    ],
    "tools/benchmark.py kernels": [
        *("--device", "cpu", "--turns", "1", "--image_size", "64", "--batch_size", "1"),
    ],
    "tools/benchmark.py gpu": ["--device", "cpu", "--tiny", "--parts", "resume"],
    "tools/predict.py": ON_CPU,
    "tools/evaluate_proposals.py": ON_CPU,
    "tools/evaluate_patches.py": ON_CPU,
    "tools/visualize.py samples": [*ON_CPU, *MODEL_FLAGS],
    "tools/visualize.py attention": ["--device", "cpu", "--image_size", "64"],
    "tools/visualize.py sampling": ["--device", "cpu", "--image_size", "64"],
    "tools/visualize.py patches": ON_CPU,
    "tools/visualize.py proposals": ["--device", "cpu"],
    "tools/visualize.py class_agnostic": ["--device", "cpu", "--image_size", "64"],
    "tools/visualize.py errors": ON_CPU,
}
SCENES = ["--num_train", "4", "--num_val", "2", "--num_unlabelled", "4"]
# Stands in for programs: prints its arguments. `python -c CODE` prints nothing.
PRINTER = '#!/bin/sh\n[ "$1" = -c ] || printf \'%s\\n\' "$@"\n'

# ----------------------------------------------------------------------------------------- project folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project made of links, data where the documents expect it, and a `python` that prints."""
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
    coco = write_coco(tmp_path / "data" / "MSCoco", train=4, val=2)
    write_panoptic(coco, tmp_path / "data" / "MSCoco_panoptic")
    write_few_shot_files(tmp_path / "data" / "MSCoco", tmp_path / "data" / "cocosplit")
    write_voc(
        tmp_path / "data" / "pascal" / "VOCdevkit", {**VOC_LISTS, "2012_train": 4, "2012_val": 2}
    )
    Image.new("RGB", (240, 200)).save(tmp_path / "image.jpg")
    write_airbus(tmp_path / "data" / "airbus-ship-detection")
    for name in ("ilsvrc", "ilsvrc100"):
        write_images(tmp_path / "data" / name / "train" / "photos")
    pack_images(tmp_path / "data" / "ilsvrc" / "train" / "photos", tmp_path / "data" / "shards")
    for name in (ROOT / "datasets" / "imagenet100.txt").read_text().split():
        (tmp_path / "data" / "ilsvrc" / "train" / name).mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    monkeypatch.setattr("util.checkpoints.weight_files.download", _no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pack_images(images: Path, target: Path, shards: int = 16) -> None:
    """Write `shards` tar files with one image each."""
    paths = sorted(images.iterdir())
    target.mkdir()
    for number in range(shards):
        with tarfile.open(target / f"train-{number:03d}.tar", "w") as tar:
            tar.add(paths[number % len(paths)], f"{number}.png")


def _no_network(url: str, *args, **kwargs) -> None:
    raise AssertionError(f"fetches {url}")


def given_file(path: str, words: list[str]) -> dict:
    """Return a small checkpoint of the kind that a command reads, judged by file name and flags."""
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
    if "panoptic" in path and "boxes" not in path:
        return {"model": filled(masks())}
    if "coco_panoptic" in words:
        return {"model": filled(shapes("detr", *SMALL, outputs=251))}
    usual = "deformable_detr" if "DETReg" in path else "detr"
    detector = words[words.index("--detector") + 1] if "--detector" in words else usual
    if words[:2] == ["tools/visualize.py", "sampling"]:
        detector = "deformable_detr"
    if (
        "updetr" in words
        or words[0] in ("tools/visualize_pretext.py", "tools/evaluate_patches.py")
        or words[:2] == ["tools/visualize.py", "patches"]
    ):
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
    """Return the checkpoints that a command reads."""
    after = dict(zip(words, words[1:], strict=False))
    flags = (
        "--resume",
        "--pretrain",
        "--frozen_weights",
        "--frozen_weigths",
        "--checkpoint",
        "--ckpt",
    )
    named = [after.get(flag) for flag in flags]
    if words[0] == "tools/convert_checkpoint.py":
        named.append(words[1])
    return [name for name in named if name and name != "auto"]


def provide_files(words: list[str], strict: bool) -> None:
    """Write the checkpoints that a command reads, unless an earlier command has written them.

    strict: files in outputs/ must come from an earlier command (README).
    """
    for name in files_read(words):
        place = Path(cached_path(name)) if name.startswith("https://") else Path(name)
        written_before = name.startswith("outputs/") and place.exists()
        assert written_before or not (strict and name.startswith("outputs/")), (
            f"no earlier command writes {name}"
        )
        if not written_before:
            save_checkpoint(given_file(name, words), place)


# ------------------------------------------------------------------------------------------- commands


def small(words: list[str], keeps: bool) -> list[str]:
    """Return the flags of a training command, followed by flags that make it small.

    keeps: its files are needed later, so it trains a whole epoch instead of `--dry_run`.
    """
    more = list(ON_CPU)
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


def run_script(words: list[str], later: str, strict: bool) -> None:
    """Train or evaluate in this process; only three steps if no `later` command reads what it writes."""
    folder = dict(zip(words, words[1:], strict=False)).get("--output_dir", "")
    keeps = folder.startswith("outputs/") and bool(re.search(rf"{folder}\b", later))
    provide_files(words, strict)
    SCRIPTS[words[0]].main(SCRIPTS[words[0]].parse(small(words, keeps)))


def provide_logs(words: list[str], strict: bool) -> None:
    """Write a published `log.txt` for each run that tools/compare_runs.py reads."""
    for name in words[1 : words.index("--output")]:
        if not (Path(name) / "log.txt").exists():
            assert not strict, f"no earlier command writes {name}"
            Path(name).mkdir(parents=True)
            Path(name, "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 1.0}) + "\n")


def run_tool(words: list[str], strict: bool) -> None:
    if words[0] == "tools/compare_runs.py":
        provide_logs(words, strict)
    provide_files(words, strict)
    more = SMALL_TOOLS.get(" ".join(words[:2]), SMALL_TOOLS.get(words[0], []))
    tool = import_tool(words[0])
    tool.main(tool.parse([*words[1:], *more]))


def run_shell(words: list[str]) -> list[str]:
    """Run a launcher or a set-up script with the `python` that prints. Returns the printed lines."""
    set_by_user = (
        "LAUNCH",
        "GPUS_PER_NODE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PREDETR_VENV",
        "PYTHON",
        "PREDETR_SYSTEM_TORCH",
    )
    kept = {name: value for name, value in os.environ.items() if name not in set_by_user}
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
    """Return [SCRIPT, FLAG, ...] that torchrun, run_dist_launch.sh or run_dist_slurm.sh would start."""
    from torch.distributed.run import get_args_parser

    if words[0] != "torchrun":
        words = run_shell(["env", *words])
        if "torch.distributed.run" not in words:  # under SLURM each task starts Python
            assert any(word.startswith("--ntasks=") for word in words)
            return words[words.index("python") + 1 :]
        words = words[1:]
    launch = get_args_parser().parse_args(words[1:])
    assert int(launch.nproc_per_node) > 1
    return [launch.training_script, *launch.training_script_args]


def run_set_up(words: list[str]) -> None:
    """Run tools/demo.sh, docs.sh or test.sh in an environment that is complete, and check what they start."""
    names = [
        "requirements.txt",
        "requirements-extras.txt",
        *(["requirements-dev.txt"] if words[1] != "tools/demo.sh" else []),
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
        demo_stages.build_stages(demo.get_args_parser().parse_args(printed[1:]))
    elif words[1] == "tools/docs.sh":  # tests/tools/test_build_site.py builds it
        assert printed[0] == "tools/build_site.py"
        import_tool(printed[0]).parse(printed[1:])
    else:
        assert printed[:2] == ["-m", "ruff"]
        assert (
            printed[printed.index("pytest") + 1 :][-len(words[2:]) or None :] == words[2:]
            or words[2:] == ["--all"]
            or not words[2:]
        )


def run_command(command: str, later: str = "", strict: bool = False) -> None:
    """Run one command of a document. later: the commands after it, as text."""
    for name, meaning in PLACEHOLDERS.items():
        command, later = command.replace(name, meaning), later.replace(name, meaning)
    words = shlex.split(command)
    if words[-1] == "--help":
        with pytest.raises(SystemExit) as exit_info:
            (SCRIPTS.get(words[1]) or import_tool(words[1])).parse(["--help"])
        assert exit_info.value.code == 0
    elif words[:3] == ["python", "-m", "tools.demo.scenes"]:
        sample_scenes.main([*words[3:], *SCENES])
    elif words[0] == "python" and words[1] in TOOLS:
        run_tool(words[1:], strict)
    elif words[0] == "bash":
        assert words[1] in ("tools/demo.sh", "tools/docs.sh", "tools/test.sh")
        run_set_up(words)
    elif words[:2] == ["python", "run_with_submitit.py"]:  # tests/test_submitit.py submits
        run_script(submitted_words(words), later, strict)
    elif words[0] == "torchrun" or "./tools/run_dist_" in command:
        run_script(run_launcher(words), later, strict)
    elif words[0].startswith("./configs/"):
        run_script(config_words(Path(words[0]).absolute(), *words[1:]), later, strict)
    else:
        run_script(without_launcher(words), later, strict)


def sequence(path: Path) -> list[str]:
    """Return the commands of a document in order, without repetitions."""
    return list(dict.fromkeys(shown_commands(path)))


def is_row(path: Path, command: str) -> bool:
    """Whether tests/docs/test_model_zoo.py runs the command, with a checkpoint of the kind of its row."""
    return path.name == "model_zoo.md" and command.startswith("python finetune_main.py")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if relative(path) not in RUN_ELSEWHERE],
    ids=relative,
)
def test_every_command_runs(path: Path, project: Path) -> None:
    """In the order of the document, so that each command finds what earlier ones wrote."""
    for package in REQUIRED_EXTRAS.get(relative(path), ()):
        pytest.importorskip(package)
    commands = [
        command
        for command in sequence(path)
        if command not in NOT_RUN and not is_row(path, command)
    ]
    if path.name == "published_commands.md":  # tests/docs/test_published_lines.py runs the others
        commands = [command for command in commands if command not in published_commands()]
    for i, command in enumerate(commands):
        try:
            later = "\n".join(commands[i + 1 :])
            run_command(command, later, strict=path == ROOT / "README.md")
        except (UserError, SystemExit, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{path.name}: {command}\n{error}") from error


def test_no_command_is_skipped_without_a_reason() -> None:
    shown = {command for path in DOCUMENTS for command in shown_commands(path)}
    assert set(NOT_RUN) <= shown
    rows = [
        command
        for command in shown_commands(ROOT / "docs" / "model_zoo.md")
        if is_row(ROOT / "docs" / "model_zoo.md", command)
    ]
    assert rows == [row_command(row) for row in checkpoint_rows()]
    assert len(shown) > 60


def test_requirement_files_of_the_documents_are_valid() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    named = {word for command in NOT_RUN for word in command.split() if word.endswith(".txt")}
    extras = {"requirements-extras.txt", "requirements-web.txt"}
    assert named == {"requirements.txt", "constraints.txt", *extras}
    for name in named:
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert [requirements.Requirement(line) for line in lines if line]


# ------------------------------------------------------------------------------- flags, files, links, examples


def code_of(path: Path) -> str:
    """Return all code of a document, blocks and spans, without the commands of other codebases."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    if path.name == "published_commands.md":
        text = re.sub(r"^\| `.*?(?<!\\)\|", "|", text, flags=re.M)
    return "\n".join(
        [*re.findall(r"```bash\n(.*?)```", path.read_text(), re.S), *re.findall(r"`([^`]+)`", text)]
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
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
    """Return the anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def known_flags(capsys: pytest.CaptureFixture) -> set[str]:
    """Return every flag of scripts and tools, from their `--help`, and those that are refused with a reason."""
    for module in [*SCRIPTS.values(), run_with_submitit, *map(import_tool, TOOLS)]:
        with pytest.raises(SystemExit):
            module.parse(["--help"])
    parsers = [
        demo.get_args_parser().format_help(),
        sample_scenes.get_args_parser().format_help(),
        capsys.readouterr().out,
    ]
    return set(re.findall(r"--\w+", "\n".join(parsers))) | set(UNSUPPORTED_FLAGS)


# Of torchrun, the older launcher, docker, tools/test.sh, srun and TensorBoard.
OTHERS_FLAGS = {
    *("--nproc_per_node", "--use_env", "--master_port", "--standalone"),
    *("--nnodes", "--max_restarts", "--rdzv_backend", "--rdzv_endpoint", "--gpus", "--ipc"),
    *("--all", "--time", "--logdir", "--signal"),
}


def test_named_flags_exist(capsys: pytest.CaptureFixture) -> None:
    known = known_flags(capsys) | OTHERS_FLAGS
    for path in DOCUMENTS:
        unknown = set(re.findall(r"(?<![\w-])--\w+", code_of(path))) - known
        assert not unknown, f"{path.name}: {unknown}"


@pytest.mark.parametrize("name", ["README.md", "docs/flags.md"])
def test_tables_of_choices_match_the_registry(name: str) -> None:
    """Rows end with the flag and its values; a row in README has a description in front."""
    text = (ROOT / name).read_text()
    rows = re.findall(r"^\|(?: [^|]+ \|)? `(--\w+)` \| ([^|]+) \|$", text, re.M)
    named = {flag: set(re.findall(r"(?:^|[,;] )`([^`]+)`", values)) for flag, values in rows}
    assert named["--pretext"] == set(registry.PRETEXTS)
    assert named["--detector"] == set(registry.DETECTORS)
    assert named["--dataset_file"] == set(registry.DATASETS)
    assert named["--proposals"] == {
        f"{name}PATH" if name.endswith(":") else name for name in registry.PROPOSALS
    }


def test_python_examples_of_build_model_run() -> None:
    small = '"none", backbone="resnet18", enc_layers=1, dec_layers=2)'
    for code in python_examples("build_model("):
        code = code.replace('"none")', small).replace("256, 320", "64, 96")
        names: dict = {}
        exec(compile(code, "example", "exec"), names)
        assert names["outputs"]["pred_boxes"].shape == (1, 300, 4)
        assert set(names["results"][0]) == {"scores", "labels", "boxes", "queries"}


def test_python_example_of_a_new_detector_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that is added to the registry is known to the entry script."""
    started = []
    monkeypatch.setattr(
        "util.runs.session.run_script",
        lambda main, parse: started.append(parse(["--detector", "mine", "--eval"])),
    )
    # Registered here first, so that monkeypatch removes it again.
    monkeypatch.setitem(registry.DETECTORS, "mine", registry.DETECTORS["detr"])
    (code,) = python_examples("DETECTORS[")
    exec(compile(code, "example", "exec"), {})
    assert started[0].detector == "mine"


def test_every_python_example_is_run() -> None:
    for path in DOCUMENTS:
        for code in python_blocks(path):
            assert any(kind in code for kind in PYTHON_EXAMPLES), (
                f"{path.name}: no test runs\n{code}"
            )
    for kind in PYTHON_EXAMPLES:
        assert python_examples(kind)


def test_citation_and_license() -> None:
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
