"""The names that users of the published codebases type: scripts, launchers and files, with their arguments in order."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import detr_main
import finetune_main
from tests.documents import CONFIGS, ROOT, config_words, parse
from tests.tiny import write_images, write_voc
from tools import cache_proposals
from util.distributed import _slurm_environment
from util.settings import FINETUNE, PRETRAIN

SIAMESE = "configs/selfsup/siamese_detr"
UPDETR = "configs/selfsup/updetr"
CONDITIONAL_100 = "r50_condtr_100q_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w"
# Published path of a config of Siamese DETR's codebase -> config here.
SIAMESE_CONFIGS = {
    **{
        f"{SIAMESE}/{folder}/{path.stem}.py": path.stem
        for path in CONFIGS.values()
        if path.stem.startswith(("r50_condtr", "r50_vanillatr", "r50_deformtr"))
        for folder in ["main" if "_rdiscr_gdiscr_" in path.stem else "ablations"]
    },
    f"{UPDETR}/main/r50_vanillatr_imgnet_gpu16_step30w.py": "UPDETR_vanilla_pretrain_in",
    f"{UPDETR}/main/r50_condtr_100q_imgnet_gpu16_step30w.py": "UPDETR_conditional_pretrain_in",
    f"{UPDETR}/main/r50_condtr_300q_imgnet_gpu16_step30w.py": "UPDETR_conditional_300q_pretrain_in",
    f"{UPDETR}/main/r50_deformtr_ms_300q_imgnet_gpu32_step30w.py": "UPDETR_deformable_pretrain_in",
    f"{UPDETR}/main/r50_deformtr_ss_300q_imgnet_gpu32_step30w.py": (
        "UPDETR_deformable_single_scale_pretrain_in"
    ),
    f"{UPDETR}/main/r50_condtr_100q_coco_gpu16_step12w.py": "UPDETR_conditional_pretrain_coco",
    f"{UPDETR}/ablations/r50_condtr_100q_coco_edgebox_gpu16_step12w.py": (
        "UPDETR_conditional_edgebox_pretrain_coco"
    ),
}
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "tools").glob("*.sh")])


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` and `srun` print their name and arguments, one per line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "srun"):
        (folder / name).write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\"\n")
        (folder / name).chmod(0o755)
    own = ("LAUNCH", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(line: str, environment: dict[str, str], cwd: Path = ROOT, status: int = 0) -> list[str]:
    """Run a command line and return the lines of its output."""
    done = subprocess.run(
        line.split(), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return (done.stdout if status == 0 else done.stderr).splitlines()


def behind(words: list[str], script: str) -> list[str]:
    return words[words.index(script) :]


# -------------------------------------------------------------------------------------------------------------- sh


@pytest.mark.skipif(shutil.which("dash") is None, reason="needs dash")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_starts_under_dash(path: Path) -> None:
    """Its first command re-executes bash where it needs it; the rest is then not read by dash."""
    if path.name == "setup_env.sh":
        return  # sourced by bash
    text = path.read_text()
    if '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"' in text:
        before = text.split("[ -n ")[0]
        assert all(line.startswith("#") or not line for line in before.splitlines())
        return
    subprocess.run(["dash", "-n", str(path)], check=True)


def test_launchers_run_under_sh(programs: dict[str, str]) -> None:
    words = run("sh tools/run_dist_launch.sh 2 configs/UPDETR_pretrain_in.sh --seed 3", programs)
    assert words[-2:] == ["--seed", "3"]
    words = run("sh tools/run_dist_slurm.sh PART JOB 2 main.py --imagenet_path I", programs)
    assert words[0] == "srun"
    assert words[-4:] == ["python", "main.py", "--imagenet_path", "I"]


# ------------------------------------------------------------------------------------------------------- the names


def test_second_script_of_updetr() -> None:
    assert (detr_main.main, detr_main.parse) == (finetune_main.main, finetune_main.parse)


@pytest.mark.parametrize("name", ["r50", "r50dc5", "r101", "r101dc5"])
def test_scripts_of_conditional_detr(name: str, programs: dict[str, str]) -> None:
    line = f"bash scripts/conddetr_{name}_epoch50.sh --coco_path ../data/coco"
    words = run(line.replace("bash", "sh"), programs)
    assert words == run(line, programs)
    assert words[words.index("--nproc_per_node") + 1] == "8"
    config = CONFIGS[f"ConditionalDETR_{name.replace('dc5', '_dc5')}_coco"]
    added = ["--output_dir", f"output/conddetr_{name}_epoch50", "--coco_path", "../data/coco"]
    assert behind(words, FINETUNE) == [*config_words(config), *added]


@pytest.mark.parametrize("published", SIAMESE_CONFIGS)
def test_pre_training_script_of_siamese_detr(published: str, programs: dict[str, str]) -> None:
    words = run(f"sh tools/srun_train.sh PARTITION {published} 32 JOB_NAME", programs)
    assert {"--partition=PARTITION", "--job-name=JOB_NAME", "--ntasks=32"} <= set(words)
    assert behind(words, PRETRAIN) == config_words(CONFIGS[SIAMESE_CONFIGS[published]])


def test_unknown_config_of_siamese_detr(programs: dict[str, str]) -> None:
    for line, part in (
        (f"sh tools/srun_train.sh P {SIAMESE}/main/nothing.py 32 J", "no config nothing"),
        ("sh tools/srun_train.sh P", "usage"),
        ("sh scripts/train_coco.sh P", "usage"),
        ("sh scripts/run.sh P", "usage"),
    ):
        (message,) = run(line, programs, status=2)
        assert message.startswith("error: ")
        assert part in message


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_fine_tuning_scripts_of_siamese_detr(
    data: str, programs: dict[str, str], tmp_path: Path
) -> None:
    """The checkpoint is relative to where the script is called."""
    (tmp_path / "detr_model.pth").touch()
    line = f"sh {ROOT}/scripts/train_{data}.sh PARTITION detr_model.pth 8 JOB_NAME"
    words = run(line, programs, cwd=tmp_path)
    assert {"--partition=PARTITION", "--job-name=JOB_NAME", "--ntasks=8"} <= set(words)
    args = parse(behind(words, FINETUNE))
    assert args.pretrain == str(tmp_path / "detr_model.pth")
    assert (args.detector, args.num_queries, args.lr_backbone) == ("conditional_detr", 100, 5e-5)
    assert args.dataset_file == {"coco": "coco", "voc": "voc_coco"}[data]


def test_edge_boxes_script_of_siamese_detr(programs: dict[str, str]) -> None:
    words = run(
        "sh scripts/run.sh PARTITION 8 data/imagenet meta/train.txt SAVE imagenet", programs
    )
    assert {"srun", "--partition=PARTITION", "--cpus-per-task=8"} <= set(words)
    args = cache_proposals.parse(words[words.index("python") + 2 :])
    assert (args.images, args.list) == ("data/imagenet", "meta/train.txt")
    assert (args.proposals, args.num_workers) == ("edge_boxes", 8)
    assert args.output_dir == Path("SAVE/edgebox/imagenet")


def test_class_list_of_detreg() -> None:
    names = (ROOT / "datasets" / "category.txt").read_text()
    assert names == (ROOT / "datasets" / "imagenet100.txt").read_text()


def test_paths_of_siamese_detr() -> None:
    """`--root_path` is the path of `--dataset_file`, whose voc is voc_coco here."""
    line = "--lr_backbone 5e-5 --num_queries 100 --detector conditional_detr --root_path ROOT"
    args = parse([FINETUNE, *line.split()])
    assert (args.dataset_file, args.coco_path) == ("coco", "ROOT")
    args = parse([FINETUNE, "--dataset_file", "voc", *line.split()])
    assert (args.dataset_file, args.voc_path) == ("voc_coco", "ROOT")


def test_folds_of_siamese_detr_say_what_to_use(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        finetune_main.parse(["--root_path", "R", "--split", "1"])
    message = capsys.readouterr().err
    assert "--train_annotations" in message
    assert message.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- launches


def test_voc_in_the_folders_of_siamese_detr(tmp_path: Path) -> None:
    """`VOCdevkit/VOC2012` and, for the test images, `2007/VOCdevkit/VOC2007`."""
    from datasets import build_dataset, build_labelled

    write_voc(tmp_path / "VOCdevkit")
    (tmp_path / "2007" / "VOCdevkit").mkdir(parents=True)
    shutil.move(tmp_path / "VOCdevkit" / "VOC2007", tmp_path / "2007" / "VOCdevkit")
    words = [FINETUNE, "--dataset_file", "voc", "--root_path", str(tmp_path)]
    train, val = build_labelled(parse(words))
    assert (len(train), len(val)) == (2, 3)
    assert Path(val.path(0)).is_file()
    assert Path(train.path(0)).is_file()
    words = [PRETRAIN, "--pretext", "siamese", "--dataset_file", "voc", "--voc_path", str(tmp_path)]
    assert len(build_dataset("train", parse(words))) == 5


def test_folder_data_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import build_dataset

    write_images(tmp_path / "disk" / "ilsvrc" / "train")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    for flags in (["--dataset", "imagenet"], ["--imagenet_path", "data/ilsvrc/train"]):
        assert len(build_dataset("train", parse([PRETRAIN, *flags]))) > 0
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/data" in ignored, "with a slash behind it, git would list the link"


def test_launch_without_use_env() -> None:
    """The rank arrives as a flag, too."""
    for flag in ("--local-rank=1", "--local_rank=1"):
        assert parse([PRETRAIN, flag, "--imagenet_path", "I"]).imagenet_path == "I"
        assert parse([FINETUNE, flag, "--coco_path", "C"]).coco_path == "C"


def test_second_launch_on_a_machine_takes_a_free_port(programs: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        except OSError:
            pass  # another program has it, which is as good
        done = subprocess.run(
            ["bash", "tools/run_dist_launch.sh", "2", "main.py"],
            cwd=ROOT,
            env=programs,
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.splitlines()
        port = words[words.index("--master_port") + 1]
        assert int(port) > 29500
        assert done.stderr == f"port 29500 is in use, this run takes {port}\n"
        given = run("bash tools/run_dist_launch.sh 2 main.py", {**programs, "MASTER_PORT": "29500"})
        assert given[given.index("--master_port") + 1] == "29500"


def test_slurm_jobs_on_one_node_have_their_own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in ("100041", "100042"):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in (("PROCID", "1"), ("STEP_NUM_TASKS", "2"), ("JOB_ID", job)):
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        _slurm_environment()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 2
