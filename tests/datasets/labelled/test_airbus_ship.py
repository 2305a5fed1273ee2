"""Airbus Ship Detection: the competition's runs of pixels, as images and lines that are made here."""

from pathlib import Path

import numpy as np
import pytest

from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator
from datasets.labelled.airbus_ship import HEADER, decode_runs, held_out, read_runs
from tests.tiny import (
    FROZEN,
    SHIPS_HW,
    fine_tune,
    logged,
    pre_train,
    read_log,
    runs_of,
    tiny_args,
    write_airbus,
)
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

HEIGHT, WIDTH = SHIPS_HW


def args_of(root: Path, *flags: str):
    return tiny_args(FINETUNE, "--dataset_file", "airbus_ship", "--airbus_path", str(root), *flags)


def test_runs_give_the_boxes_of_their_masks() -> None:
    """Also ships of several parts, and runs over the end of a column."""
    rng, masks = np.random.RandomState(1), []
    for _ in range(40):
        y, x = rng.randint(0, HEIGHT - 4), rng.randint(0, WIDTH - 4)
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + rng.randint(1, HEIGHT), x : x + rng.randint(1, WIDTH)] = True
        mask[rng.randint(HEIGHT), rng.randint(WIDTH)] = True
        masks.append(mask)
    full = np.ones((HEIGHT, WIDTH), bool)
    masks += [full, full & (np.arange(WIDTH) > 3)]
    boxes, areas = decode_runs([runs_of(mask) for mask in masks], HEIGHT, WIDTH, [""] * len(masks))
    for mask, box, area in zip(masks, boxes, areas, strict=True):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert area == mask.sum()
    assert runs_of(full) == f"1 {HEIGHT * WIDTH}"
    assert decode_runs([], 5, 5, [])[0].shape == (0, 4)


def test_images_boxes_and_the_held_out_tenth(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=30)
    train, val = build_labelled(args_of(root))
    assert (len(train), len(val), train.num_classes, train.class_names) == (27, 3, 1, {0: "ship"})
    both = [*train.annotations.image_ids.tolist(), *val.annotations.image_ids.tolist()]
    assert sorted(both) == list(range(1, 31))
    counts = np.concatenate([np.diff(part.annotations.offsets) for part in (train, val)])
    assert sorted(counts.tolist()) == [0] * 10 + [1] * 10 + [2] * 10, (
        "images without ships are kept"
    )
    other = build_labelled(args_of(root, "--seed", "7"))[1]
    assert other.annotations.image_ids.tolist() == val.annotations.image_ids.tolist(), (
        "held out is always the same tenth"
    )
    whole = read_runs(str(root / "train_ship_segmentations_v2.csv"), str(root / "train_v2"))
    assert {tuple(box) for box in whole.boxes_xyxy_abs.tolist()} == {
        (5, 10, 25, 30),
        (35, 11, 55, 30),
    }
    assert set(whole.areas.tolist()) == {400, 380}
    assert held_out(1).tolist() == [True]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    table = write_airbus(tmp_path / "airbus", images=2) / "train_ship_segmentations_v2.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(read_runs(str(table), str(table.parent / "train_v2"))) == 2


def test_detregs_names(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus-ship-detection")
    args = tiny_args(
        FINETUNE, "--dataset", "airbus", "--data_root", str(tmp_path), "--num_classes", "2"
    )
    assert (args.dataset_file, args.airbus_path) == ("airbus_ship", str(root))
    assert build_labelled(args)[0].num_classes == 2
    assert tiny_args(
        PRETRAIN, "--dataset", "airbus_pretrain", "--data_root", str(tmp_path)
    ).imagenet_path == str(root / "train_v2")


def test_pre_training_on_the_images_that_are_not_held_out(tmp_path: Path) -> None:
    """Names, as proposal stores have them, count from the images' folder, and so they do for the whole folder."""
    root = write_airbus(tmp_path / "airbus", images=30)
    train, val = build_labelled(args_of(root))
    args = tiny_args(
        PRETRAIN, "--dataset_file", "airbus_ship", "--airbus_path", str(root), "--num_classes", "2"
    )
    seen, held = build_dataset("train", args), build_dataset("val", args)
    for images, labelled in ((seen.images, train), (held.images, val)):
        assert [images.path(i) for i in range(len(images))] == [
            labelled.path(i) for i in range(len(labelled))
        ]
    assert seen.images.name(0) == Path(train.path(0)).name
    assert "patches" in seen[0][1]
    pre_train("--dataset_file", "airbus_ship", "--airbus_path", root, "--dry_run")


def test_a_run_is_evaluated_as_coco(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=12)
    args = args_of(root)
    assert isinstance(build_labelled(args)[1].evaluator(args), CocoEvaluator)
    with logged() as lines:
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
    ("line", "said"),
    [
        ("{name},1 2 3", "line 2: '1 2 3' is not pairs"),
        ("{name},1 x", "line 2: '1 x' is not pairs"),
        ("{name},1.5 2", "line 2: '1.5 2' is not pairs"),
        ("{name},-3 2", "line 2: '-3 2' is not pairs"),
        ("{name},0 2", "line 2: the run 0 2 is not inside an image of 72 x 60 pixels"),
        ("{name},5 0", "line 2: the run 5 0 is not inside"),
        ("{name},4320 2", "line 2: the run 4320 2 is not inside"),
        ("{name},99999999999999999999999 2", "line 2: the run 9+ 2 is not inside"),
    ],
)
def test_bad_runs_are_refused_with_their_line(line: str, said: str, tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=2)
    name = next((root / "train_v2").iterdir()).name
    (root / "train_ship_segmentations_v2.csv").write_text(
        f"{HEADER}\n{line.format(name=name)}\n{name},1 2\n"
    )
    with pytest.raises(UserError, match=said) as refusal:
        build_labelled(args_of(root))
    assert "\n" not in str(refusal.value)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_v2 is no folder: --airbus_path"):
        build_labelled(args_of(tmp_path))
    root = write_airbus(tmp_path / "airbus", images=2)
    table = root / "train_ship_segmentations_v2.csv"
    cases = (
        ("a,b\n", "its first line is not"),
        (f"{HEADER}\n", "lists no image"),
        (f"{HEADER}\nx.jpg,\n", "none of 1 images"),
    )
    for content, said in cases:
        table.write_text(content)
        with pytest.raises(UserError, match=said):
            build_labelled(args_of(root))
    table.unlink()
    with pytest.raises(UserError, match="can't be read: put the competition's file there"):
        build_labelled(args_of(root))
