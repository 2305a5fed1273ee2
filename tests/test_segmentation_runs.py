"""Runs with masks: training, resuming, evaluation and prediction of instance and panoptic segmentation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_main
from models import build_model
from models.segmentation import SegmentationDetector
from tests.tiny import (
    FROZEN,
    captured_log,
    fine_tune,
    one_detector_else_slow,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_panoptic,
    write_voc,
)
from tools import predict
from util.checkpoints.checkpoint import load_checkpoint
from util.errors import UserError
from util.masks import decode_masks
from util.settings import FINETUNE

TRAIN = ("--batch_size", "2", "--epochs", "1", *FROZEN)
RESUME = ("--device", "cpu", "--num_workers", "0")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_panoptic(write_coco(tmp_path_factory.mktemp("data") / "coco", empty=(1,)))


def evaluate(checkpoint: Path, output: Path, *flags: object) -> dict:
    """Return the metrics of `--eval`, with only those flags that a user needs."""
    with_flags = [*RESUME, "--eval", "--resume", checkpoint, "--output_dir", output, *flags]
    finetune_main.main(finetune_main.parse([str(word) for word in with_flags]))
    return json.loads((output / "metrics.json").read_text())


@one_detector_else_slow
def test_instance_masks_in_two_stages(detector: str, coco: Path, tmp_path: Path) -> None:
    """Boxes, then a mask head on the frozen detector, which does not change; evaluation equals the last epoch's."""
    boxes, masks = tmp_path / "boxes", tmp_path / "masks"
    fine_tune("--detector", detector, "--coco_path", coco, "--output_dir", boxes, *TRAIN)
    frozen = boxes / "checkpoint.pth"
    # Without architecture flags: the file tells.
    words = ["--coco_path", coco, "--masks", "--frozen_weights", frozen, "--output_dir", masks]
    more = ("--batch_size", "2", "--epochs", "2", "--image_size", "64")
    finetune_main.main(finetune_main.parse([str(w) for w in (*RESUME, *words, *more)]))

    before, after = read_checkpoint(frozen)["model"], read_checkpoint(masks / "checkpoint.pth")
    for key, value in before.items():
        assert torch.equal(value, after["model"][f"detr.{key}"]), key
    log = read_log(masks)
    assert log[0]["train_loss_mask"] > 0
    assert log[0]["train_loss_dice"] != log[1]["train_loss_dice"]
    assert log[0]["test_coco_eval_bbox"] == log[1]["test_coco_eval_bbox"]  # a frozen detector
    assert len(log[1]["test_coco_eval_masks"]) == 12
    values = evaluate(masks / "checkpoint.pth", tmp_path / "eval", "--coco_path", coco)
    assert values["coco_eval_masks"] == log[1]["test_coco_eval_masks"]
    assert values["loss_dice"] == pytest.approx(log[1]["test_loss_dice"], rel=1e-6)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in _images(coco)}
    assert all(row["segmentation"]["size"] == sizes[row["image_id"]] for row in results)


def _images(coco: Path) -> list[dict]:
    return json.loads((coco / "annotations" / "instances_val2017.json").read_text())["images"]


@one_detector_else_slow
def test_panoptic_after_pre_training(detector: str, coco: Path, tmp_path: Path) -> None:
    """Pre-training on the images, fine-tuning of everything together, evaluation, prediction."""
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    data = ("--dataset_file", "coco_panoptic", "--coco_path", coco)
    pretext = ("--pretext", "random_query_patch", "--detector", detector)
    pre_train(*data, *pretext, "--output_dir", pretrained, *TRAIN, "--lr_backbone", "0")
    fine_tune(
        *data, "--masks", "--pretrain", pretrained / "checkpoint.pth", "--output_dir", run, *TRAIN
    )
    log = read_log(run)[0]
    assert set(log["test_PQ_all"]) == {"pq", "sq", "rq", "n"}
    assert log["test_PQ_th"]["n"] == 3
    assert log["test_PQ_st"]["n"] == 1
    checkpoint = load_checkpoint(run / "checkpoint.pth")
    assert checkpoint.things == {1: True, 2: True, 3: True, 120: False}
    values = evaluate(run / "checkpoint.pth", tmp_path / "eval", "--coco_path", coco)
    assert values["PQ_all"] == log["test_PQ_all"]
    pngs = sorted(path.name for path in (tmp_path / "eval" / "panoptic_eval").glob("*.png"))
    assert pngs == [f"{image['id']:012d}.png" for image in _images(coco)]

    out = tmp_path / "predictions"
    words = ["--checkpoint", run / "checkpoint.pth", "--images", coco / "val2017"]
    words += ["--output_dir", out, "--threshold", "0", *RESUME]
    predict.main(predict.parse([str(word) for word in words]))
    rows = json.loads((out / "predictions.json").read_text())
    image = Image.open(coco / "val2017" / "000000.png")
    first = [row for row in rows if row["image_id"] == rows[0]["image_id"]]
    assert decode_masks([first[0]["segmentation"]]).shape[1:] == (image.height, image.width)
    assert (out / "panoptic.json").exists()


@pytest.mark.slow  # tests/test_resume.py does it without masks
def test_a_run_with_masks_resumes_exactly(coco: Path, tmp_path: Path) -> None:
    """Two epochs in one start and in two starts give the same weights."""
    data = ("--coco_path", coco, "--masks", "--batch_size", "2", *FROZEN)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fine_tune(*data, "--epochs", "2", "--output_dir", whole)
    fine_tune(*data, "--epochs", "1", "--output_dir", parts)
    fine_tune(*data, "--epochs", "2", "--output_dir", parts, "--resume", "auto")
    expected, found = (read_checkpoint(p / "checkpoint.pth")["model"] for p in (whole, parts))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_resume_with_masks_needs_a_mask_head(coco: Path, tmp_path: Path) -> None:
    fine_tune("--coco_path", coco, "--output_dir", tmp_path / "boxes", *TRAIN)
    boxes = tmp_path / "boxes" / "checkpoint.pth"
    with pytest.raises(UserError, match="give --frozen_weights .* or --pretrain"):
        fine_tune("--coco_path", coco, "--masks", "--resume", boxes, *TRAIN)


def test_frozen_weights_of_a_pre_training(coco: Path, tmp_path: Path) -> None:
    pre_train(
        "--coco_path", coco, "--pretext", "random_query_patch", "--output_dir", tmp_path, *TRAIN
    )
    with pytest.raises(UserError, match="has no object classes"):
        fine_tune(
            "--coco_path", coco, "--masks", "--frozen_weights", tmp_path / "checkpoint.pth", *TRAIN
        )


def test_voc_has_no_masks(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc")
    with pytest.raises(UserError, match="--masks"):
        fine_tune("--dataset_file", "voc", "--voc_path", tmp_path / "voc", "--masks", *TRAIN)


def test_pictures_of_a_run_with_masks(coco: Path, tmp_path: Path) -> None:
    """Masks are filled on the page of samples: it differs from that of a run with boxes."""
    pages = []
    for name, flags in (("boxes", ()), ("masks", ("--masks",))):
        fine_tune("--coco_path", coco, "--output_dir", tmp_path / name, *TRAIN, *flags)
        pages.append(np.asarray(Image.open(tmp_path / name / "samples.png")).astype(int))
    assert pages[0].shape == pages[1].shape
    changed = (np.abs(pages[0] - pages[1]).max(-1) > 8).mean()
    assert 0.02 < changed < 0.9


def test_model_is_a_segmentation_detector_only_with_masks() -> None:
    assert isinstance(build_model(tiny_args(FINETUNE, "--masks"))[0], SegmentationDetector)
    assert not isinstance(build_model(tiny_args())[0], SegmentationDetector)


def test_log_says_what_is_trained(coco: Path) -> None:
    with captured_log() as lines:
        fine_tune("--coco_path", coco, "--masks", "--dry_run", *TRAIN)
    assert any("detr with a mask head" in line for line in lines)
