"""Own data: classes from the training file, rows counted from 0, the user's ids in everything that is written."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from models import build_model
from tests.tiny import (
    FROZEN,
    assert_same,
    captured_log,
    custom_dataset_flags,
    fine_tune,
    pre_train,
    read_checkpoint,
    renumber,
    tiny_args,
    write_coco,
    write_custom_dataset,
)
from util import coco as coco_names
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.classes import Classes, infer_classes
from util.checkpoints.loading import load_pretrained
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

ROWS = {0: "green", 1: "red", 2: "blue"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_custom_dataset(tmp_path_factory.mktemp("own"))


def custom_args(root: Path, *more: str, **files: Path) -> Namespace:
    return tiny_args(FINETUNE, *custom_dataset_flags(root, **files), *more)


def changed(root: Path, folder: Path, name: str, change: Callable[[dict], object]) -> Path:
    """A copy of NAME.json in `folder` to which `change` was applied."""
    content = json.loads((root / f"{name}.json").read_text())
    change(content)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------------- data


def test_labels_count_from_0_in_the_order_of_the_ids(pristine: Path) -> None:
    dataset = build_dataset("train", custom_args(pristine))
    assert (dataset.num_classes, dataset.class_names, dataset.category_ids) == (
        3,
        ROWS,
        {0: 3, 1: 7, 2: 1000},
    )
    assert len(dataset) == 4
    assert dataset.path(0).endswith("photos/a/000000.png")
    content = json.loads((pristine / "train.json").read_text())
    for i, image in enumerate(sorted(content["images"], key=lambda image: image["id"])):
        ids = [a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]]
        labels = dataset.annotations.target(i, (image["height"], image["width"]))["labels"].tolist()
        assert [dataset.category_ids[label] for label in labels] == ids
    assert len(set(dataset.annotations.labels.tolist())) > 1


def test_validation_classes_are_told_by_name(pristine: Path, tmp_path: Path) -> None:
    """Other ids, and only two of the three classes: rows are those of training, ids those of the file."""

    def other_ids(content: dict) -> None:
        renumber(content, {7: 0, 3: 7, 1000: 5})
        content["categories"] = [
            category for category in content["categories"] if category["name"] != "blue"
        ]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 5]

    with captured_log() as lines:
        _, val = build_labelled(
            custom_args(pristine, val_annotations=changed(pristine, tmp_path, "val", other_ids))
        )
    assert (val.num_classes, val.class_names, val.category_ids) == (3, ROWS, {0: 7, 1: 0, 2: 1000})
    assert set(val.annotations.labels.tolist()) <= {0, 1}
    assert len(val.annotations.labels)
    assert any("does not have 1 of the 3 classes: blue" in line for line in lines)


def test_an_absent_class_never_takes_the_id_of_another(pristine: Path, tmp_path: Path) -> None:
    def only_red(content: dict) -> None:
        content["categories"] = [{"id": 3, "name": "red"}]
        content["annotations"] = []

    args = custom_args(pristine, val_annotations=changed(pristine, tmp_path, "val", only_red))
    classes = Classes(ROWS, {0: 3, 1: 7, 2: 1000}, 3, "train.json")
    assert build_dataset("val", args, classes).category_ids == {1: 3, 2: 1000}, (
        "3 is red here, so green has no id"
    )


def rename_val(content: dict) -> None:
    content["categories"][0]["name"] = "Red"


BAD = [
    ("val", rename_val, ("val.json", "'Red' (id 7)", "train.json", "green, red, blue")),
    (
        "train",
        lambda c: c["categories"].clear() or c["annotations"].clear(),
        ("train.json", "no categories"),
    ),
    (
        "train",
        lambda c: c["categories"][0].update(name="blue"),
        ("train.json", "[7, 1000]", "'blue'"),
    ),
    (
        "train",
        lambda c: c["annotations"][2].update(category_id=8),
        ("train.json", "annotation 3", "'categories'"),
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    BAD,
    ids=["unknown name", "no class", "one name twice", "unlisted id"],
)
def test_bad_classes_are_one_line(
    pristine: Path, tmp_path: Path, name: str, change: Callable, words: tuple[str, ...]
) -> None:
    args = custom_args(
        pristine, **{f"{name}_annotations": changed(pristine, tmp_path, name, change)}
    )
    with pytest.raises(UserError) as error:
        build_labelled(args)
    text = str(error.value)
    assert all(word in text for word in (*words, "train.json"))
    assert "\n" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_classes", "91"], "--num_classes 91"),
        (["--train_images", ""], "add --train_images DIR"),
        (["--train_annotations", ""], "add --train_annotations FILE"),
        (["--coco_path", "COCO"], "--coco_path COCO is not for"),
        (["--dataset_file", "coco"], "add --dataset_file custom"),
    ],
)
def test_flags_that_contradict(pristine: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build_dataset("train", custom_args(pristine, *words))
    assert build_dataset("train", custom_args(pristine, "--num_classes", "3")).num_classes == 3


def test_unlabelled_images_from_the_same_flag(pristine: Path, tmp_path: Path) -> None:
    args = tiny_args(
        PRETRAIN, "--dataset_file", "custom", "--train_images", str(pristine / "photos")
    )
    assert len(build_dataset("train", args)) == 4
    with pytest.raises(UserError, match="--train_images"):
        tiny_args(
            PRETRAIN,
            "--imagenet_path",
            str(tmp_path),
            "--dataset_file",
            "custom",
            "--train_images",
            str(pristine),
        )
    with pytest.raises(UserError, match="needs --train_images DIR"):
        build_dataset("train", tiny_args(PRETRAIN, "--dataset_file", "custom"))


# ---------------------------------------------------------------------------------------------------- evaluation


def test_the_evaluator_turns_labels_into_ids(pristine: Path) -> None:
    truth = json.loads((pristine / "val.json").read_text())
    evaluator = CocoEvaluator(build_ground_truth(truth), category_ids={0: 3, 1: 7, 2: 1000})
    rows = {3: 0, 7: 1, 1000: 2}
    for image in truth["images"]:
        objects = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32)
        labels = torch.tensor([rows[a["category_id"]] for a in objects])
        boxes[:, 2:] += boxes[:, :2]
        boxes, labels = torch.cat([boxes, boxes[:1]]), torch.cat([labels, torch.tensor([5])])
        evaluator.update(
            {image["id"]: {"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))}}
        )
    assert evaluator.summarize()["stats"][0] == pytest.approx(1)
    found, expected = evaluator.results(), truth["annotations"]
    assert len(found) == len(expected), "label 5 has no id and is left out"
    assert {(r["image_id"], r["category_id"], *r["bbox"]) for r in found} == {
        (a["image_id"], a["category_id"], *map(float, a["bbox"])) for a in expected
    }


# ---------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs."""
    folder = tmp_path_factory.mktemp("run")
    with captured_log() as lines:
        fine_tune(
            *custom_dataset_flags(pristine),
            "--output_dir",
            folder,
            "--epochs",
            2,
            "--save_every",
            1,
            *FROZEN,
        )
    (folder / "lines.txt").write_text("\n".join(lines))
    return folder


def test_a_run_keeps_the_classes_and_writes_own_ids(run: Path, pristine: Path) -> None:
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    assert (checkpoint["class_names"], checkpoint["category_ids"]) == (ROWS, {0: 3, 1: 7, 2: 1000})
    assert checkpoint["args"]["num_classes"] == 3
    assert "classes" not in checkpoint["args"]
    assert len(checkpoint["model"]["class_embed.bias"]) == 4, "three classes and no object"
    found = json.loads((run / "results.json").read_text())
    assert found
    assert {row["category_id"] for row in found} <= {3, 7, 1000}
    lines = (run / "lines.txt").read_text()
    assert "num_classes=3" in lines
    best = run / (
        "checkpoint_best.pth" if (run / "checkpoint_best.pth").exists() else "checkpoint.pth"
    )
    assert f"python tools/predict.py --checkpoint {best} --images DIR" in lines.splitlines()[-1]


def test_a_resumed_run_is_the_same(run: Path, tmp_path: Path) -> None:
    """From the first epoch's checkpoint, without any data flag."""
    fine_tune("--resume", run / "checkpoint0000.pth", "--output_dir", tmp_path, *FROZEN)
    one, other = (
        read_checkpoint(run / "checkpoint.pth"),
        read_checkpoint(tmp_path / "checkpoint.pth"),
    )
    for name in (
        "model",
        "optimizer",
        "lr_scheduler",
        "epoch",
        "best",
        "random_states",
        "class_names",
        "category_ids",
    ):
        assert_same(one[name], other[name], name)


def test_a_resumed_run_refuses_other_classes(run: Path, pristine: Path, tmp_path: Path) -> None:
    path = changed(pristine, tmp_path, "train", rename_val)
    with pytest.raises(UserError, match=r"'Red' \(id 7\), .*checkpoint.pth has not"):
        fine_tune(
            *custom_dataset_flags(pristine, train_annotations=path),
            "--resume",
            run / "checkpoint.pth",
            "--epochs",
            3,
        )


def test_evaluation_needs_the_validation_flags_alone(
    run: Path, pristine: Path, tmp_path: Path
) -> None:
    """The training data may be gone; a file with other ids gives the same numbers and its own ids."""
    path = changed(
        pristine, tmp_path, "val", lambda content: renumber(content, {7: 70, 3: 90, 1000: 1})
    )
    fine_tune(
        "--eval",
        "--resume",
        run / "checkpoint.pth",
        "--train_images",
        "gone",
        "--train_annotations",
        "gone.json",
        *custom_dataset_flags(pristine, "val", val_annotations=path),
        "--output_dir",
        tmp_path / "eval",
    )
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    values = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert values["coco_eval_bbox"] == last["test_coco_eval_bbox"]
    assert values["loss"] == pytest.approx(last["test_loss"])
    ids = {7: 70, 3: 90, 1000: 1}
    trained, evaluated = (
        json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "eval")
    )
    assert [{**row, "category_id": ids[row["category_id"]]} for row in trained] == evaluated


def test_ids_as_they_are_do_not_fit_rows_counted_from_0(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset_file custom --val_images"):
        fine_tune(
            "--eval",
            "--resume",
            run / "checkpoint.pth",
            "--dataset_file",
            "coco",
            "--coco_path",
            write_coco(tmp_path / "coco"),
        )


def test_a_detector_with_ids_as_they_are_is_evaluated_by_name(
    pristine: Path, tmp_path: Path
) -> None:
    """A published file holds no names: its 91 rows are COCO's. Rows that mean nothing here are left out of the
    results.
    """
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, "--backbone_norm", "frozen"))[0]
    save_checkpoint({"model": model.state_dict(), "args": {"nheads": 4}}, tmp_path / "coco.pth")
    names = {"red": "person", "green": "dog", "blue": "toothbrush"}
    path = changed(
        pristine,
        tmp_path,
        "val",
        lambda c: [category.update(name=names[category["name"]]) for category in c["categories"]],
    )
    flags = custom_dataset_flags(pristine, "val", val_annotations=path)
    fine_tune("--eval", "--resume", tmp_path / "coco.pth", *flags, "--output_dir", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["category_id"] for row in found} <= {7, 3, 1000} | set(coco_names.CLASS_NAMES)
    classes = infer_classes(load_checkpoint(tmp_path / "coco.pth"))
    dataset = build_dataset("val", custom_args(pristine, val_annotations=path), classes)
    assert (dataset.num_classes, {row: dataset.category_ids[row] for row in (1, 18, 90)}) == (
        91,
        {1: 7, 18: 3, 90: 1000},
    )
    assert not {3, 7} & set(dataset.category_ids), "these ids mean something else in this file"


# ---------------------------------------------------------------------------------------------------- starting from
# others


def head(model: torch.nn.Module) -> np.ndarray:
    return model.class_embed.bias.detach().numpy().copy()


def started(
    tmp_path: Path, names: dict[int, str], detector: str = "detr", rows: int = 91, **stored: object
) -> tuple[list, list]:
    """(rows of the new head by name, rows of the file's): the bias of each row of the file is its number."""
    with torch.random.fork_rng():
        source = build_model(
            tiny_args(
                FINETUNE,
                "--num_classes",
                str(rows),
                "--detector",
                detector,
                "--backbone_norm",
                "frozen",
            )
        )[0]
        source.class_embed.bias.data = torch.arange(
            len(source.class_embed.bias), dtype=torch.float32
        )
        save_checkpoint({"model": source.state_dict(), **stored}, tmp_path / "file.pth")
        args = tiny_args(
            FINETUNE,
            "--num_classes",
            str(len(names)),
            "--detector",
            detector,
            "--backbone_norm",
            "frozen",
        )
        model = build_model(args)[0]
    fresh = head(model)
    load_pretrained(model, load_checkpoint(tmp_path / "file.pth"), names)
    return head(model).tolist(), fresh.tolist()


def test_rows_of_published_files_are_kept_by_cocos_names(tmp_path: Path) -> None:
    bias, fresh = started(tmp_path, {0: "bolt", 1: "toothbrush", 2: "person"})
    assert bias == [fresh[0], 90.0, 1.0, 91.0], "the last row is no object"
    bias, fresh = started(tmp_path, {0: "dog", 1: "nut"}, detector="conditional_detr")
    assert bias == [18.0, fresh[1]]
    bias, fresh = started(tmp_path, {0: "dog", 1: "nut"}, rows=40)
    assert bias == fresh, "a file of another number of classes is not COCO's"


def test_rows_of_own_checkpoints_are_kept_by_their_names(tmp_path: Path) -> None:
    stored = {"class_names": {0: "nut", 1: "person"}, "category_ids": {0: 10, 1: 77}}
    bias, fresh = started(tmp_path, {0: "bolt", 1: "nut", 2: "screw"}, rows=2, **stored)
    assert bias == [fresh[0], 0.0, fresh[2], 2.0]


def test_coco_has_80_names_and_gaps() -> None:
    assert len(coco_names.CLASS_NAMES) == len(set(coco_names.CLASS_NAMES.values())) == 80
    gaps = set(range(1, 91)) - set(coco_names.CLASS_NAMES)
    assert gaps == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_pre_training_and_fine_tuning_on_own_data(pristine: Path, tmp_path: Path) -> None:
    pretrained, tuned = tmp_path / "pre" / "checkpoint.pth", tmp_path / "fine" / "checkpoint.pth"
    pre_train(
        "--dataset_file",
        "custom",
        "--train_images",
        pristine / "photos",
        "--output_dir",
        pretrained.parent,
        "--epochs",
        1,
        *FROZEN,
    )
    fine_tune(
        *custom_dataset_flags(pristine),
        "--pretrain",
        pretrained,
        "--output_dir",
        tuned.parent,
        "--epochs",
        1,
        *FROZEN,
    )
    assert read_checkpoint(tuned)["category_ids"] == {0: 3, 1: 7, 2: 1000}
