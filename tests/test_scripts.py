"""Both entry scripts as a user meets them: published commands, the wrong script, used folders, error messages."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune_main
import main as pretrain_main
from models import build_model
from tests.tiny import (
    FROZEN,
    MODEL_FLAGS,
    PRETEXT_FLAGS,
    ROOT,
    RUN_FLAGS,
    captured_log,
    fine_tune,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.checkpoints.checkpoint import save_checkpoint
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, resolve
from util.settings.right_script import check_right_script

SCRIPTS = {PRETRAIN: pretrain_main, FINETUNE: finetune_main}
SMALL = [
    "--backbone_weights",
    "none",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--image_size",
    "64",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small COCO and ImageNet folders, and a checkpoint of each kind."""
    root = tmp_path_factory.mktemp("data")
    write_coco(root / "coco")
    write_images(root / "unlabelled")
    torch.manual_seed(0)
    for name, script, flags in (
        ("pretext", PRETRAIN, ["--feature_recon", "--num_patches", "10"]),
        ("detector", FINETUNE, []),
    ):
        args = tiny_args(script, "--pre_norm", "--backbone_norm", "frozen", *flags)
        stored = {"nheads": 4, "pretext": args.pretext, "script": script}
        save_checkpoint(
            {"model": build_model(args)[0].state_dict(), "args": stored}, root / f"{name}.pth"
        )
    return root


def call(script: str, *words: object) -> tuple[int, list[str]]:
    """Run an entry script in this process; return exit status and log."""
    module, status = SCRIPTS[script], 0
    with captured_log() as lines:
        try:
            run_script(module.main, module.parse, [str(word) for word in words])
        except SystemExit as leave:
            status = leave.code
    return status, lines


@pytest.fixture(autouse=True)
def _log_as_before():
    """Restore the logger: `run_script` sends it to standard output, other tests read it through its parent."""
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


# ------------------------------------------------------------------------------------------------- published commands


def test_published_pre_training(data: Path, tmp_path: Path) -> None:
    words = [
        "--lr_drop",
        40,
        "--epochs",
        60,
        "--pre_norm",
        "--num_patches",
        10,
        "--batch_size",
        32,
        "--feature_recon",
        "--fre_cnn",
        "--imagenet_path",
        data / "unlabelled",
        "--output_dir",
        tmp_path / "out",
    ]
    small = [*MODEL_FLAGS, *SMALL, "--batch_size", 4, "--patch_size", 32]
    status, lines = call(PRETRAIN, *words, *small, "--dry_run")
    assert status == 0
    assert any("dry run: 1 steps per epoch" in line and "60 epochs" in line for line in lines)
    status, lines = call(PRETRAIN, *words, *small, "--epochs", 1)
    assert status == 0
    assert set(read_checkpoint(tmp_path / "out" / "checkpoint.pth")["model"]) == set(
        torch.load(data / "pretext.pth", weights_only=True)["model"]
    )
    finished = next(line for line in lines if line.startswith("finished"))
    assert (
        f"finetune_main.py --detector detr --coco_path COCO --pretrain {tmp_path / 'out' / 'checkpoint.pth'}"
        in finished
    )


def test_published_fine_tuning(data: Path) -> None:
    status, lines = call(
        FINETUNE,
        "--lr_drop",
        200,
        "--epochs",
        300,
        "--lr_backbone",
        "5e-4",
        "--pre_norm",
        "--coco_path",
        data / "coco",
        "--pretrain",
        data / "pretext.pth",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--image_size",
        64,
        "--dry_run",
    )
    assert status == 0
    table = "\n".join(lines)
    assert "feature_align" in table  # not used
    assert "--enc_layers 1" in table  # adopted from the file, like the whole architecture
    assert "dry run: 2 steps per epoch" in table


def test_published_evaluation(data: Path, tmp_path: Path) -> None:
    status, lines = call(
        FINETUNE,
        "--batch_size",
        2,
        "--eval",
        "--no_aux_loss",
        "--pre_norm",
        "--coco_path",
        data / "coco",
        "--resume",
        data / "detector.pth",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--image_size",
        64,
        "--output_dir",
        tmp_path,
    )
    assert status == 0
    assert any(line.startswith("AP ") for line in lines)
    assert len(json.loads((tmp_path / "metrics.json").read_text())["coco_eval_bbox"]) == 12
    assert not (tmp_path / "checkpoint.pth").exists()


def test_published_training_with_resume_auto(data: Path, tmp_path: Path) -> None:
    words = [
        "--coco_path",
        data / "coco",
        "--output_dir",
        tmp_path,
        "--resume",
        "auto",
        *MODEL_FLAGS,
        *SMALL,
        *FROZEN,
    ]
    status, first = call(FINETUNE, *words, "--epochs", 1)
    assert status == 0
    assert any("starting from scratch" in line for line in first)
    status, second = call(FINETUNE, *words, "--epochs", 2)
    assert status == 0
    assert "continuing at epoch 2 of 2" in second
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def run_program(*words: object, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_config_runs_as_program(data: Path) -> None:
    """The published pre-training config, made small by extra flags."""
    small = [*MODEL_FLAGS, *SMALL, "--batch_size", 4, "--patch_size", 32]
    done = run_program(
        "bash",
        "configs/UPDETR_pretrain_in.sh",
        "--imagenet_path",
        data / "unlabelled",
        *small,
        "--dry_run",
        LAUNCH=sys.executable,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "feature_recon=True" in done.stdout
    assert "dry run: 1 steps per epoch" in done.stdout


def test_failing_program_exits_with_1(data: Path) -> None:
    done = run_program(sys.executable, "finetune_main.py", "--coco_path", data / "nowhere")
    assert done.returncode == 1
    assert done.stdout.startswith("error: ") or "\nerror: " in done.stdout


@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
def test_help_does_not_wait_for_pytorch(script: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit as leave:
    assert leave.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--lr_drop" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, capsys: pytest.CaptureFixture) -> None:
    status, _ = call(script, "--help")
    text = capsys.readouterr().out
    assert status in (0, None)
    assert script in text
    assert "--coco_path" in text


# ---------------------------------------------------------------------------------------------------- the wrong script


def suggested_commands(*words: object) -> tuple[list[list[str]], str]:
    """Return the commands that main.py suggests, as [FLAG, ...], and its message."""
    status, lines = call(PRETRAIN, *words)
    assert status == 1
    text = "\n".join(lines)
    assert text.startswith("error: ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  ")]
    assert all(command[:2] == ["python", FINETUNE] for command in commands)
    return [command[2:] for command in commands], text


@pytest.mark.parametrize(
    ("line", "detectors"),
    [
        # As published by Conditional DETR: nothing says so.
        (
            "--resume auto --coco_path COCO --output_dir OUT",
            ["detr", "conditional_detr", "deformable_detr"],
        ),
        ("--coco_path=COCO --lr 1e-4", ["detr", "conditional_detr", "deformable_detr"]),
        (
            "--coco_path COCO --cls_loss_coef 2 --num_queries 300",
            ["conditional_detr", "deformable_detr"],
        ),
        ("--coco_path COCO --focal_alpha 0.25", ["conditional_detr", "deformable_detr"]),
        ("--coco_path COCO --num_feature_levels 1", ["deformable_detr"]),
        ("--coco_path COCO --with_box_refine --two_stage", ["deformable_detr"]),
        ("--coco_path COCO --eos_coef 0.1", ["detr"]),
        ("--coco_path COCO --pre_norm", ["detr"]),
        ("--masks", ["detr"]),
        ("--masks --cls_loss_coef 2", ["conditional_detr", "deformable_detr"]),
        # An empty path is no checkpoint, as published.
        (
            "--resume= --coco_path COCO --output_dir OUT",
            ["detr", "conditional_detr", "deformable_detr"],
        ),
        ("--dataset=coco", ["deformable_detr"]),
        ("--dataset_file voc --dataset voc --eval_every 10", ["deformable_detr"]),
        ("--root_path COCO --num_queries 100", ["conditional_detr"]),
        # Given, or in the checkpoint.
        ("--model conditional_detr --coco_path COCO", [None]),
        ("--dataset coco --pretrain PRE --filter_pct 0.1", [None]),
        ("--eval --resume MODEL --no_aux_loss --batch_size 2 --coco_path COCO", [None]),
        ("--masks --frozen_weights=MODEL", [None]),
        (
            "--masks --epochs 25 --lr_drop 15 --coco_path COCO --coco_panoptic_path PAN --dataset_file coco_panoptic "
            "--frozen_weigths MODEL --output_path OUT",
            [None],
        ),
    ],
)
def test_flags_of_finetune_main_are_refused_with_its_command(
    line: str, detectors: list[str | None]
) -> None:
    """Every flag is in every suggested command, which `finetune_main.py` accepts."""
    commands, text = suggested_commands(*line.split())
    assert "Left out" not in text
    for words, detector in zip(commands, detectors, strict=True):
        added = ["--detector", detector] if detector else []
        assert words == [*added, *line.split()]
        args = finetune_main.parse(words)
        assert detector is None or resolve(args).detector == detector


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        # Never a command that is refused.
        ("--eval --coco_path COCO", ("--eval needs the detector to evaluate: add --resume PATH",)),
        ("--resume auto --coco_path COCO", ("add --output_dir DIR",)),
        ("--frozen_weights MODEL", ("no effect without --masks",)),
        ("--coco_path COCO --pre_norm --model conditional_detr", ("post-norm only",)),
        ("--coco_path COCO --batch_size none", ("--batch_size",)),
        (
            "--eval --imagenet_path IMAGES",
            ("add: --pretext random_query_patch --coco_path COCO --resume PATH",),
        ),
        ("--eval --imagenet_path I --resume M --coco_path C", ("--pretext random_query_patch",)),
    ],
)
def test_command_that_no_script_accepts_gets_the_reason(line: str, parts: tuple[str, ...]) -> None:
    commands, text = suggested_commands(*line.split())
    assert commands == []
    assert all(part in text for part in parts)


def test_suggested_command_names_what_it_leaves_out() -> None:
    line = (
        "--coco_path C --remove_difficult --viz --num_feature_levels 4 --split 1 --foo 3 --num_q 9"
    )
    commands, text = suggested_commands(*line.split())
    assert commands == [
        ["--detector", "deformable_detr", "--coco_path", "C", "--num_feature_levels", "4"]
    ]
    left_out = next(line for line in text.splitlines() if line.startswith("Left out"))
    parts = (
        "--remove_difficult (the published code never reads it)",
        "--viz",
        "--split 1",
        "--foo 3,",
        "--num_q 9 (did you mean --num_queries?)",
    )
    assert all(part in left_out for part in parts)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--coco_path COCO", "To pre-train on the images of that folder, add: --pretext random_"),
        (
            "--dataset_file voc --voc_path VOC",
            "To pre-train on the images of that folder, add: --pretext random_",
        ),
        (
            "--dataset_file=voc_coco",
            "To pre-train on the images of that folder, add: --pretext random_",
        ),
        (
            "--dataset_file airbus_ship --airbus_path SHIPS",
            "To pre-train on the images of that folder, add: --pretext random_",
        ),
        (
            "--dataset coco",
            "To pre-train on the images of that folder, add: --pretext region_prior",
        ),
        ("--dataset coco --viz --resume MODEL", "To draw the boxes of a pre-trained model"),
        # With these flags, main.py would refuse the pretext.
        ("--dataset coco --pretrain MODEL", None),
        ("--coco_path COCO --with_box_refine", None),
        ("--coco_path COCO --foo 3", None),
    ],
)
def test_pre_training_is_suggested_only_if_it_would_run(line: str, hint: str | None) -> None:
    _, text = suggested_commands(*line.split())
    assert hint in text if hint else "add: --pretext" not in text


def test_unlabelled_images_need_no_pretext() -> None:
    """Also if a labelled dataset evaluates the run, or `custom` is a folder without labels."""
    for line in (
        "--imagenet_path IMAGES",
        "--imagenet_path IMAGES --dataset_file voc --voc_path VOC --eval_every 1",
        "--dataset_file custom --train_images IMAGES",
    ):
        check_right_script(line.split())


def test_help_is_not_a_wrong_script(capsys: pytest.CaptureFixture) -> None:
    status, _ = call(PRETRAIN, "--coco_path", "COCO", "--help")
    assert status in (0, None)
    assert "--num_patches" in capsys.readouterr().out


def test_suggested_command_keeps_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    status, lines = call(PRETRAIN, "--local-rank=0", "--coco_path", "COCO", "--eos_coef", "0.1")
    assert status == 1
    suggestion = "torchrun --nproc_per_node 8 finetune_main.py --detector detr --coco_path COCO"
    assert suggestion in "\n".join(lines)


def test_suggested_command_keeps_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of srun, of tools/run_dist_slurm.sh, and the shell of a batch job."""
    monkeypatch.delenv("LAUNCH", raising=False)
    for name, value in {"PROCID": "0", "NTASKS": "16", "STEP_NUM_TASKS": "16"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = ("--coco_path", "COCO", "--eos_coef", "0.1")

    def suggested() -> str:
        return "\n".join(call(PRETRAIN, *words)[1])

    assert "\n  srun --ntasks 16 python finetune_main.py --detector detr" in suggested()
    monkeypatch.setenv("LAUNCH", "srun --partition=gpu --ntasks=16 python")
    assert "\n  srun --partition=gpu --ntasks=16 python finetune_main.py" in suggested()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert "\n  python finetune_main.py" in suggested()


@pytest.mark.parametrize(
    "line",
    [
        "--resume auto --coco_path COCO --output_dir OUT",
        "--masks --epochs 25 --lr_drop 15 --coco_path COCO --frozen_weigths MODEL --output_path OUT",
        "--coco_path COCO --pretrain PRE --lr_drop 200 --epochs 300",
    ],
)
def test_suggested_commands_run(line: str, data: Path, tmp_path: Path) -> None:
    places = {
        "COCO": data / "coco",
        "MODEL": data / "detector.pth",
        "PRE": data / "pretext.pth",
        "OUT": tmp_path / "my run",
    }
    commands, _ = suggested_commands(*(places.get(word, word) for word in line.split()))
    assert commands
    assert not (tmp_path / "my run").exists()
    small = [*SMALL[2:], *FROZEN, "--dry_run"]
    if "auto" in line:
        small += [*MODEL_FLAGS, "--backbone_weights", "none"]
    for words in commands:
        status, lines = call(FINETUNE, *words, *small)
        assert status == 0, lines
        assert any(line.startswith("dry run: ") for line in lines)


def test_raw_pre_training_command_of_detreg_runs(data: Path) -> None:
    line = "--strategy topk --load_backbone swav --max_prop 30 --object_embedding_loss --lr_backbone 0 --epochs 5"
    status, lines = call(
        PRETRAIN,
        *("--imagenet_path", data / "unlabelled", *line.split(), *MODEL_FLAGS, *SMALL),
        *("--batch_size", 2, "--patch_size", 32, "--proposals", "random", "--dry_run"),
    )
    assert status == 0, lines
    assert any(
        "taken as --pretext region_prior --detector deformable_detr" in line for line in lines
    )


def test_pre_training_on_coco_images(data: Path) -> None:
    status, lines = call(
        PRETRAIN,
        "--pretext",
        "random_query_patch",
        "--coco_path",
        data / "coco",
        *RUN_FLAGS,
        *PRETEXT_FLAGS,
        "--dry_run",
    )
    assert status == 0
    assert any(line.startswith("4 images in ") and line.endswith("train2017") for line in lines)


def test_pre_training_flags_in_fine_tuning_are_refused(capsys: pytest.CaptureFixture) -> None:
    status, _ = call(FINETUNE, "--num_patches", "10")
    assert status == 2
    assert "--num_patches is a flag of main.py" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- used folders


def test_output_dir_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    words = [
        "--imagenet_path",
        data / "unlabelled",
        "--output_dir",
        tmp_path,
        "--epochs",
        1,
        *FROZEN,
    ]
    pre_train(*words)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, lines = call(PRETRAIN, *RUN_FLAGS, *PRETEXT_FLAGS, *words)
    assert status == 1
    error = next(line for line in lines if line.startswith("error: "))
    assert all(flag in error for flag in ("--output_dir", "--resume auto", "--overwrite"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    pre_train(*words, "--overwrite", "--seed", 7)
    assert len(read_log(tmp_path)) == 1
    assert (tmp_path / "checkpoint.pth").read_bytes() != before["checkpoint.pth"]
    pre_train(*words, "--resume", "auto", "--epochs", 2)
    assert len(read_log(tmp_path)) == 2


def test_output_dir_with_unrelated_files_is_accepted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    pre_train(
        "--imagenet_path", data / "unlabelled", "--output_dir", tmp_path, "--epochs", 1, *FROZEN
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_output_dir_nothing_is_saved_and_a_warning_is_logged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with captured_log() as lines:
        pre_train("--imagenet_path", data / "unlabelled", "--epochs", 1, *FROZEN)
    assert any("nothing of this run will be saved: add --output_dir DIR" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "--pre_norm --feature_recon --fre_cnn"),
        (["--fre_cnn", "--feature_recon"], "has --pre_norm:"),
        (["--detector", "conditional_detr"], "has --feature_recon --fre_cnn:"),
        (["--pre_norm", "--fre_cnn", "--feature_recon"], ""),
        (["--pretext", "siamese"], ""),
        (["--reproduce_published"], ""),
    ],
)
def test_missing_flags_of_published_up_detr_pre_training_are_logged(
    flags: list[str], missing: str
) -> None:
    """The flags are off by default, as in UP-DETR's own script; a run without them logs a warning."""
    with captured_log() as lines:
        pretrain_main.warn_missing_published_flags(resolve(pretrain_main.parse(flags)))
    assert [missing in line for line in lines] == ([True] if missing else [])


# ---------------------------------------------------------------------------------------------------- error messages


def test_errors_are_one_line_with_remedy(data: Path, tmp_path: Path) -> None:
    coco, unlabelled = ("--coco_path", data / "coco"), ("--imagenet_path", data / "unlabelled")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for script, words, parts in (
        (FINETUNE, ["--coco_path", tmp_path / "none"], ("none", "--coco_path")),
        (FINETUNE, ["--coco_path", tmp_path / "empty"], ("empty", "images/train2017")),
        (FINETUNE, [*coco, "--num_classes", 2], ("--num_classes 4",)),
        (FINETUNE, [*coco, "--batch_size", 64], ("4 training images", "--batch_size 4")),
        (FINETUNE, [*coco, "--output_dir", tmp_path / "file"], ("--output_dir", "file")),
        (
            FINETUNE,
            [*coco, "--pre_norm", "--detector", "conditional_detr"],
            ("--pre_norm", "post-norm"),
        ),
        (
            FINETUNE,
            [*coco, "--pretrain", data / "detector.pth", "--detector", "conditional_detr"],
            ("--detector", "detector.pth"),
        ),
        (PRETRAIN, ["--imagenet_path", tmp_path / "empty"], ("empty",)),
        (PRETRAIN, ["--imagenet_path", tmp_path / "none"], ("none",)),
        (PRETRAIN, [], ("--imagenet_path",)),
        (PRETRAIN, [*unlabelled, "--num_patches", 3], ("--num_patches 3", "--num_queries 20")),
        (PRETRAIN, [*unlabelled, "--backbone", "resnet19"], ("--backbone resnet19", "resnet50")),
    ):
        small = [*RUN_FLAGS, *(PRETEXT_FLAGS if script == PRETRAIN else [])]
        status, lines = call(
            script, *small, *words, "--data_root", tmp_path / "nothing", "--epochs", 1
        )
        assert status == 1, words
        error = next(line for line in lines if line.startswith("error: "))
        assert "\n" not in error
        assert all(part in error for part in parts), error


def test_error_in_dataloader_worker_is_one_line(tmp_path: Path) -> None:
    """A worker's error arrives with its traceback; the user sees only the message."""
    images = tmp_path / "unlabelled"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"not an image")
    status, lines = call(
        PRETRAIN,
        *RUN_FLAGS,
        *PRETEXT_FLAGS,
        "--imagenet_path",
        images,
        "--num_workers",
        1,
        "--epochs",
        1,
    )
    assert status == 1
    error = next(line for line in lines if line.startswith("error: "))
    assert "\n" not in error
    assert "a.png" in error or "b.png" in error
    assert "Traceback" not in error


def test_settings_are_saved_with_run(data: Path, tmp_path: Path) -> None:
    fine_tune(
        "--coco_path", data / "coco", "--output_dir", tmp_path, "--epochs", 1, "--seed", 5, *FROZEN
    )
    kept = json.loads((tmp_path / "args.json").read_text())
    assert kept["settings"]["seed"] == 5
    assert kept["settings"]["detector"] == "detr"
    assert set(kept["data"]) == {"train", "val"}
    assert kept["data"]["train"] != kept["data"]["val"]
    assert kept["model"]["multiply_adds"] > 0
    assert kept["model"]["multiply_adds_hw"] == [64, 85]
    assert read_checkpoint(tmp_path / "checkpoint.pth")["args"]["seed"] == 5


def test_same_seed_reproduces_run_and_other_seed_differs(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pre_train(
            "--imagenet_path",
            data / "unlabelled",
            "--output_dir",
            tmp_path / name,
            "--epochs",
            1,
            "--seed",
            seed,
            *FROZEN,
        )
    logs = {name: {**read_log(tmp_path / name)[0], "train_seconds": 0} for name in "abc"}
    assert logs["a"] == logs["b"] != logs["c"]
