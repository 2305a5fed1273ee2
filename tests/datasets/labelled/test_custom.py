"""Custom datasets: classes from the training file, labels from 0, and the user's category ids in all results."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.table import run_checks
from finetune_main import warn_nameless_rows
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

CLASS_NAMES = {0: "green", 1: "red", 2: "blue"}
CATEGORY_IDS = {0: 3, 1: 7, 2: 1000}


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom dataset that tests do not change."""
    return write_custom_dataset(tmp_path_factory.mktemp("custom"))


def custom_args(root: Path, *more: str, **files: Path) -> Namespace:
    return tiny_args(FINETUNE, *custom_dataset_flags(root, **files), *more)


def changed(root: Path, folder: Path, name: str, change: Callable[[dict], object]) -> Path:
    """Write a copy of NAME.json with `change` applied into `folder`."""
    content = json.loads((root / f"{name}.json").read_text())
    change(content)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------------------------- data


def test_labels_start_at_0_in_the_order_of_the_ids(dataset_root: Path) -> None:
    dataset = build_dataset("train", custom_args(dataset_root))
    assert dataset.num_classes == 3
    assert dataset.class_names == CLASS_NAMES
    assert dataset.category_ids == CATEGORY_IDS
    assert len(dataset) == 4
    assert dataset.path(0).endswith("photos/a/000000.png")
    content = json.loads((dataset_root / "train.json").read_text())
    for i, image in enumerate(sorted(content["images"], key=lambda image: image["id"])):
        ids = [a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]]
        labels = dataset.annotations.target(i, (image["height"], image["width"]))["labels"].tolist()
        assert [dataset.category_ids[label] for label in labels] == ids
    assert len(set(dataset.annotations.labels.tolist())) > 1


def test_validation_classes_are_matched_by_name(dataset_root: Path, tmp_path: Path) -> None:
    """The file has other ids and two of the three classes: labels are those of training, ids those of the file."""

    def other_ids(content: dict) -> None:
        renumber(content, {7: 0, 3: 7, 1000: 5})
        content["categories"] = [
            category for category in content["categories"] if category["name"] != "blue"
        ]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 5]

    file = changed(dataset_root, tmp_path, "val", other_ids)
    with captured_log() as lines:
        _, val = build_labelled(custom_args(dataset_root, val_annotations=file))
    assert (val.num_classes, val.class_names) == (3, CLASS_NAMES)
    assert val.category_ids == {0: 7, 1: 0, 2: 1000}
    assert set(val.annotations.labels.tolist()) <= {0, 1}
    assert len(val.annotations.labels)
    assert any("does not have 1 of the 3 classes: blue" in line for line in lines)


def test_absent_class_never_gets_the_id_of_another(dataset_root: Path, tmp_path: Path) -> None:
    def only_red(content: dict) -> None:
        content["categories"] = [{"id": 3, "name": "red"}]
        content["annotations"] = []

    args = custom_args(
        dataset_root, val_annotations=changed(dataset_root, tmp_path, "val", only_red)
    )
    classes = Classes(CLASS_NAMES, CATEGORY_IDS, 3, "train.json")
    category_ids = build_dataset("val", args, classes).category_ids
    assert category_ids == {1: 3, 2: 1000}, "3 is red in this file, so green has no id"


def rename_red(content: dict) -> None:
    content["categories"][0]["name"] = "Red"


BAD_CLASSES = [
    ("val", rename_red, ("val.json", "'Red' (id 7)", "train.json", "green, red, blue")),
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
    BAD_CLASSES,
    ids=["unknown name", "no class", "same name twice", "unlisted id"],
)
def test_bad_classes_raise_a_one_line_error(
    dataset_root: Path, tmp_path: Path, name: str, change: Callable, words: tuple[str, ...]
) -> None:
    args = custom_args(
        dataset_root, **{f"{name}_annotations": changed(dataset_root, tmp_path, name, change)}
    )
    with pytest.raises(UserError) as error:
        build_labelled(args)
    text = str(error.value)
    assert all(word in text for word in (*words, "train.json"))
    assert "\n" not in text


def name_first_class(name: str) -> Callable[[dict], object]:
    return lambda content: content["categories"][0].update(name=name)


def test_class_names_that_look_the_same_are_matched(dataset_root: Path, tmp_path: Path) -> None:
    """They differ in spaces, or in composed and decomposed accents."""
    train = changed(dataset_root, tmp_path, "train", name_first_class("caf\u00e9 au lait"))
    val = changed(dataset_root, tmp_path, "val", name_first_class(" cafe\u0301 au  lait"))
    args = custom_args(dataset_root, train_annotations=train, val_annotations=val)
    with captured_log() as lines:
        _, val = build_labelled(args)
    assert "caf\u00e9 au lait" in val.class_names.values()
    assert any("is taken as" in line and "looks the same" in line for line in lines)


def test_error_names_a_class_that_differs_in_case(dataset_root: Path, tmp_path: Path) -> None:
    name = json.loads((dataset_root / "val.json").read_text())["categories"][0]["name"]
    val = changed(dataset_root, tmp_path, "val", name_first_class(name.upper()))
    with pytest.raises(UserError, match=rf"'{name.upper()}' .* did you mean '{name}'\?$"):
        build_labelled(custom_args(dataset_root, val_annotations=val))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("100 \ud83d", "class name broken"), (" Red", "class names alike")],
)
def test_unusual_class_names_are_reported(
    name: str, kind: str, dataset_root: Path, tmp_path: Path
) -> None:
    def add(content: dict) -> None:
        content["categories"].append({"id": 2000, "name": name})

    args = custom_args(
        dataset_root, train_annotations=changed(dataset_root, tmp_path, "train", add)
    )
    dataset = build_dataset("train", args)
    found = [finding for finding in run_checks([Split("train", dataset)]) if finding.kind == kind]
    assert len(found) == 1
    str(found[0]).encode()  # valid Unicode


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
def test_conflicting_flags(dataset_root: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build_dataset("train", custom_args(dataset_root, *words))
    assert build_dataset("train", custom_args(dataset_root, "--num_classes", "3")).num_classes == 3


def test_train_images_are_used_for_pre_training(dataset_root: Path, tmp_path: Path) -> None:
    args = tiny_args(
        PRETRAIN, "--dataset_file", "custom", "--train_images", str(dataset_root / "photos")
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
            str(dataset_root),
        )
    with pytest.raises(UserError, match="needs --train_images DIR"):
        build_dataset("train", tiny_args(PRETRAIN, "--dataset_file", "custom"))


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluator_maps_labels_to_category_ids(dataset_root: Path) -> None:
    content = json.loads((dataset_root / "val.json").read_text())
    evaluator = CocoEvaluator(build_ground_truth(content), category_ids=CATEGORY_IDS)
    label_of = {category_id: label for label, category_id in CATEGORY_IDS.items()}
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32)
        labels = torch.tensor([label_of[a["category_id"]] for a in objects])
        boxes[:, 2:] += boxes[:, :2]
        # A detection whose label has no category id.
        boxes = torch.cat([boxes, boxes[:1]])
        labels = torch.cat([labels, torch.tensor([5])])
        evaluator.update(
            {image["id"]: {"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))}}
        )
    assert evaluator.summarize()["stats"][0] == pytest.approx(1)
    results, expected = evaluator.results(), content["annotations"]
    assert len(results) == len(expected), "label 5 is dropped"
    assert {(r["image_id"], r["category_id"], *r["bbox"]) for r in results} == {
        (a["image_id"], a["category_id"], *map(float, a["bbox"])) for a in expected
    }


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tune for two epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--output_dir", folder, "--epochs", 2, "--save_every", 1)
    with captured_log() as lines:
        fine_tune(*custom_dataset_flags(dataset_root), *flags, *FROZEN)
    (folder / "lines.txt").write_text("\n".join(lines))
    return folder


def test_run_saves_classes_and_writes_category_ids(run: Path) -> None:
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    assert checkpoint["class_names"] == CLASS_NAMES
    assert checkpoint["category_ids"] == CATEGORY_IDS
    assert checkpoint["args"]["num_classes"] == 3
    assert "classes" not in checkpoint["args"]
    assert len(checkpoint["model"]["class_embed.bias"]) == 4, 'three classes and "no object"'
    results = json.loads((run / "results.json").read_text())
    assert results
    assert {row["category_id"] for row in results} <= {3, 7, 1000}
    lines = (run / "lines.txt").read_text()
    assert "num_classes=3" in lines
    best = run / "checkpoint_best.pth"
    if not best.exists():
        best = run / "checkpoint.pth"
    assert f"python tools/predict.py --checkpoint {best} --images DIR" in lines.splitlines()[-1]


def test_resumed_run_equals_uninterrupted_run(run: Path, tmp_path: Path) -> None:
    """Resume from the checkpoint of the first epoch, without any data flag."""
    fine_tune("--resume", run / "checkpoint0000.pth", "--output_dir", tmp_path, *FROZEN)
    uninterrupted = read_checkpoint(run / "checkpoint.pth")
    resumed = read_checkpoint(tmp_path / "checkpoint.pth")
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
        assert_same(uninterrupted[name], resumed[name], name)


def test_resumed_run_refuses_other_classes(run: Path, dataset_root: Path, tmp_path: Path) -> None:
    path = changed(dataset_root, tmp_path, "train", rename_red)
    data = custom_dataset_flags(dataset_root, train_annotations=path)
    with pytest.raises(UserError, match=r"'Red' \(id 7\), .*checkpoint.pth does not"):
        fine_tune(*data, "--resume", run / "checkpoint.pth", "--epochs", 3)


def test_evaluation_needs_only_the_validation_flags(
    run: Path, dataset_root: Path, tmp_path: Path
) -> None:
    """The training data may be gone. A file with other ids gives the same metrics, and results with its own ids."""
    new_ids = {7: 70, 3: 90, 1000: 1}
    path = changed(dataset_root, tmp_path, "val", lambda content: renumber(content, new_ids))
    fine_tune(
        *("--eval", "--resume", run / "checkpoint.pth", "--output_dir", tmp_path / "eval"),
        *("--train_images", "gone", "--train_annotations", "gone.json"),
        *custom_dataset_flags(dataset_root, "val", val_annotations=path),
    )
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["coco_eval_bbox"] == last["test_coco_eval_bbox"]
    assert metrics["loss"] == pytest.approx(last["test_loss"])

    of_run = json.loads((run / "results.json").read_text())
    of_evaluation = json.loads((tmp_path / "eval" / "results.json").read_text())
    expected = [{**row, "category_id": new_ids[row["category_id"]]} for row in of_run]
    assert of_evaluation == expected


def test_images_without_annotations_get_results_and_no_metrics(
    run: Path, dataset_root: Path, tmp_path: Path
) -> None:
    """As those of an evaluation server: results with the ids of the file."""
    path = changed(dataset_root, tmp_path, "val", lambda content: content.pop("annotations"))
    flags = custom_dataset_flags(dataset_root, "val", val_annotations=path)
    out = tmp_path / "out"
    with captured_log() as lines:
        fine_tune("--eval", "--resume", run / "checkpoint.pth", "--output_dir", out, *flags)
    results = json.loads((out / "results.json").read_text())
    expected = json.loads((run / "results.json").read_text())
    assert results == expected
    assert not (out / "metrics.json").exists()
    assert not (out / "per_class.json").exists()
    assert f"no metrics: {path} has no box" in lines
    assert lines[-1] == f"detections (results.json) and result.html are in {out}"
    assert not any(line.startswith("AP ") for line in lines)


def test_dataset_file_coco_refuses_a_custom_class_head(run: Path, tmp_path: Path) -> None:
    data = ("--dataset_file", "coco", "--coco_path", write_coco(tmp_path / "coco"))
    with pytest.raises(UserError, match="--dataset_file custom --val_images"):
        fine_tune("--eval", "--resume", run / "checkpoint.pth", *data)


def test_detector_with_raw_category_ids_is_evaluated_by_name(
    dataset_root: Path, tmp_path: Path
) -> None:
    """A published checkpoint has no class names: its 91 rows are COCO's. Rows without a class in the file are dropped
    from the results.
    """
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, "--backbone_norm", "frozen"))[0]
    save_checkpoint({"model": model.state_dict(), "args": {"nheads": 4}}, tmp_path / "coco.pth")
    names = {"red": "person", "green": "dog", "blue": "toothbrush"}
    path = changed(
        dataset_root,
        tmp_path,
        "val",
        lambda c: [category.update(name=names[category["name"]]) for category in c["categories"]],
    )
    flags = custom_dataset_flags(dataset_root, "val", val_annotations=path)
    fine_tune("--eval", "--resume", tmp_path / "coco.pth", *flags, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["category_id"] for row in results} <= {7, 3, 1000} | set(coco_names.CLASS_NAMES)
    classes = infer_classes(load_checkpoint(tmp_path / "coco.pth"))
    dataset = build_dataset("val", custom_args(dataset_root, val_annotations=path), classes)
    assert dataset.num_classes == 91
    matched = {label: dataset.category_ids[label] for label in (1, 18, 90)}
    assert matched == {1: 7, 18: 3, 90: 1000}
    assert not {3, 7} & set(dataset.category_ids), "these ids mean another class in this file"


def nameless_dataset(root: Path, folder: Path, categories: dict[int, str], num_classes: int = 91):
    """Return a dataset with these categories for a class head without names, and the lines logged."""
    renaming = dict(zip((3, 7, 1000), categories, strict=True))

    def change(content: dict) -> None:
        renumber(content, renaming)
        for category in content["categories"]:
            category["name"] = categories[category["id"]]

    file = changed(root, folder, "val", change)
    names = coco_names.CLASS_NAMES if num_classes == 91 else {}
    classes = Classes(names, {row: row for row in names}, num_classes, "own.pth", named=False)
    with captured_log() as lines:
        dataset = build_dataset("val", custom_args(root, val_annotations=file), classes)
    return dataset, [line for line in lines if "no class names" in line]


@pytest.mark.parametrize("num_classes", [91, 5])
def test_rows_without_names_are_category_ids_of_other_classes(
    dataset_root: Path, tmp_path: Path, num_classes: int
) -> None:
    """Other codebases keep 91 rows for own classes: their ids are the rows."""
    categories = {1: "helmet", 2: "person", 4: "vest"}
    dataset, lines = nameless_dataset(dataset_root, tmp_path, categories, num_classes)
    assert dataset.class_names == categories
    assert dataset.category_ids == {row: row for row in categories}
    assert set(dataset.annotations.labels.tolist()) <= set(categories)
    assert len(lines) == 1
    assert "category ids of" in lines[0]
    assert "1 helmet" in lines[0]


def test_rows_without_names_and_coco_names_with_other_ids_are_a_warning(
    dataset_root: Path, tmp_path: Path
) -> None:
    """They may be COCO's rows or the ids of the data."""
    dataset, lines = nameless_dataset(dataset_root, tmp_path, {1: "car", 2: "bicycle", 3: "dog"})
    assert dataset.category_ids[3] == 1, "row 3 is COCO's car"
    assert len(lines) == 1
    assert "2 of 3 category ids are not COCO's (first: 'car' is 1)" in lines[0]
    assert "--dataset_file coco" in lines[0]


@pytest.mark.parametrize(
    "categories", [{1: "person", 3: "car", 18: "dog"}, {3: "person", 91: "car", 500: "dog"}]
)
def test_rows_without_names_are_coco_if_ids_agree_or_do_not_fit(
    dataset_root: Path, tmp_path: Path, categories: dict[int, str]
) -> None:
    dataset, lines = nameless_dataset(dataset_root, tmp_path, categories)
    assert {dataset.category_ids[row] for row in (1, 3, 18)} == set(categories)
    assert not lines


def test_rows_without_names_that_fit_nothing_are_refused(
    dataset_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no class names, and its 91 rows .*'helmet'.*--pretrain"):
        nameless_dataset(dataset_root, tmp_path, {1: "helmet", 2: "person", 91: "car"})


def test_class_name_of_a_row_that_the_head_lacks_is_refused(dataset_root: Path) -> None:
    """Such as names that are counted from 1."""
    names = {row + 1: name for row, name in CLASS_NAMES.items()}
    classes = Classes(names, {row: row for row in names}, 3, "own.pth")
    with pytest.raises(UserError, match="own.pth calls row 3 .* 'blue', but the head has 3 rows"):
        build_dataset("val", custom_args(dataset_root), classes)


def test_rows_without_names_of_a_dataset_with_own_labels_are_a_warning() -> None:
    """VOC has labels 0 to 19, in a class head of 91 rows they are COCO's."""
    dataset = Namespace(class_names={0: "aeroplane", 1: "bicycle"}, category_ids=None)
    with captured_log() as lines:
        warn_nameless_rows(Classes({}, {}, 91, "own.pth", named=False), dataset)
        warn_nameless_rows(Classes({}, {}, 3, "detreg.pth", named=False), dataset)
        warn_nameless_rows(Classes({0: "a"}, {0: 0}, 91, "named.pth"), dataset)
    assert len(lines) == 1
    assert "own.pth has no class names and 91 rows, the data have 2 classes" in lines[0]


# ------------------------------------------------------------------------------------ class heads of other checkpoints


def class_bias(model: torch.nn.Module) -> list[float]:
    return model.class_embed.bias.detach().tolist()


def load_class_head(
    tmp_path: Path, names: dict[int, str], detector: str = "detr", rows: int = 91, **stored: object
) -> tuple[list, list]:
    """Load a checkpoint whose class bias is the row number into a new model.

    Returns (bias of the new model after loading, its bias before).
    """
    flags = ("--detector", detector, "--backbone_norm", "frozen", "--num_classes")
    with torch.random.fork_rng():
        source = build_model(tiny_args(FINETUNE, *flags, str(rows)))[0]
        bias = source.class_embed.bias
        bias.data = torch.arange(len(bias), dtype=torch.float32)
        save_checkpoint({"model": source.state_dict(), **stored}, tmp_path / "file.pth")
        model = build_model(tiny_args(FINETUNE, *flags, str(len(names))))[0]
    before = class_bias(model)
    load_pretrained(model, load_checkpoint(tmp_path / "file.pth"), names)
    return class_bias(model), before


def test_rows_of_published_heads_are_matched_by_coco_names(tmp_path: Path) -> None:
    bias, before = load_class_head(tmp_path, {0: "bolt", 1: "toothbrush", 2: "person"})
    assert bias == [before[0], 90.0, 1.0, 91.0], 'the last row is "no object"'
    names = {0: "dog", 1: "nut"}
    bias, before = load_class_head(tmp_path, names, detector="conditional_detr")
    assert bias == [18.0, before[1]]
    bias, before = load_class_head(tmp_path, names, rows=40)
    assert bias == before, "a head with another number of classes is not COCO's"


def test_rows_of_custom_heads_are_matched_by_their_names(tmp_path: Path) -> None:
    stored = {"class_names": {0: "nut", 1: "person"}, "category_ids": {0: 10, 1: 77}}
    names = {0: "bolt", 1: "nut", 2: "screw"}
    bias, before = load_class_head(tmp_path, names, rows=2, **stored)
    assert bias == [before[0], 0.0, before[2], 2.0]


def test_coco_has_80_classes_and_ids_with_gaps() -> None:
    assert len(coco_names.CLASS_NAMES) == len(set(coco_names.CLASS_NAMES.values())) == 80
    gaps = set(range(1, 91)) - set(coco_names.CLASS_NAMES)
    assert gaps == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_pre_training_and_fine_tuning(dataset_root: Path, tmp_path: Path) -> None:
    images = ("--dataset_file", "custom", "--train_images", dataset_root / "photos")
    pre_train(*images, "--output_dir", tmp_path / "pre", "--epochs", 1, *FROZEN)
    fine_tune(
        *custom_dataset_flags(dataset_root),
        *("--pretrain", tmp_path / "pre" / "checkpoint.pth"),
        *("--output_dir", tmp_path / "fine", "--epochs", 1, *FROZEN),
    )
    checkpoint = read_checkpoint(tmp_path / "fine" / "checkpoint.pth")
    assert checkpoint["category_ids"] == CATEGORY_IDS
