"""Airbus Ship Detection: run-length encoded masks of the competition, on synthetic images."""

from pathlib import Path

import numpy as np
import pytest

from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator
from datasets.labelled.airbus_ship import HEADER, read_rle_csv, rle_to_boxes, val_mask
from tests.tiny import (
    FROZEN,
    SHIPS_HW,
    captured_log,
    fine_tune,
    pre_train,
    read_log,
    rle_encode,
    tiny_args,
    write_airbus,
)
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

HEIGHT, WIDTH = SHIPS_HW


def airbus_args(root: Path, *flags: str):
    return tiny_args(FINETUNE, "--dataset_file", "airbus_ship", "--airbus_path", str(root), *flags)


def test_rle_to_boxes_equals_boxes_of_masks() -> None:
    """Including ships of several parts, and runs over the end of a column."""
    rng = np.random.RandomState(1)
    masks = []
    for _ in range(40):
        y, x = rng.randint(0, HEIGHT - 4), rng.randint(0, WIDTH - 4)
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + rng.randint(1, HEIGHT), x : x + rng.randint(1, WIDTH)] = True
        mask[rng.randint(HEIGHT), rng.randint(WIDTH)] = True  # a second part
        masks.append(mask)
    full = np.ones((HEIGHT, WIDTH), bool)
    masks += [full, full & (np.arange(WIDTH) > 3)]
    boxes, areas = rle_to_boxes(
        [rle_encode(mask) for mask in masks], HEIGHT, WIDTH, [""] * len(masks)
    )
    for mask, box, area in zip(masks, boxes, areas, strict=True):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert area == mask.sum()
    assert rle_encode(full) == f"1 {HEIGHT * WIDTH}"
    assert rle_to_boxes([], 5, 5, [])[0].shape == (0, 4)


def test_images_boxes_and_validation_split(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=30)
    train, val = build_labelled(airbus_args(root))
    assert (len(train), len(val), train.num_classes, train.class_names) == (27, 3, 1, {0: "ship"})
    both = [*train.annotations.image_ids.tolist(), *val.annotations.image_ids.tolist()]
    assert sorted(both) == list(range(1, 31))
    counts = np.concatenate([np.diff(part.annotations.offsets) for part in (train, val)])
    assert sorted(counts.tolist()) == [0] * 10 + [1] * 10 + [2] * 10, (
        "images without ships are kept"
    )
    _, other = build_labelled(airbus_args(root, "--seed", "7"))
    assert other.annotations.image_ids.tolist() == val.annotations.image_ids.tolist(), (
        "the split does not depend on --seed"
    )
    whole = read_rle_csv(str(root / "train_ship_segmentations_v2.csv"), str(root / "train_v2"))
    assert {tuple(box) for box in whole.boxes_xyxy_abs.tolist()} == {
        (5, 10, 25, 30),
        (35, 11, 55, 30),
    }
    assert set(whole.areas.tolist()) == {400, 380}
    assert val_mask(1).tolist() == [True]


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    table = write_airbus(tmp_path / "airbus", images=2) / "train_ship_segmentations_v2.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(read_rle_csv(str(table), str(table.parent / "train_v2"))) == 2


def test_dataset_names_of_detreg(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus-ship-detection")
    args = tiny_args(
        FINETUNE, "--dataset", "airbus", "--data_root", str(tmp_path), "--num_classes", "2"
    )
    assert (args.dataset_file, args.airbus_path) == ("airbus_ship", str(root))
    assert build_labelled(args)[0].num_classes == 2
    assert tiny_args(
        PRETRAIN, "--dataset", "airbus_pretrain", "--data_root", str(tmp_path)
    ).imagenet_path == str(root / "train_v2")


def test_pre_training_uses_the_training_images(tmp_path: Path) -> None:
    """Names are relative to the image folder, as in proposal caches, also for a part of its images."""
    root = write_airbus(tmp_path / "airbus", images=30)
    train, val = build_labelled(airbus_args(root))
    args = tiny_args(
        PRETRAIN, "--dataset_file", "airbus_ship", "--airbus_path", str(root), "--num_classes", "2"
    )
    unlabelled_train, unlabelled_val = build_dataset("train", args), build_dataset("val", args)
    for images, labelled in ((unlabelled_train.images, train), (unlabelled_val.images, val)):
        assert [images.path(i) for i in range(len(images))] == [
            labelled.path(i) for i in range(len(labelled))
        ]
    assert unlabelled_train.images.name(0) == Path(train.path(0)).name
    assert "patches" in unlabelled_train[0][1]
    pre_train("--dataset_file", "airbus_ship", "--airbus_path", root, "--dry_run")


def test_run_is_evaluated_with_coco_metrics(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=12)
    args = airbus_args(root)
    assert isinstance(build_labelled(args)[1].evaluator(args), CocoEvaluator)
    with captured_log() as lines:
        fine_tune(
            "--dataset_file",
            "airbus_ship",
            "--airbus_path",
            root,
            "--epochs",
            1,
            "--output_dir",
            tmp_path / "run",
            *FROZEN,
        )
    assert len(read_log(tmp_path / "run")[0]["test_coco_eval_bbox"]) == 12
    assert any("ship" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{name},1 2 3", "line 2: '1 2 3' is not a list of pairs"),
        ("{name},1 x", "line 2: '1 x' is not a list of pairs"),
        ("{name},1.5 2", "line 2: '1.5 2' is not a list of pairs"),
        ("{name},-3 2", "line 2: '-3 2' is not a list of pairs"),
        ("{name},0 2", "line 2: the run 0 2 is not inside an image of 72 x 60 pixels"),
        ("{name},5 0", "line 2: the run 5 0 is not inside"),
        ("{name},4320 2", "line 2: the run 4320 2 is not inside"),
        ("{name},99999999999999999999999 2", "line 2: the run 9+ 2 is not inside"),
    ],
)
def test_bad_rle_error_names_the_line(line: str, message: str, tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=2)
    name = next((root / "train_v2").iterdir()).name
    (root / "train_ship_segmentations_v2.csv").write_text(
        f"{HEADER}\n{line.format(name=name)}\n{name},1 2\n"
    )
    with pytest.raises(UserError, match=message) as error:
        build_labelled(airbus_args(root))
    assert "\n" not in str(error.value)


def test_other_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_v2 is not a folder: --airbus_path"):
        build_labelled(airbus_args(tmp_path))
    root = write_airbus(tmp_path / "airbus", images=2)
    table = root / "train_ship_segmentations_v2.csv"
    cases = (
        ("a,b\n", "its first line is not"),
        (f"{HEADER}\n", "lists no images"),
        (f"{HEADER}\nx.jpg,\n", "none of 1 images"),
    )
    for content, message in cases:
        table.write_text(content)
        with pytest.raises(UserError, match=message):
            build_labelled(airbus_args(root))
    table.unlink()
    with pytest.raises(UserError, match="can't be read: put the competition's file there"):
        build_labelled(airbus_args(root))


def rewrite(root: Path, change, encoding: str = "utf-8") -> None:
    table = root / "train_ship_segmentations_v2.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    table.write_text(change(lines), encoding=encoding)


@pytest.mark.parametrize(
    ("join", "end", "encoding"),
    [
        (lambda name, runs: f'"{name}","{runs}"', "\n", "utf-8"),
        (lambda name, runs: f"{name};{runs}", "\r\n", "utf-8-sig"),
        (lambda name, runs: f"{name}\t{runs}", "\n", "utf-16"),
        (lambda name, runs: f"7,{runs or 'nan'}, {name} ", "\n", "utf-8"),  # columns of pandas
    ],
)
def test_rewritten_csv_files_are_read(join, end: str, encoding: str, tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=4)
    args = airbus_args(root)
    expected = build_dataset("train", args).annotations.fingerprint()
    rewrite(root, lambda lines: end.join(join(*line) for line in lines) + end, encoding)
    assert build_dataset("train", args).annotations.fingerprint() == expected


def test_names_that_differ_a_little_in_the_csv_file(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=4)
    args = airbus_args(root)
    expected = list(build_dataset("train", args).annotations.file_names)
    rewrite(
        root,
        lambda lines: "\n".join(
            ",".join(["train_v2/" * (i > 0) + name, runs]) for i, (name, runs) in enumerate(lines)
        ),
    )
    annotations = build_dataset("train", args).annotations
    assert list(annotations.file_names) == expected
    assert len(annotations.image_notes["file name differs"]) == 4 - 1

    rewrite(
        root,
        lambda lines: "\n".join(
            ",".join([name.replace("train_v2", "x"), runs]) for name, runs in lines
        ),
    )
    with pytest.raises(UserError, match=r"none of 4 images .*: did you mean \S+.jpg\?"):
        build_dataset("train", args)


@pytest.mark.parametrize(
    ("line", "message"),
    [('"a.jpg,1 2', "is not a CSV file"), (',"1 2"', "line 2: no ImageId")],
)
def test_damaged_csv_lines_raise(line: str, message: str, tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=2)
    (root / "train_ship_segmentations_v2.csv").write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(UserError, match=message):
        build_dataset("train", airbus_args(root))
