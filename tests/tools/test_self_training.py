"""A round of self-training: boxes of a trained detector become the proposals of a pre-training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main as pretrain_main
from tests.tiny import FROZEN, fine_tune, read_checkpoint, write_coco, write_images
from tools import cache_proposals, self_training
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.settings import resolve

ARGS = {
    "script": "finetune_main.py",
    "detector": "deformable_detr",
    "backbone": "resnet18",
    "backbone_weights": "none",
    "num_queries": 12,
    "hidden_dim": 64,
    "image_size": 96,
    "num_classes": 7,
    "masks": False,
}


def command(tmp_path: Path, *flags: str) -> list[str]:
    argv = ["--checkpoint", "few.pth", "--images", "photos", "--output_dir", str(tmp_path)]
    args = self_training.parse([*argv, "--", *flags])
    return self_training.pretrain_command(args, Checkpoint(model={}, args=ARGS), tmp_path)


def test_main_accepts_the_flags_and_builds_the_architecture_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    settings = resolve(pretrain_main.parse(command(tmp_path, "--epochs", "3", "--hidden_dim=32")))
    assert (settings.pretext, settings.proposals) == (
        "region_prior",
        f"file:{tmp_path / 'proposals.json'}",
    )
    assert (settings.detector, settings.backbone, settings.num_queries) == (
        "deformable_detr",
        "resnet18",
        12,
    )
    assert (settings.image_size, settings.num_classes) == (96, 1)
    assert (settings.epochs, settings.hidden_dim) == (3, 32)  # given ones win


def test_flags_of_the_tool_are_refused_after_the_dashes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--proposals after --: tools/self_training.py sets it"):
        command(tmp_path, "--proposals", "random")


def test_boxes_snap_to_the_proposal_with_the_best_product_of_weight_and_squared_iou() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
    scores = torch.tensor([0.3, 0.6, 0.4, 0.9])
    # IoU with the first box 0.8, 0.5 and 0; the second is worth more only with a weight above 2.56 times that of the
    # first. The third is the only one at the third box, the last box has none.
    proposals = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5], [50, 50, 60, 58]])
    snapped, new_scores = self_training.snap(
        boxes, scores, proposals, torch.tensor([1.0, 2.3, 0.1])
    )
    assert snapped.tolist() == [[80, 80, 90, 90], [0, 0, 10, 8], [50, 50, 60, 58]]
    torch.testing.assert_close(new_scores, torch.tensor([0.9, 0.6, 0.4]))
    snapped, _ = self_training.snap(boxes[:1], scores[:1], proposals, torch.tensor([1.0, 2.6, 0.1]))
    assert snapped.tolist() == [[0, 0, 10, 5]]


def test_boxes_without_proposals_stay(tmp_path: Path) -> None:
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0.3])
    same, _ = self_training.snap(boxes, scores, torch.zeros(0, 4), torch.zeros(0))
    assert same.tolist() == boxes.tolist()
    with pytest.raises(UserError, match="no proposal cache"):
        self_training.Snapping(
            str(tmp_path), self_training.ImageFolder(str(write_images(tmp_path / "photos")))
        )


def test_round_writes_boxes_and_pre_trains_on_them(tmp_path: Path) -> None:
    images = write_images(tmp_path / "photos")
    coco = write_coco(tmp_path / "coco")
    run = tmp_path / "few"
    fine_tune("--coco_path", coco, "--output_dir", run, "--epochs", 1, "--image_size", 96, *FROZEN)
    argv = ["--checkpoint", run / "checkpoint.pth", "--images", images, "--device", "cpu"]
    argv += ["--output_dir", tmp_path / "round"]
    flags = ["--epochs", 1, "--num_workers", 0, "--device", "cpu", *FROZEN]

    def start(threshold: float | None, *own: str) -> None:
        chosen = [] if threshold is None else ["--threshold", threshold]
        words = [*argv, *chosen, *own, "--", *flags]
        self_training.main(self_training.parse([str(word) for word in words]))

    with pytest.raises(UserError, match=r"no box has a score of 1.0 or more: lower --threshold"):
        start(1.0)
    start(None, "--boxes_only", "--boxes_per_image", "0.75", "--batch_size", "3")
    few = json.loads((tmp_path / "round" / "proposals.json").read_text())
    assert (len(few["images"]), len(few["annotations"])) == (4, 3)
    assert not (tmp_path / "round" / "pretrain").exists()
    (tmp_path / "round" / "proposals.json").unlink()
    start(0.0)
    content = json.loads((tmp_path / "round" / "proposals.json").read_text())
    assert len(content["images"]) == 4
    assert {box["image_id"] for box in content["annotations"]} == {1, 2, 3, 4}
    assert all(0 <= box["score"] <= 1 for box in content["annotations"])
    args = read_checkpoint(tmp_path / "round" / "pretrain" / "checkpoint.pth")["args"]
    assert (args["pretext"], args["image_size"]) == ("region_prior", 96)
    with pytest.raises(UserError, match="--overwrite"):
        start(0.0)

    cache = tmp_path / "cache"
    words = ["--images", str(images), "--output_dir", str(cache), "--num_workers", "0"]
    cache_proposals.main(cache_proposals.parse([*words, "--ss_rank", "agreement"]))
    argv += ["--snap_to", cache, "--overwrite"]
    start(0.0)
    snapped = json.loads((tmp_path / "round" / "proposals.json").read_text())
    proposals = cache_proposals.ProposalCache(cache).boxes.astype(float)
    sizes = {image["id"]: [image["width"], image["height"]] * 2 for image in snapped["images"]}
    for box in snapped["annotations"]:
        x, y, width, height = box["bbox"]
        allowed = proposals / 128 * sizes[box["image_id"]]
        assert abs(allowed - [x, y, x + width, y + height]).max(1).min() < 1e-3


def test_two_ways_to_choose_boxes_are_refused_and_no_later_command_overwrites(
    tmp_path: Path,
) -> None:
    argv = ["--checkpoint", "few.pth", "--images", "photos", "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="--threshold and --boxes_per_image both"):
        self_training.parse([*argv, "--threshold", "0.3", "--boxes_per_image", "2"])
    args = self_training.parse([*argv, "--boxes_only", "--overwrite"])
    words = self_training.pretrain_command(args, Checkpoint(model={}, args=ARGS), tmp_path)
    assert "--overwrite" not in words


def test_one_image_has_at_most_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times --boxes_per_image, before the best ones of all images are chosen; snapped ones too."""
    images = self_training.ImageFolder(str(write_images(tmp_path / "photos")))
    corners = torch.arange(8.0)[:, None] * 20
    boxes = torch.cat([corners, corners, corners + 9, corners + 9], 1)
    found = SimpleNamespace(boxes=boxes, scores=torch.linspace(0.9, 0.2, 8), size_hw=(200, 200))
    results = [SimpleNamespace(index=i, prediction=found, error=None) for i in range(len(images))]
    predictor = SimpleNamespace(predict_files=lambda *_, **__: results)
    args = SimpleNamespace(boxes_per_image=1.0, threshold=0.0, num_workers=0, batch_size=1)
    moved = lambda boxes, scores, *_: (boxes + 1, scores)  # noqa: E731
    content = self_training.find_boxes(predictor, images, args, moved)
    annotations = content["annotations"]
    assert len(annotations) == len(images)
    assert max(box["id"] for box in annotations) <= 3 * len(images)
    assert annotations[0]["bbox"] == [1, 1, 9, 9]


def test_the_best_boxes_of_all_images_are_kept_in_their_order() -> None:
    boxes = [{"id": i, "score": score} for i, score in enumerate([0.1, 0.9, 0.5, 0.5, 0.7])]
    assert [box["id"] for box in self_training.best_boxes(boxes, 3)] == [1, 2, 4]
    assert self_training.best_boxes(boxes, 9) == boxes
