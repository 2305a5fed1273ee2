"""tools/visualize.py: each sub-command draws what it says, and leaves other files alone."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.published_files import SMALL, detreg, filled, shapes, updetr
from tests.tiny import PRETEXT_FLAGS, RUN_FLAGS, captured_log, write_coco, write_images
from tools import visualize
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError

ON_CPU = ("--device", "cpu", "--image_size", "64")


def draw(*words: object) -> list[str]:
    with captured_log() as lines:
        visualize.main(visualize.parse([str(word) for word in words]))
    return lines


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def write_detector(folder: Path, detector: str) -> Path:
    outputs = 92 if detector == "detr" else 91
    path = folder / f"{detector}.pth"
    save_checkpoint({"model": filled(shapes(detector, *SMALL, outputs=outputs))}, path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "coco")
    write_images(folder / "images")
    return folder


def test_commands_and_their_flags_are_listed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        visualize.parse(["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert all(f"\n  {name} " in text for name in visualize.COMMANDS)
    assert "--threshold" in text
    with pytest.raises(UserError, match=r"map is no sub-command: choose one of samples, attention"):
        visualize.parse(["map"])


def test_attention(root: Path, tmp_path: Path) -> None:
    checkpoint = write_detector(tmp_path, "detr")
    words = ("attention", "--checkpoint", checkpoint, "--images", root / "images", *ON_CPU)
    lines = draw(*words, "--count", 2, "--output_dir", tmp_path / "a")
    assert any("no object has a score of 0.5" in line for line in lines)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["attention_000001_000.png", "attention_000002_001.png"]

    one = ("--count", 1, "--threshold", 0, "--layer", 0, "--head", 1)
    draw(*words, *one, "--points", 3, 4, "--output_dir", tmp_path / "b")
    draw(*words, *one, "--points", 3, 4, 10, 9, 20, 20, "--output_dir", tmp_path / "c")
    first, second = (tmp_path / name / names[0] for name in "bc")
    assert first.read_bytes() != second.read_bytes()
    with pytest.raises(UserError, match=r"already has attention_000001.*--overwrite"):
        draw(*words, "--output_dir", tmp_path / "c")
    draw(*words, *one, "--points", 3, 4, "--output_dir", tmp_path / "c", "--overwrite")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layer", 1), "--layer 1: encoder and decoder have 1 and 2 layers; give 0 to 0"),
        (("--head", 8), "--head 8: this detector has 8; give 0 to 7"),
        (("--points", 3), "--points has 1 numbers"),
        (
            ("--points", 3, 4000),
            r"--points 3 4000 is outside of 000\..*, which has \d+ x \d+ pixels",
        ),
        (("--images", "nowhere"), "nowhere does not exist"),
    ],
)
def test_errors_of_attention(root: Path, tmp_path: Path, flags: tuple, said: str) -> None:
    checkpoint = write_detector(tmp_path, "detr")
    words = ("--checkpoint", checkpoint, "--images", root / "images", *ON_CPU, *flags)
    with pytest.raises(UserError, match=said):
        draw("attention", *words, "--output_dir", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_sampling_and_the_other_kind_of_detector(root: Path, tmp_path: Path) -> None:
    deformable = write_detector(tmp_path, "deformable_detr")
    words = ("--images", root / "images", "--count", 1, *ON_CPU, "--output_dir", tmp_path / "out")
    draw("sampling", "--checkpoint", deformable, *words, "--points", 5, 5, 9, 9)
    assert size(tmp_path / "out" / "sampling_000001_000.png")[0] > 2 * 280
    with pytest.raises(UserError, match=r"deformable attention.*visualize.py sampling"):
        draw("attention", "--checkpoint", deformable, *words)
    conditional = write_detector(tmp_path, "conditional_detr")
    with pytest.raises(UserError, match=r"no sampling points.*visualize.py attention"):
        draw("sampling", "--checkpoint", conditional, *words, "--overwrite")


def test_samples_of_labelled_and_pretext_data(root: Path, tmp_path: Path) -> None:
    labelled = ("samples", *RUN_FLAGS, "--coco_path", root / "coco", "--count", 2)
    draw(*labelled, "--output_dir", tmp_path / "a")
    draw(*labelled, "--epoch", 3, "--output_dir", tmp_path / "b")
    first, later = (tmp_path / name / "samples.png" for name in "ab")
    assert first.read_bytes() != later.read_bytes(), "another epoch, another augmentation"
    own = Image.new("RGB", (4, 4))
    own.save(first)
    with pytest.raises(UserError, match=r"already has samples.png"):
        draw(*labelled, "--output_dir", tmp_path / "a")
    assert size(first) == (4, 4)
    # As in main.py, unlabelled images are enough to say that it is a pretext.
    images = ("--imagenet_path", root / "images", "--count", 1)
    draw("samples", *RUN_FLAGS, *PRETEXT_FLAGS, *images, "--output_dir", tmp_path / "c")
    assert size(tmp_path / "c" / "samples.png")[0] > 280, "with a strip of patches"
    with pytest.raises(UserError, match="add --output_dir"):
        draw(*labelled)


def test_patches(root: Path, tmp_path: Path) -> None:
    torch.save({"model": filled(updetr(*SMALL))}, tmp_path / "updetr.pth")
    torch.save({"model": filled(detreg("detr", *SMALL))}, tmp_path / "detreg.pth")
    words = ("--imagenet_path", root / "images" / "000.png", *ON_CPU)
    patches = ("patches", "--checkpoint", tmp_path / "updetr.pth", *words)
    draw(*patches, "--boxes", 5, 5, 40, 40, "--output_dir", tmp_path / "out")
    assert size(tmp_path / "out" / "patches.png")[0] > 2 * 280
    with pytest.raises(UserError, match=r"without query patches.*class_agnostic"):
        draw("patches", "--checkpoint", tmp_path / "detreg.pth", *words, "--output_dir", tmp_path)
    with pytest.raises(UserError, match="3 numbers"):
        draw(*patches, "--boxes", 5, 5, 40, "--output_dir", tmp_path / "b")


def test_class_agnostic_boxes(root: Path, tmp_path: Path) -> None:
    torch.save({"model": filled(detreg("detr", *SMALL))}, tmp_path / "detreg.pth")
    words = ("class_agnostic", "--checkpoint", tmp_path / "detreg.pth", "--images", root / "images")
    draw(*words, *ON_CPU, "--count", 1, "--output_dir", tmp_path / "a")
    draw(*words, *ON_CPU, "--count", 1, "--proposals", "random", "--output_dir", tmp_path / "b")
    one, two = (size(tmp_path / name / "class_agnostic.png")[0] for name in "ab")
    assert two > 1.8 * one, "the proposals are a second panel"


def test_proposals_and_their_recall(root: Path, tmp_path: Path) -> None:
    """The ground truth as proposals is found completely; the last number is the recall of all proposals."""
    annotations = root / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    count = len(content["annotations"])
    coco = ("--coco_path", root / "coco", "--output_dir", tmp_path / "a", "--device", "cpu")
    lines = draw("proposals", "--proposals", f"file:{annotations}", *coco)
    assert f"@100 1.00 of {count} objects in 3 images" in lines[-1]
    assert size(tmp_path / "a" / "proposals.png")[0] > 2 * 280
    checkpoint = write_detector(tmp_path, "detr")
    few = ("--count", 1, "--max_prop", 3, "--overwrite")
    lines = draw("proposals", "--checkpoint", checkpoint, *coco, *few)
    assert "@3 " in lines[-1]
    assert "in 1 images" in lines[-1]
    with pytest.raises(UserError, match=r"give --checkpoint PATH for a model, or --proposals"):
        draw("proposals", *coco)


def test_errors_by_type(root: Path, tmp_path: Path) -> None:
    checkpoint = write_detector(tmp_path, "conditional_detr")
    words = ("--coco_path", root / "coco", "--checkpoint", checkpoint, "--num_workers", 0, *ON_CPU)
    draw("errors", *words, "--threshold", 0, "--output_dir", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "errors.json").read_text())
    counts = record["counts"]
    listed = [error["type"] for error in record["errors"]]
    assert all(listed.count(kind) == counts[kind] for kind in set(listed))
    assert len(listed) + counts["correct"] - counts["missed"] <= 3 * 100
    text = (tmp_path / "a" / "errors.md").read_text()
    assert f"| background | {counts['background']} |" in text
    assert f"{record['objects']} objects" in text
    assert size(tmp_path / "a" / "errors.png")[0] > 280
    draw("errors", *words, "--threshold", 1, "--examples", 0, "--output_dir", tmp_path / "b")
    strict = json.loads((tmp_path / "b" / "errors.json").read_text())
    assert strict["counts"]["missed"] == strict["objects"], "no detection is left"
    assert strict["AP50"] == record["AP50"], "AP counts all detections"
