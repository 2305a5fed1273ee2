"""tools/predict.py: predictions equal those of evaluation, and no file is skipped or replaced silently."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from models import build_model
from tests.tiny import (
    FROZEN,
    ROOT,
    captured_log,
    custom_dataset_flags,
    fine_tune,
    tiny_args,
    write_coco,
    write_custom_dataset,
    write_images,
)
from tools import predict, self_training
from util import coco as coco_names
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

SMALL = ["--device", "cpu", "--num_workers", "0"]


def run(*words: object) -> list[str]:
    with captured_log() as lines:
        predict.main(predict.parse([*SMALL, *map(str, words)]))
    return lines


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom dataset, a detector trained on it (run/checkpoint.pth), and its evaluation with batch size 1 (eval)."""
    root = write_custom_dataset(tmp_path_factory.mktemp("own"))
    fine_tune(*custom_dataset_flags(root), "--output_dir", root / "run", "--epochs", 1, *FROZEN)
    fine_tune(
        "--eval",
        "--resume",
        root / "run" / "checkpoint.pth",
        "--batch_size",
        1,
        "--output_dir",
        root / "eval",
    )
    return root


@pytest.mark.parametrize(("flags", "expected"), [([], 2), (["--num_workers", "0"], 0)])
def test_number_of_workers(flags: list[str], expected: int) -> None:
    words = ["--checkpoint", "a.pth", "--images", "b", "--output_dir", "c", *flags]
    for tool in (predict, self_training):
        assert tool.parse(words).num_workers == expected


def test_predictions_equal_evaluation_results(data: Path, tmp_path: Path) -> None:
    """Scores are bit-exact; boxes are equal but clipped to the image; category ids are those of the annotations."""
    lines = run(
        "--checkpoint",
        data / "run" / "checkpoint.pth",
        "--images",
        data / "held_out",
        "--output_dir",
        tmp_path,
        "--threshold",
        0,
    )
    images = {
        image["file_name"]: image for image in json.loads((data / "val.json").read_text())["images"]
    }
    expected: dict[int, list] = {}
    for row in json.loads((data / "eval" / "results.json").read_text()):
        expected.setdefault(row["image_id"], []).append(row)
    found = read(tmp_path)
    assert len(found) == sum(map(len, expected.values())) > 0
    assert lines[-1].startswith(f"{len(found)} objects in 3 of 3 images (threshold 0): ")
    names = {3: "green", 7: "red", 1000: "blue"}
    for name, image in images.items():
        rows = [row for row in found if row["file_name"] == name]
        assert {row["image_id"] for row in rows} == {1 + sorted(images).index(name)}
        assert [row["score"] for row in rows] == sorted(
            (row["score"] for row in rows), reverse=True
        )
        same = {row["score"]: row for row in expected[image["id"]]}
        for row in rows:
            other = same[row["score"]]
            assert row["category_id"] == other["category_id"]
            assert row["category_name"] == names[row["category_id"]]
            x, y, w, h = other["bbox"]
            edges = np.clip([x, y, x + w, y + h], 0, [image["width"], image["height"]] * 2)
            np.testing.assert_allclose(
                row["bbox"], [*edges[:2], *(edges[2:] - edges[:2])], atol=1e-4
            )


def test_threshold_and_drawn_images(data: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", data / "run" / "checkpoint.pth", "--images", data / "held_out"]
    run(*words, "--output_dir", tmp_path / "all", "--threshold", 0)
    scores = sorted(row["score"] for row in read(tmp_path / "all"))
    run(*words, "--output_dir", tmp_path / "half", "--threshold", scores[len(scores) // 2])
    assert [row["score"] for row in read(tmp_path / "half")] == [
        row["score"] for row in read(tmp_path / "all") if row["score"] >= scores[len(scores) // 2]
    ]
    for number, path in enumerate(sorted((data / "held_out").iterdir()), start=1):
        with (
            Image.open(path) as before,
            Image.open(tmp_path / "all" / "drawn" / f"{number:06d}_{path.stem}.jpg") as after,
        ):
            assert before.size == after.size
            assert (
                np.abs(np.asarray(before.convert("RGB"), float) - np.asarray(after, float)).max()
                > 60
            )
    with Image.open(tmp_path / "all" / "predictions.png") as page:
        assert page.width > 3 * 280
    lines = run(*words, "--output_dir", tmp_path / "none", "--threshold", 1, "--no_draw")
    assert read(tmp_path / "none") == []
    assert f"the best score is {scores[-1]:.2f}: lower --threshold" in lines[-1]
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["predictions.json"]


def test_unreadable_images_are_skipped_and_logged(data: Path, tmp_path: Path) -> None:
    """A text file and a truncated JPEG among good images: the others keep their image ids, regardless of the batch."""
    folder = tmp_path / "photos"
    shutil.copytree(data / "held_out", folder / "b")
    (folder / "a.jpg").write_text("no image")
    with Image.open(folder / "b" / "000000.png") as image:
        image.save(folder / "c.jpg")
    (folder / "c.jpg").write_bytes((folder / "c.jpg").read_bytes()[:400])
    words = ["--checkpoint", data / "run" / "checkpoint.pth", "--threshold", 0, "--no_draw"]
    lines = run(*words, "--images", folder, "--output_dir", tmp_path / "out", "--batch_size", 2)
    assert {(row["image_id"], row["file_name"]) for row in read(tmp_path / "out")} == {
        (i + 2, f"b/{i:06d}.png") for i in range(3)
    }
    left = [line for line in lines if line.startswith("skipped")]
    assert [
        str(folder / name) in line for name, line in zip(("a.jpg", "c.jpg"), left, strict=True)
    ] == [True, True]
    assert "3 of 5 images" in lines[-1]
    assert "2 unreadable images skipped; written to" in lines[-1]
    shutil.rmtree(folder / "b")
    with pytest.raises(UserError, match=r"none of the 2 images can be read, the first is .*a.jpg"):
        run(*words, "--images", folder, "--output_dir", tmp_path / "bad")


def test_single_image_and_list_of_paths(data: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", data / "run" / "checkpoint.pth", "--threshold", 0, "--no_draw"]
    run(*words, "--images", data / "held_out" / "000001.png", "--output_dir", tmp_path / "one")
    (data / "list.txt").write_text("held_out/000002.png\nheld_out/000001.png\n")
    run(*words, "--images", data / "list.txt", "--output_dir", tmp_path / "list")
    one, both = read(tmp_path / "one"), read(tmp_path / "list")
    assert {row["file_name"] for row in one} == {"000001.png"}
    assert [row["score"] for row in both if row["image_id"] == 2] == [row["score"] for row in one]
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(*words, "--images", tmp_path / "nowhere", "--output_dir", tmp_path / "no")


def test_existing_predictions_need_overwrite(data: Path, tmp_path: Path) -> None:
    words = [
        "--checkpoint",
        data / "run" / "checkpoint.pth",
        "--output_dir",
        tmp_path,
        "--threshold",
        0,
    ]
    run(*words, "--images", data / "held_out")
    before = (tmp_path / "predictions.json").read_text()
    with pytest.raises(
        UserError, match=r"already has predictions \(predictions.json\): .*--overwrite"
    ):
        run(*words, "--images", data / "held_out" / "000001.png")
    with pytest.raises(UserError, match="no such file"):
        run(
            "--checkpoint",
            tmp_path / "none.pth",
            *words[2:],
            "--images",
            data / "held_out",
            "--overwrite",
        )
    assert (tmp_path / "predictions.json").read_text() == before
    (tmp_path / "drawn" / "mine.jpg").write_text("of the user")
    run(*words, "--images", data / "held_out" / "000001.png", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "000001_000001.jpg",
        "mine.jpg",
    ]


def test_output_dir_inside_images_is_refused(data: Path, tmp_path: Path) -> None:
    """Otherwise the next run would detect objects in the images that this one drew."""
    images = write_images(tmp_path / "photos", 1)
    for folder in (images, images / "found"):
        with pytest.raises(UserError, match="is inside the image folder .*: choose another folder"):
            run(
                "--checkpoint",
                data / "run" / "checkpoint.pth",
                "--images",
                images,
                "--output_dir",
                folder,
            )
    assert [path.name for path in images.iterdir()] == ["000.png"]


def test_long_names_and_pictures_that_fail(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are written in any case; drawn names are shortened, and stay unique."""
    images = write_images(tmp_path / "images", 3)
    for i, name in enumerate(("图" * 80, "a" * 251)):
        (images / f"{i:03d}.png").rename(images / f"{name}.png")
    flags = ("--checkpoint", data / "run" / "checkpoint.pth", "--images", images, "--threshold", 0)
    lines = run(*flags, "--output_dir", tmp_path / "a")
    assert "not drawn" not in lines[-1]
    drawn = sorted(path.name for path in (tmp_path / "a" / "drawn").iterdir())
    assert [name[:8] for name in drawn] == ["000001_0", "000002_a", "000003_图"]
    assert all(len(name.encode()) <= 255 for name in drawn)

    draw = predict.draw_boxes
    failing = iter([True, False, True])

    def fail_sometimes(*args):
        if next(failing):
            raise OSError("broken encoder")
        return draw(*args)

    monkeypatch.setattr(predict, "draw_boxes", fail_sometimes)
    lines = run(*flags, "--output_dir", tmp_path / "b")
    assert read(tmp_path / "b") == read(tmp_path / "a")
    assert "; 2 pictures not drawn; written to" in lines[-1]
    assert any(
        "2 pictures can't be drawn, the first is" in line and "broken encoder" in line
        for line in lines
    )


def test_page_that_fails_does_not_lose_the_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_):
        raise UserError("cannot write it")

    monkeypatch.setattr(predict, "detection_page", fail)
    lines = run(
        "--checkpoint",
        data / "run" / "checkpoint.pth",
        "--images",
        write_images(tmp_path / "images", 1),
        "--output_dir",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "predictions.json").exists()
    assert "1 pictures not drawn" in lines[-1]


def test_disk_full_of_pictures_does_not_lose_the_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = predict.write_text

    def write_if_space(path: Path, content: str) -> None:
        if list((path.parent / "drawn").glob("*.jpg")):
            raise UserError(f"can't write {path}: No space left on device; free some space")
        write(path, content)

    monkeypatch.setattr(predict, "write_text", write_if_space)
    lines = run(
        "--checkpoint", data / "run" / "checkpoint.pth",
        "--images", data / "photos", "--output_dir", tmp_path / "out", "--threshold", 0,
    )  # fmt: skip
    assert read(tmp_path / "out")
    assert any(
        "pictures can't be drawn, the first is" in line and "No space" in line for line in lines
    )


def test_published_checkpoint_without_metadata(tmp_path: Path) -> None:
    """Weights only, with 91 classes: the architecture comes from the shapes, class names from COCO."""
    torch.manual_seed(0)
    model = build_model(
        tiny_args(
            FINETUNE, "--detector", "conditional_detr", "--backbone_norm", "frozen", "--nheads", "8"
        )
    )[0]
    save_checkpoint({"model": model.state_dict()}, tmp_path / "published.pth")
    images = write_images(tmp_path / "photos", 2)
    lines = run(
        "--checkpoint",
        tmp_path / "published.pth",
        "--images",
        images,
        "--output_dir",
        tmp_path / "out",
        "--threshold",
        0,
        "--image_size",
        64,
        "--no_draw",
    )
    found = {row["category_id"]: row["category_name"] for row in read(tmp_path / "out")}
    assert any("has no class names: using COCO's" in line for line in lines)
    assert len(found) > 3
    assert found == {
        number: coco_names.CLASS_NAMES.get(number, f"class {number}") for number in found
    }


def test_detector_with_category_ids_as_labels(tmp_path: Path) -> None:
    fine_tune(
        "--coco_path",
        write_coco(tmp_path / "coco"),
        "--output_dir",
        tmp_path / "run",
        "--epochs",
        1,
        *FROZEN,
    )
    run(
        "--checkpoint",
        tmp_path / "run" / "checkpoint.pth",
        "--images",
        tmp_path / "coco" / "val2017",
        "--output_dir",
        tmp_path / "out",
        "--threshold",
        0,
        "--no_draw",
    )
    names = {1: "red", 2: "green", 3: "blue"}
    assert {row["category_name"] for row in read(tmp_path / "out")} <= {
        names.get(i, f"class {i}") for i in range(91)
    }
    assert all(
        row["category_name"] == names.get(row["category_id"], row["category_name"])
        for row in read(tmp_path / "out")
    )


def test_pre_training_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    args = tiny_args(PRETRAIN, "--backbone_norm", "frozen")
    save_checkpoint(
        {
            "model": build_model(args)[0].state_dict(),
            "args": {"nheads": 4, "pretext": args.pretext},
        },
        tmp_path / "pre.pth",
    )
    with pytest.raises(UserError, match="is from pre-training and has no object classes"):
        run(
            "--checkpoint",
            tmp_path / "pre.pth",
            "--images",
            data / "held_out",
            "--output_dir",
            tmp_path / "out",
        )


def test_runs_as_program_from_any_folder(data: Path, tmp_path: Path) -> None:
    words = [
        "--checkpoint",
        data / "run" / "checkpoint.pth",
        "--images",
        data / "held_out" / "000001.png",
        "--output_dir",
        "out",
    ]
    command = [sys.executable, ROOT / "tools" / "predict.py", *SMALL, *map(str, words)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("written to out/predictions.json, drawn in out/drawn")
    assert (tmp_path / "out" / "predictions.png").is_file()


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.fixture
def mask_checkpoint(tmp_path: Path) -> Path:
    """A panoptic detector with random weights, in a file that has weights only, as published.

    It finds persons and grass only.
    """
    torch.manual_seed(0)
    flags = ("--masks", "--backbone_norm", "frozen", "--nheads", "8", "--num_classes", "250")
    model = build_model(tiny_args(FINETUNE, *flags))[0]
    with torch.no_grad():
        weight, bias = model.detr.class_embed.weight, model.detr.class_embed.bias
        weight[[1, 193]] *= 10
        weight[193] = -weight[1]
        bias[[1, 193]] = 10
    path = tmp_path / "panoptic.pth"
    save_checkpoint({"model": model.state_dict()}, path)
    return path


def rgb_to_ids(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        red, green, blue = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
    return red + 256 * green + 65536 * blue


def test_masks_and_panoptic_results(mask_checkpoint: Path, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "photos", 2), tmp_path / "out"
    words = ["--checkpoint", mask_checkpoint, "--images", images, "--output_dir", out]
    lines = run(*words, "--image_size", 64, "--threshold", 0.3)
    assert any("has no class names: using COCO's" in line for line in lines)
    assert "predictions.json and panoptic.json, drawn in" in lines[-1]

    rows = read(out)
    assert {row["category_name"] for row in rows} <= {"person", "grass-merged"}
    for row in rows:
        with Image.open(images / row["file_name"]) as image:
            assert row["segmentation"]["size"] == [image.height, image.width]
        decoded = coco_mask.decode(row["segmentation"])
        assert decoded.shape == tuple(row["segmentation"]["size"])

    content = json.loads((out / "panoptic.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["000.png", "001.png"]
    assert {"id": 1, "name": "person", "isthing": 1} in content["categories"]
    assert {"id": 193, "name": "grass-merged", "isthing": 0} in content["categories"]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert annotation["image_id"] == image["id"]
        ids = rgb_to_ids(out / "panoptic" / annotation["file_name"])
        assert ids.shape == (image["height"], image["width"])
        segments = annotation["segments_info"]
        assert segments
        areas = {segment["id"]: segment["area"] for segment in segments}
        assert areas == dict(zip(*np.unique(ids, return_counts=True), strict=True))
        for segment in segments:
            assert segment["name"] == coco_names.PANOPTIC_NAMES[segment["category_id"]]

    pictures = ["000001_000.jpg", "000001_000_panoptic.jpg", "000002_001.jpg"]
    drawn = sorted(path.name for path in (out / "drawn").iterdir())
    assert drawn == [*pictures, "000002_001_panoptic.jpg"]
    with Image.open(out / "drawn" / drawn[1]) as after, Image.open(images / "000.png") as before:
        assert after.size == before.size
    with Image.open(out / "predictions.png") as page:
        assert page.width > 2 * 280

    # Another detector leaves none of these files.
    with pytest.raises(UserError, match="already has predictions"):
        run(*words)
    (out / "panoptic" / "mine.png").write_text("of the user")
    run(*words, "--image_size", 64, "--images", images / "000.png", "--overwrite", "--no_draw")
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "000001_000.png",
        "mine.png",
        "panoptic.json",
        "predictions.json",
    ]


def test_segment_ids_and_pictures_that_fail(
    mask_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other results are written; panoptic.json lists the images that have segment ids."""

    def fail(*_args):
        raise OSError("broken encoder")

    failing = iter([True, False])
    real = predict.ids_to_png
    monkeypatch.setattr(predict, "ids_to_png", lambda ids: fail() if next(failing) else real(ids))
    monkeypatch.setattr(predict, "draw_segments", fail)
    lines = run(
        "--checkpoint", mask_checkpoint, "--images", write_images(tmp_path / "photos", 2),
        "--output_dir", tmp_path / "out", "--image_size", 64, "--threshold", 0.3,
    )  # fmt: skip
    assert {row["image_id"] for row in read(tmp_path / "out")} == {1, 2}
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert [image["id"] for image in content["images"]] == [2]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [2]
    assert "; 3 pictures not drawn; written to" in lines[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--threshold", "2"], "a score is between 0 and 1"),
        (["--threshold", "half"], "a score is between 0 and 1, got half"),
        (["--treshold", "0.3"], "did you mean --threshold?"),
    ],
)
def test_wrong_flags_are_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as leave:
        predict.parse(["--checkpoint", "c", "--images", "i", "--output_dir", "o", *words])
    assert leave.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_has_the_defaults_of_this_tool(capsys: pytest.CaptureFixture) -> None:
    """Those of finetune_main.py are for training: here the checkpoint decides."""
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "images per batch (default: 1;" in text
    for name in ("image_size", "max_size"):
        assert "(default: as in the checkpoint, else" in text.split(f"--{name} PIXELS ")[1]
    assert "(default: as in training, else ignore)" in text
