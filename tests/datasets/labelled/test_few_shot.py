"""Few-shot detection: novel classes, the objects to train on, few-shot files, and base and novel AP."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from datasets.evaluators.voc import VocEvaluator
from datasets.labelled import few_shot
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_parser import parse_coco
from tests.tiny import (
    FROZEN,
    captured_log,
    custom_dataset_flags,
    fine_tune,
    read_checkpoint,
    read_log,
    renumber,
    tiny_args,
    write_coco,
    write_custom_dataset,
    write_few_shot_files,
    write_voc,
)
from util.coco import CLASS_NAMES
from util.errors import UserError
from util.settings import FINETUNE

RED = ("--novel_classes", "red")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=12, val=3, empty=(4,))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(
        tmp_path_factory.mktemp("data") / "voc",
        {"2007_trainval": 6, "2012_trainval": 5, "2007_test": 4},
    )


def training_annotations(root: Path, *flags: object) -> Annotations:
    args = tiny_args(FINETUNE, "--coco_path", str(root), *map(str, flags))
    return build_dataset("train", args).annotations


def count_objects(annotations: Annotations) -> Counter:
    """Return how often each (image id, label, box) occurs."""
    image_ids = annotations.image_ids[annotations.image_indices].tolist()
    boxes = map(tuple, annotations.boxes_xyxy_abs.tolist())
    return Counter(zip(image_ids, annotations.labels.tolist(), boxes, strict=True))


# ------------------------------------------------------------------------------------------------------- novel classes


def test_published_splits() -> None:
    """VOC's classes are COCO's novel ones under other names. Each split of VOC has 5 novel classes."""
    from datasets.labelled.voc import CLASSES

    coco_names = {
        "motorbike": "motorcycle",
        "aeroplane": "airplane",
        "sofa": "couch",
        "pottedplant": "potted plant",
        "diningtable": "dining table",
        "tvmonitor": "tv",
    }
    assert {coco_names.get(name, name) for name in CLASSES} == set(few_shot.COCO_NOVEL)
    assert len(set(CLASS_NAMES.values()) - set(few_shot.COCO_NOVEL)) == 60
    for names in few_shot.VOC_NOVEL.values():
        assert len(set(names) & set(CLASSES)) == 5
    args = tiny_args(FINETUNE, "--few_shot", "base")
    assert few_shot.novel_class_names(args, CLASS_NAMES) == few_shot.COCO_NOVEL
    for kind in ("voc", "voc_coco"):
        args = tiny_args(
            FINETUNE, "--few_shot", "base", "--dataset_file", kind, "--novel_split", "3"
        )
        assert few_shot.novel_class_names(args, dict(enumerate(CLASSES))) == (
            "boat",
            "cat",
            "motorbike",
            "sheep",
            "sofa",
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--few_shot base",
            "has no novel class 'person', its classes are red, green, blue: name novel classes with --novel_classes",
        ),
        ("--few_shot base --novel_classes rde", "has no novel class 'rde'"),
        (
            "--few_shot base --novel_classes red green blue",
            "--novel_classes names all 3 classes of the dataset",
        ),
        ("--shots 5", "--shots has no effect without --few_shot"),
        ("--novel_classes red", "--novel_classes has no effect without --few_shot"),
        ("--novel_split 2", "--novel_split has no effect without --few_shot"),
        (
            "--few_shot base --novel_split 2",
            "--novel_split 2 is a published split of VOC's classes",
        ),
        (
            "--few_shot base --shots 5",
            "--shots selects objects of novel or of all classes, --few_shot base trains on all",
        ),
        ("--few_shot base --few_shot_file x", "--few_shot_file selects objects of novel or of all"),
        (
            "--few_shot novel",
            "--few_shot novel needs the objects to train on: add --shots K or --few_shot_file PATH",
        ),
        (
            "--few_shot all --shots 5 --filter_pct 0.1",
            "--shots and --filter_pct both select what to train on",
        ),
        (
            "--few_shot all --few_shot_file x --split_file y",
            "--few_shot_file and --split_file both select what to train on",
        ),
        (
            "--few_shot novel --novel_classes red --few_shot_file x",
            "--few_shot_file x does not exist: give a COCO file",
        ),
    ],
)
def test_bad_flags_raise_a_one_line_error(flags: str, message: str, coco: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        training_annotations(coco, *flags.split())
    assert "\n" not in str(error.value)


def test_custom_dataset_needs_names_of_novel_classes(tmp_path: Path) -> None:
    flags = custom_dataset_flags(write_custom_dataset(tmp_path / "custom"))
    message = "no published novel classes for --dataset_file custom: name them with --novel_classes"
    with pytest.raises(UserError, match=message):
        build_dataset("train", tiny_args(FINETUNE, *flags, "--few_shot", "base"))
    train, val = build_labelled(tiny_args(FINETUNE, *flags, "--few_shot", "base", *RED))
    assert train.num_classes == val.num_classes == 3
    names = {train.class_names[label] for label in train.annotations.labels.tolist()}
    assert names == {"green", "blue"}
    assert set(train.class_names.values()) == {"red", "green", "blue"}, "the head has all classes"
    args = tiny_args(FINETUNE, *flags, "--few_shot", "all", "--shots", "1")
    few = build_dataset("train", args).annotations
    assert sorted(few.labels.tolist()) == [0, 1, 2], "no class is novel: K shots of all"


# ------------------------------------------------------------------------------------------------- objects to train on


def test_base_training_has_no_novel_objects_and_no_empty_images(coco: Path) -> None:
    whole, base = training_annotations(coco), training_annotations(coco, "--few_shot", "base", *RED)
    assert count_objects(base) == Counter(
        {key: n for key, n in count_objects(whole).items() if key[1] != 1}
    )
    assert (np.diff(base.offsets) > 0).all()
    assert len(base) < len(whole)
    assert base.class_names == whole.class_names
    assert base.fingerprint().startswith("all objects of 2 base classes in 12 images, ")
    args = tiny_args(FINETUNE, "--coco_path", str(coco), "--few_shot", "base", *RED)
    assert 1 in build_dataset("val", args).annotations.labels, "novel objects stay in validation"


def test_base_training_on_a_fraction_of_the_images(coco: Path) -> None:
    part = training_annotations(coco, "--few_shot", "base", *RED, "--filter_pct", "0.5")
    assert part.subset == "0.5 by seed 42 of 12 images, all objects of 2 base classes in 6 images"


def random_annotations(rng: np.random.Generator) -> Annotations:
    images, kinds = int(rng.integers(1, 30)), int(rng.integers(1, 6))
    content = {
        "images": [
            {"id": 3 * i + 1, "file_name": f"{i}.png", "height": 50, "width": 60}
            for i in range(images)
        ],
        "annotations": [
            {
                "id": 10 + j,
                "image_id": 3 * int(rng.integers(images)) + 1,
                "category_id": 2 * int(rng.integers(kinds)),
                "iscrowd": 0,
                "bbox": [*rng.integers(0, 20, 2).tolist(), *rng.integers(1, 20, 2).tolist()],
            }
            for j in range(int(rng.integers(1, 80)))
        ],
        "categories": [{"id": 2 * k, "name": f"kind{k}"} for k in range(kinds)],
    }
    return parse_coco(content, "random.json")


@pytest.mark.parametrize("seed", range(20))
def test_sampled_shots_are_exact(seed: int) -> None:
    """K objects of each class or all it has, each once and unchanged. Images without one are dropped."""
    rng = np.random.default_rng(seed)
    whole = random_annotations(rng)
    shots = int(rng.integers(1, 12))
    few = few_shot.sample_shots(whole, whole.class_names, shots, seed)
    for label in whole.class_names:
        assert (few.labels == label).sum() == min(shots, (whole.labels == label).sum())
    assert not count_objects(few) - count_objects(whole)
    assert len(set(few.ids.tolist())) == len(few.ids)
    assert (np.diff(few.offsets) > 0).all()
    row_of_id = {annotation_id: row for row, annotation_id in enumerate(whole.ids.tolist())}
    rows = [row_of_id[annotation_id] for annotation_id in few.ids.tolist()]
    assert np.array_equal(few.boxes_xyxy_abs, whole.boxes_xyxy_abs[rows])
    assert np.array_equal(few.areas, whole.areas[rows])
    expected_images = whole.image_ids[whole.image_indices][rows]
    assert np.array_equal(few.image_ids[few.image_indices], expected_images)
    first_class = dict(list(whole.class_names.items())[:1])
    part = few_shot.sample_shots(whole, first_class, max(shots - 1, 1), seed)
    assert not count_objects(part) - count_objects(few), "fewer shots of fewer classes are a subset"


def test_seed_determines_the_shots(coco: Path) -> None:
    flags = ("--few_shot", "all", *RED, "--shots", 2)
    first, again, other = (
        training_annotations(coco, *flags, *more) for more in ((), (), ("--seed", 7))
    )
    assert first.fingerprint() == again.fingerprint()
    assert count_objects(first) != count_objects(other)
    assert Counter(first.labels.tolist()) == {1: 2, 2: 2, 3: 2}
    novel = training_annotations(coco, "--few_shot", "novel", *RED, "--shots", 2)
    assert count_objects(novel) == Counter(
        {key: n for key, n in count_objects(first).items() if key[1] == 1}
    )
    assert first.subset == "2 objects each, drawn by seed 42, of 3 classes in 12 images"


def test_too_few_objects_are_logged(coco: Path) -> None:
    with captured_log() as lines:
        few = training_annotations(coco, "--few_shot", "all", *RED, "--shots", 500)
    assert count_objects(few) == count_objects(training_annotations(coco))
    assert any(
        "3 of 3 classes have fewer than 500 objects, the first is red" in line for line in lines
    )


def test_shots_are_sampled_from_existing_images(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", train=8)
    (root / "train2017" / "000002.png").unlink()
    for seed in range(5):
        few = training_annotations(root, "--few_shot", "all", *RED, "--shots", 3, "--seed", seed)
        assert 3 not in few.image_ids
        assert set(Counter(few.labels.tolist()).values()) == {3}


def test_voc(voc: Path) -> None:
    flags = ["--dataset_file", "voc", "--voc_path", str(voc), "--novel_split"]
    base = build_dataset("train", tiny_args(FINETUNE, *flags, "3", "--few_shot", "base"))
    names = {base.class_names[label] for label in base.annotations.labels.tolist()}
    assert names == {"bird", "dog"}
    assert base.num_classes == 20

    args = tiny_args(FINETUNE, *flags, "1", "--few_shot", "novel", "--shots", "2")
    few = build_dataset("train", args).annotations
    assert [few.class_names[label] for label in few.labels.tolist()] == ["bird", "bird"]
    assert len(few.difficult) == 2

    args = tiny_args(FINETUNE, *flags, "2", "--few_shot", "novel", "--shots", "2")
    message = "--few_shot novel leaves no object to train on .*of 5 novel classes in 11 images"
    with pytest.raises(UserError, match=message):
        build_dataset("train", args)


# ------------------------------------------------------------------------------------------------------ few-shot files


def test_folder_of_published_files(coco: Path, tmp_path: Path) -> None:
    """One file per class, with the image names of COCO 2014. Only the classes in use need a file."""
    folder = write_few_shot_files(coco, tmp_path / "seed0", shots=(2, 3), prefix="COCO_val2014_")
    few = training_annotations(
        coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2
    )
    assert Counter(few.labels.tolist()) == {1: 2, 2: 2, 3: 2}
    expected = set()
    for name in ("red", "green", "blue"):
        content = json.loads((folder / f"full_box_2shot_{name}_trainval.json").read_text())
        expected |= {item["id"] for item in content["annotations"]}
    assert set(few.ids.tolist()) == expected
    assert not count_objects(few) - count_objects(training_annotations(coco))
    (folder / "full_box_2shot_blue_trainval.json").unlink()
    novel = training_annotations(
        coco, "--few_shot", "novel", *RED, "--few_shot_file", folder, "--shots", 2
    )
    assert set(novel.labels.tolist()) == {1}
    with pytest.raises(
        UserError,
        match="lacks 1 of 3 files, the first is full_box_2shot_blue_trainval.json: it has files of 2, 3 shots",
    ):
        training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2
        )
    with pytest.raises(
        UserError,
        match="lacks 3 of 3 files, the first is full_box_5shot_red_trainval.json: it has files of 2, 3 shots",
    ):
        training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 5
        )
    with pytest.raises(UserError, match="is a folder: add --shots K"):
        training_annotations(coco, "--few_shot", "all", *RED, "--few_shot_file", folder)
    with pytest.raises(
        UserError, match="lacks 3 of 3 files.*: give the folder with such a file for each class"
    ):
        training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", tmp_path, "--shots", 5
        )


def shots_file(coco: Path, path: Path, **changes: object) -> Path:
    """Three objects of the training images in one COCO file."""
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    content["annotations"] = content["annotations"][:3]
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_single_file(coco: Path, tmp_path: Path) -> None:
    """Classes are matched by name, images by name if their ids differ. Boxes are those of the file."""
    path = shots_file(coco, tmp_path / "few.json")
    expected = count_objects(
        training_annotations(coco, "--few_shot", "all", *RED, "--few_shot_file", path)
    )
    assert expected.total() == 3
    content = renumber(json.loads(path.read_text()), {1: 30, 2: 10, 3: 20})
    for item in (*content["images"], *content["annotations"]):
        key = "image_id" if "bbox" in item else "id"
        item[key] = 1000 - item[key]
    (tmp_path / "other_ids.json").write_text(json.dumps(content))
    content = json.loads(path.read_text())
    del content["categories"]
    (tmp_path / "no_categories.json").write_text(json.dumps(content))
    for name in ("other_ids.json", "no_categories.json"):
        few = training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", tmp_path / name
        )
        assert count_objects(few) == expected

    labels = training_annotations(
        coco, "--few_shot", "all", *RED, "--few_shot_file", path
    ).labels.tolist()
    name = ("red", "green", "blue")[labels[0] - 1]
    part = training_annotations(
        coco, "--few_shot", "novel", "--novel_classes", name, "--few_shot_file", path
    )
    assert part.labels.tolist() == [labels[0]] * labels.count(labels[0])


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"categories": [{"id": i, "name": f"kind{i}"} for i in (1, 2, 3)]},
            "",
            "has objects of the category 'kind.', which .* does not have",
        ),
        (
            {
                "images": [
                    {"id": i, "file_name": f"other{i}.png", "height": 60, "width": 72}
                    for i in range(1, 13)
                ]
            },
            "",
            "of 12 images are not among those of .*train2017.json, the first is other1.png \\(image 1\\): it was "
            "made for another dataset",
        ),
        (
            {},
            "--shots 3",
            "--shots 3 selects files of a folder, --few_shot_file .* is a single file: omit --shots",
        ),
        ({"annotations": []}, "", "--few_shot all leaves no object to train on"),
        ({"annotations": 5}, "", "has no list 'annotations'"),
    ],
)
def test_bad_file_raises(
    changes: dict, flags: str, message: str, coco: Path, tmp_path: Path
) -> None:
    path = shots_file(coco, tmp_path / "few.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", path, *flags.split()
        )
    assert "\n" not in str(error.value)


def test_file_of_another_class_raises(coco: Path, tmp_path: Path) -> None:
    folder = write_few_shot_files(coco, tmp_path / "seed0", shots=(2,))
    (folder / "full_box_2shot_red_trainval.json").write_bytes(
        (folder / "full_box_2shot_blue_trainval.json").read_bytes()
    )
    with pytest.raises(
        UserError,
        match="2shot_red_trainval.json has objects of the category 'blue': in such a folder, each file",
    ):
        training_annotations(
            coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2
        )


def test_same_image_name_in_two_folders() -> None:
    """The id decides which one it is. Without a matching id the name is ambiguous."""

    def content(*images: tuple[int, str]) -> dict:
        return {
            "images": [
                {"id": i, "file_name": name, "height": 50, "width": 60} for i, name in images
            ],
            "annotations": [
                {"id": 5 + i, "image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4]}
                for i, _ in images
            ],
            "categories": [{"id": 1, "name": "red"}],
        }

    train = content((1, "a/1.png"), (2, "b/1.png"), (3, "COCO_train2014_000000000003.jpg"))
    match_images = few_shot._ImageMatcher(parse_coco(train, "train"))
    few = parse_coco(content((2, "1.png"), (30, "000000000003.jpg")), "few")
    assert match_images(few).tolist() == [1, 2]
    message = "few: 1 of 1 images are not among those of train, the first is 1.png"
    with pytest.raises(UserError, match=message):
        match_images(parse_coco(content((7, "1.png")), "few"))


# ---------------------------------------------------------------------------------------------------------- evaluation


def random_predictions(
    ground_truth: dict, rng: np.random.Generator
) -> dict[int, dict[str, torch.Tensor]]:
    """Most ground-truth boxes with noise, some with a wrong class, and one false box per image."""
    predictions = {}
    for image in ground_truth["images"]:
        detected = [
            a
            for a in ground_truth["annotations"]
            if a["image_id"] == image["id"] and rng.random() < 0.8
        ]
        boxes = np.array([a["bbox"] for a in detected] + [[5, 5, 20, 20]], float)  # [N, 4]
        boxes[:, 2:] += boxes[:, :2]
        boxes += rng.normal(0, 1.5, boxes.shape)
        labels = [a["category_id"] if rng.random() < 0.8 else 0 for a in detected]
        labels.append(int(rng.integers(5)))
        predictions[image["id"]] = {
            "boxes": torch.tensor(boxes),
            "scores": torch.tensor(rng.random(len(boxes))),
            "labels": torch.tensor(labels),
        }
    return predictions


def random_ground_truth(rng: np.random.Generator) -> dict:
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 100, "width": 100} for i in range(1, 9)
        ],
        "annotations": [
            {
                "id": j + 1,
                "image_id": int(rng.integers(1, 9)),
                "category_id": int(rng.integers(5)),
                "iscrowd": 0,
                "area": 400,
                "bbox": [*rng.integers(0, 60, 2).tolist(), *rng.integers(10, 40, 2).tolist()],
            }
            for j in range(60)
        ],
        "categories": [{"id": k, "name": f"kind{k}"} for k in range(6)],  # kind5 has no object
    }


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_novel_ap_of_coco_equals_evaluation_of_novel_classes(backend: str) -> None:
    """It is also the mean over the novel classes. AP of "all" is COCO's AP."""
    rng = np.random.default_rng(0)
    ground_truth = random_ground_truth(rng)
    predictions = random_predictions(ground_truth, rng)
    categories = ground_truth["categories"]

    def evaluate(categories: list[dict]) -> dict:
        content = {**ground_truth, "categories": categories}
        evaluator = CocoEvaluator(build_ground_truth(content), backend)
        evaluator.update(predictions)
        return evaluator.summarize()

    whole = evaluate(categories)
    novel = ("kind1", "kind3", "kind5")
    means = few_shot.group_means(few_shot.add_groups(whole["per_class"], novel))
    expected = {
        "novel": evaluate([c for c in categories if c["name"] in novel]),
        "base": evaluate([c for c in categories if c["name"] not in novel]),
        "all": whole,
    }
    for name, summary in expected.items():
        assert means[name] == pytest.approx(summary["stats"][:3], abs=1e-12), name
        assert 0 < means[name][0] < 1
    ap = {row["name"]: row["AP"] for row in whole["per_class"]}
    assert means["novel"][0] == pytest.approx((ap["kind1"] + ap["kind3"]) / 2, abs=1e-12)


@pytest.mark.parametrize("metric", ["11point", "area"])
def test_novel_ap_of_voc(metric: str) -> None:
    rng = np.random.default_rng(1)
    ground_truth = random_ground_truth(rng)
    predictions = random_predictions(ground_truth, rng)

    def evaluate(*classes: int) -> dict:
        annotations = [a for a in ground_truth["annotations"] if a["category_id"] in classes]
        part = parse_coco({**ground_truth, "annotations": annotations}, "file")
        evaluator = VocEvaluator(part, metric)
        evaluator.update(predictions)
        return evaluator.summarize()

    rows = few_shot.add_groups(evaluate(*range(5))["per_class"], ("kind0", "kind2"))
    means = few_shot.group_means(rows)
    for name, classes in (("novel", (0, 2)), ("base", (1, 3, 4)), ("all", range(5))):
        assert means[name] == pytest.approx(evaluate(*classes)["stats"], abs=1e-12)
        assert 0 < means[name][0] < 1


def test_group_means_without_detections_and_without_ground_truth() -> None:
    """A detector of base classes has novel AP 0. Data without novel objects have -1. Neither is NaN."""
    rng = np.random.default_rng(2)
    ground_truth = random_ground_truth(rng)
    only_base = {
        image_id: {name: value[prediction["labels"] < 3] for name, value in prediction.items()}
        for image_id, prediction in random_predictions(ground_truth, rng).items()
    }
    evaluator = CocoEvaluator(build_ground_truth(ground_truth))
    evaluator.update(only_base)
    rows = evaluator.summarize()["per_class"]
    means = few_shot.group_means(few_shot.add_groups(rows, ("kind3", "kind4")))
    assert means["novel"] == [0.0] * 3
    assert means["base"][0] > 0
    assert means["all"][0] == pytest.approx(means["base"][0] * 3 / 5)
    assert few_shot.group_means(few_shot.add_groups(rows, ("kind5",)))["novel"] == [-1.0] * 3
    assert few_shot.group_means([]) == {"base": [-1.0] * 3, "novel": [-1.0] * 3, "all": [-1.0] * 3}


# ---------------------------------------------------------------------------------------------------------------- runs


def test_from_base_classes_to_few_shots(coco: Path, tmp_path: Path) -> None:
    """Train on base classes, then on few shots. Another run can use the same shots, and an evaluation needs none."""
    base, few, other = tmp_path / "base", tmp_path / "few", tmp_path / "other"
    data = ("--coco_path", coco, *RED)
    training = (*data, "--epochs", 1, *FROZEN)
    fine_tune(*training, "--few_shot", "base", "--output_dir", base)
    record = json.loads((base / "subset.json").read_text())
    assert (record["few_shot"], record["novel_classes"]) == ("base", ["red"])
    assert "annotations" not in record
    image_ids = training_annotations(coco, "--few_shot", "base", *RED).image_ids
    assert record["ids"] == image_ids.tolist()

    # Few shots, from the base detector.
    with captured_log() as lines:
        fine_tune(
            *training,
            *("--few_shot", "all", "--shots", 2, "--seed", 5),
            *("--pretrain", base / "checkpoint.pth", "--output_dir", few),
        )
    # Rows 0 to 3: unused, red, green, blue.
    assert any("class_embed: 4 of 91 class rows kept by name" in line for line in lines)
    assert any(
        "base and novel classes:\n  base     2 classes  AP " in line
        and "\n  novel    1 classes  AP " in line
        for line in lines
    )
    logs = read_log(few)[-1]
    assert set(logs["test_few_shot"]) == {"base", "novel", "all"}
    assert logs["test_few_shot"]["all"] == pytest.approx(logs["test_coco_eval_bbox"][:3], abs=1e-12)
    per_class = json.loads((few / "per_class.json").read_text())["classes"]
    groups = {row["name"]: row["group"] for row in per_class}
    assert groups == {"red": "novel", "green": "base", "blue": "base"}
    assert "AP of base and novel classes" in (few / "result.html").read_text()
    class_names = read_checkpoint(few / "checkpoint.pth")["class_names"]
    assert class_names == {1: "red", 2: "green", 3: "blue"}

    # The shots are saved, and another run can use them.
    sampled = training_annotations(coco, "--few_shot", "all", *RED, "--shots", 2, "--seed", 5)
    saved = json.loads((few / "subset.json").read_text())
    assert sorted(item["id"] for item in saved["annotations"]) == sorted(sampled.ids.tolist())
    from_file = ("--few_shot", "all", "--few_shot_file", few / "subset.json")
    again = training_annotations(coco, *RED, *from_file)
    assert count_objects(again) == count_objects(sampled)
    message = "has few-shot objects, not whole images: give it as --few_shot_file"
    with pytest.raises(UserError, match=message):
        training_annotations(coco, "--split_file", few / "subset.json")
    fine_tune(*training, *from_file, "--output_dir", other, "--dry_run")

    # An evaluation takes the settings of the run.
    evaluation = ("--eval", "--resume", few / "checkpoint.pth", "--output_dir", other)
    fine_tune("--coco_path", coco, *evaluation)
    metrics = json.loads((other / "metrics.json").read_text())
    assert metrics["few_shot"].keys() == logs["test_few_shot"].keys()

    # The base detector never saw the novel class: its AP is a number, not NaN.
    evaluation = ("--eval", "--resume", base / "checkpoint.pth", "--output_dir", tmp_path / "eval")
    fine_tune(*data, "--few_shot", "all", *evaluation)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert all(0 <= value <= 1 for value in metrics["few_shot"]["novel"])

    fine_tune("--resume", "auto", "--output_dir", few, "--epochs", 2, "--eval_every", 9)
    assert json.loads((few / "subset.json").read_text()) == saved


def test_few_shots_of_custom_dataset_and_voc(voc: Path, tmp_path: Path) -> None:
    """Ids in subset.json are those of the user's file. Objects of VOC have no unique ids, so they are numbered."""
    root = write_custom_dataset(tmp_path / "custom")
    few_shot_flags = ("--few_shot", "all", "--epochs", 1, *FROZEN)
    flags = (*custom_dataset_flags(root), *RED, *few_shot_flags)
    fine_tune(*flags, "--shots", 1, "--output_dir", tmp_path / "few")
    saved = json.loads((tmp_path / "few" / "subset.json").read_text())
    names = {category["id"]: category["name"] for category in saved["categories"]}
    assert names == {7: "red", 3: "green", 1000: "blue"}

    source = json.loads((root / "train.json").read_text())["annotations"]
    source = {annotation["id"]: annotation for annotation in source}
    for annotation in saved["annotations"]:
        original = source[annotation["id"]]
        assert annotation["category_id"] == original["category_id"]
        assert annotation["image_id"] == original["image_id"]
    from_file = ("--few_shot_file", tmp_path / "few" / "subset.json")
    fine_tune(*flags, *from_file, "--output_dir", tmp_path / "again", "--dry_run")

    flags = ("--dataset_file", "voc", "--voc_path", voc, *few_shot_flags)
    fine_tune(*flags, "--shots", 2, "--output_dir", tmp_path / "voc")
    metrics = json.loads((tmp_path / "voc" / "metrics.json").read_text())
    assert metrics["few_shot"]["all"] == pytest.approx(metrics["coco_eval_bbox"], abs=1e-12)
    annotations = json.loads((tmp_path / "voc" / "subset.json").read_text())["annotations"]
    assert [item["id"] for item in annotations] == list(range(1, len(annotations) + 1))
    from_file = ("--few_shot_file", tmp_path / "voc" / "subset.json")
    fine_tune(*flags, *from_file, "--output_dir", tmp_path / "voc_again", "--dry_run")
