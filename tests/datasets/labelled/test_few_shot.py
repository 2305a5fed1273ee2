"""Few shots: which classes are novel, what is trained on, draws of others, and that base and novel AP are what they
say.
"""

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
from datasets.labelled.annotations import Annotations, parse_coco
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


def trained_on(root: Path, *flags: object) -> Annotations:
    """The annotations that are left for training."""
    return build_dataset(
        "train", tiny_args(FINETUNE, "--coco_path", str(root), *map(str, flags))
    ).annotations


def objects(annotations: Annotations) -> Counter:
    """(image id, label, box) of every object, and how often."""
    image = annotations.image_indices
    return Counter(
        (int(annotations.image_ids[i]), int(label), tuple(box))
        for i, label, box in zip(
            image, annotations.labels, annotations.boxes_xyxy_abs.tolist(), strict=True
        )
    )


# ---------------------------------------------------------------------------------------------------- which are novel


def test_the_published_splits() -> None:
    """VOC's classes are COCO's novel ones under other names; each split of VOC has 5 of them."""
    from datasets.labelled.voc import CLASSES

    other = {
        "motorbike": "motorcycle",
        "aeroplane": "airplane",
        "sofa": "couch",
        "pottedplant": "potted plant",
        "diningtable": "dining table",
        "tvmonitor": "tv",
    }
    assert {other.get(name, name) for name in CLASSES} == set(few_shot.COCO_NOVEL)
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
    ("flags", "said"),
    [
        (
            "--few_shot base",
            "have no class 'person' to be novel, they have red, green, blue: name novel classes by --novel_classes",
        ),
        ("--few_shot base --novel_classes rde", "have no class 'rde' to be novel"),
        (
            "--few_shot base --novel_classes red green blue",
            "--novel_classes names all 3 classes of the data",
        ),
        ("--shots 5", "--shots has no effect without --few_shot"),
        ("--novel_classes red", "--novel_classes has no effect without --few_shot"),
        ("--novel_split 2", "--novel_split has no effect without --few_shot"),
        ("--few_shot base --novel_split 2", "--novel_split 2 is a published split of VOC's classes"),
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
def test_bad_flags_are_refused_in_one_line(flags: str, said: str, coco: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        trained_on(coco, *flags.split())
    assert "\n" not in str(error.value)


def test_own_data_need_names_of_novel_classes(tmp_path: Path) -> None:
    flags = custom_dataset_flags(write_custom_dataset(tmp_path / "own"))
    with pytest.raises(
        UserError, match="not published for --dataset_file custom: name them by --novel_classes"
    ):
        build_dataset("train", tiny_args(FINETUNE, *flags, "--few_shot", "base"))
    train, val = build_labelled(tiny_args(FINETUNE, *flags, "--few_shot", "base", *RED))
    assert train.num_classes == val.num_classes == 3
    names = {train.class_names[label] for label in train.annotations.labels.tolist()}
    assert names == {"green", "blue"}
    assert set(train.class_names.values()) == {"red", "green", "blue"}  # rows for all
    few = build_dataset(
        "train", tiny_args(FINETUNE, *flags, "--few_shot", "all", "--shots", "1")
    ).annotations
    assert sorted(few.labels.tolist()) == [0, 1, 2]  # no class is novel: K shots of all


# ---------------------------------------------------------------------------------------------------- what is trained
# on


def test_base_training_has_no_novel_object_and_no_empty_image(coco: Path) -> None:
    whole, base = trained_on(coco), trained_on(coco, "--few_shot", "base", *RED)
    assert objects(base) == Counter({key: n for key, n in objects(whole).items() if key[1] != 1})
    assert (np.diff(base.offsets) > 0).all()
    assert len(base) < len(whole)
    assert base.class_names == whole.class_names
    assert base.fingerprint().startswith("all objects of 2 base classes in 12 images, ")
    val = build_dataset(
        "val", tiny_args(FINETUNE, "--coco_path", str(coco), "--few_shot", "base", *RED)
    )
    assert val.annotations.labels.tolist().count(1) > 0


def test_a_share_of_the_images_for_base_training(coco: Path) -> None:
    part = trained_on(coco, "--few_shot", "base", *RED, "--filter_pct", "0.5")
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
def test_a_draw_is_exact(seed: int) -> None:
    """K objects of each class, or all it has; only these, each once, as they were; images without one are gone."""
    rng = np.random.default_rng(seed)
    whole = random_annotations(rng)
    shots = int(rng.integers(1, 12))
    few = few_shot.sample_shots(whole, whole.class_names, shots, seed)
    for label in whole.class_names:
        assert (few.labels == label).sum() == min(shots, (whole.labels == label).sum())
    assert not objects(few) - objects(whole)
    assert len(set(few.ids.tolist())) == len(few.ids)
    assert (np.diff(few.offsets) > 0).all()
    row = {number: i for i, number in enumerate(whole.ids.tolist())}
    rows = [row[number] for number in few.ids.tolist()]
    assert np.array_equal(few.boxes_xyxy_abs, whole.boxes_xyxy_abs[rows])
    assert np.array_equal(few.areas, whole.areas[rows])
    assert (
        few.image_ids[few.image_indices].tolist()
        == whole.image_ids[whole.image_indices][rows].tolist()
    )
    part = few_shot.sample_shots(
        whole, dict(list(whole.class_names.items())[:1]), max(shots - 1, 1), seed
    )
    assert not objects(part) - objects(few)  # fewer shots of fewer classes are a part


def test_draws_are_fixed_by_the_seed(coco: Path) -> None:
    flags = ("--few_shot", "all", *RED, "--shots", 2)
    first, again, other = (trained_on(coco, *flags, *more) for more in ((), (), ("--seed", 7)))
    assert first.fingerprint() == again.fingerprint()
    assert objects(first) != objects(other)
    assert Counter(first.labels.tolist()) == {1: 2, 2: 2, 3: 2}
    novel = trained_on(coco, "--few_shot", "novel", *RED, "--shots", 2)
    assert objects(novel) == Counter({key: n for key, n in objects(first).items() if key[1] == 1})
    assert first.subset == "2 objects each, drawn by seed 42, of 3 classes in 12 images"


def test_too_few_objects_are_said(coco: Path) -> None:
    with captured_log() as lines:
        few = trained_on(coco, "--few_shot", "all", *RED, "--shots", 500)
    assert objects(few) == objects(trained_on(coco))
    assert any(
        "3 of 3 classes have fewer than 500 objects, the first is red" in line for line in lines
    )


def test_a_draw_is_of_images_that_are_there(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", train=8)
    (root / "train2017" / "000002.png").unlink()
    for seed in range(5):
        few = trained_on(root, "--few_shot", "all", *RED, "--shots", 3, "--seed", seed)
        assert 3 not in few.image_ids
        assert set(Counter(few.labels.tolist()).values()) == {3}


def test_voc(voc: Path) -> None:
    flags = ["--dataset_file", "voc", "--voc_path", str(voc), "--novel_split"]
    base = build_dataset("train", tiny_args(FINETUNE, *flags, "3", "--few_shot", "base"))
    assert {base.class_names[label] for label in base.annotations.labels.tolist()} == {
        "bird",
        "dog",
    }
    assert base.num_classes == 20
    few = build_dataset(
        "train", tiny_args(FINETUNE, *flags, "1", "--few_shot", "novel", "--shots", "2")
    ).annotations
    assert [few.class_names[label] for label in few.labels.tolist()] == ["bird", "bird"]
    assert len(few.difficult) == 2
    with pytest.raises(
        UserError,
        match="--few_shot novel leaves no object to train on .*of 5 novel classes in 11 images",
    ):
        build_dataset(
            "train", tiny_args(FINETUNE, *flags, "2", "--few_shot", "novel", "--shots", "2")
        )


# ---------------------------------------------------------------------------------------------------- drawn by others


def test_a_folder_of_published_files(coco: Path, tmp_path: Path) -> None:
    """Names of 2014, a file a class; only classes that are asked for need one."""
    folder = write_few_shot_files(coco, tmp_path / "seed0", shots=(2, 3), prefix="COCO_val2014_")
    few = trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2)
    assert Counter(few.labels.tolist()) == {1: 2, 2: 2, 3: 2}
    expected = set()
    for name in ("red", "green", "blue"):
        content = json.loads((folder / f"full_box_2shot_{name}_trainval.json").read_text())
        expected |= {item["id"] for item in content["annotations"]}
    assert set(few.ids.tolist()) == expected
    assert not objects(few) - objects(trained_on(coco))
    (folder / "full_box_2shot_blue_trainval.json").unlink()
    novel = trained_on(coco, "--few_shot", "novel", *RED, "--few_shot_file", folder, "--shots", 2)
    assert set(novel.labels.tolist()) == {1}
    with pytest.raises(
        UserError,
        match="lacks 1 of 3 files, the first is full_box_2shot_blue_trainval.json: it has files of 2, 3 shots",
    ):
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2)
    with pytest.raises(
        UserError,
        match="lacks 3 of 3 files, the first is full_box_5shot_red_trainval.json: it has files of 2, 3 shots",
    ):
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 5)
    with pytest.raises(UserError, match="is a folder: add --shots K"):
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", folder)
    with pytest.raises(
        UserError, match="lacks 3 of 3 files.*: give the folder with such a file for each class"
    ):
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", tmp_path, "--shots", 5)


def shots_file(coco: Path, path: Path, **changes: object) -> Path:
    """Three objects of the training images in one COCO file."""
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    content["annotations"] = content["annotations"][:3]
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_one_file(coco: Path, tmp_path: Path) -> None:
    """Classes are told by name, images by name where ids are others; boxes are the file's."""
    path = shots_file(coco, tmp_path / "few.json")
    expected = objects(trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", path))
    assert expected.total() == 3
    content = renumber(json.loads(path.read_text()), {1: 30, 2: 10, 3: 20})
    for item in (*content["images"], *content["annotations"]):
        key = "image_id" if "bbox" in item else "id"
        item[key] = 1000 - item[key]
    (tmp_path / "other_ids.json").write_text(json.dumps(content))
    assert (
        objects(
            trained_on(
                coco, "--few_shot", "all", *RED, "--few_shot_file", tmp_path / "other_ids.json"
            )
        )
        == expected
    )
    content = json.loads(path.read_text())
    del content["categories"]
    (tmp_path / "no_categories.json").write_text(json.dumps(content))
    assert (
        objects(
            trained_on(
                coco, "--few_shot", "all", *RED, "--few_shot_file", tmp_path / "no_categories.json"
            )
        )
        == expected
    )
    labels = trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", path).labels.tolist()
    name = ("red", "green", "blue")[labels[0] - 1]
    part = trained_on(coco, "--few_shot", "novel", "--novel_classes", name, "--few_shot_file", path)
    assert part.labels.tolist() == [labels[0]] * labels.count(labels[0])


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
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
            "made for other data",
        ),
        (
            {},
            "--shots 3",
            "--shots 3 chooses files of a folder, --few_shot_file .* is one file: leave --shots out",
        ),
        ({"annotations": []}, "", "--few_shot all leaves no object to train on"),
        ({"annotations": 5}, "", "has no list 'annotations'"),
    ],
)
def test_bad_files_are_refused(
    changes: dict, flags: str, said: str, coco: Path, tmp_path: Path
) -> None:
    path = shots_file(coco, tmp_path / "few.json", **changes)
    with pytest.raises(UserError, match=said) as error:
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", path, *flags.split())
    assert "\n" not in str(error.value)


def test_a_file_of_another_class_is_refused(coco: Path, tmp_path: Path) -> None:
    folder = write_few_shot_files(coco, tmp_path / "seed0", shots=(2,))
    (folder / "full_box_2shot_red_trainval.json").write_bytes(
        (folder / "full_box_2shot_blue_trainval.json").read_bytes()
    )
    with pytest.raises(
        UserError,
        match="2shot_red_trainval.json has objects of the category 'blue': in such a folder a file holds",
    ):
        trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", folder, "--shots", 2)


def test_images_of_one_name_in_two_folders() -> None:
    """The id decides between them; a name alone can't."""

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

    find = few_shot._ImageMatcher(
        parse_coco(
            content((1, "a/1.png"), (2, "b/1.png"), (3, "COCO_train2014_000000000003.jpg")), "train"
        )
    )
    assert find(parse_coco(content((2, "1.png"), (30, "000000000003.jpg")), "few")).tolist() == [
        1,
        2,
    ]
    with pytest.raises(
        UserError, match="few: 1 of 1 images are not among those of train, the first is 1.png"
    ):
        find(parse_coco(content((7, "1.png")), "few"))


# ---------------------------------------------------------------------------------------------------- evaluation


def detections(truth: dict, rng: np.random.Generator) -> dict[int, dict[str, torch.Tensor]]:
    """True boxes, moved, some with a wrong class or left out, and false ones."""
    found = {}
    for image in truth["images"]:
        rows = [
            a for a in truth["annotations"] if a["image_id"] == image["id"] and rng.random() < 0.8
        ]
        boxes = np.array([a["bbox"] for a in rows] + [[5, 5, 20, 20]], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes += rng.normal(0, 1.5, boxes.shape)
        labels = [a["category_id"] if rng.random() < 0.8 else 0 for a in rows] + [
            int(rng.integers(5))
        ]
        found[image["id"]] = {
            "boxes": torch.tensor(boxes),
            "scores": torch.tensor(rng.random(len(boxes))),
            "labels": torch.tensor(labels),
        }
    return found


def many_objects(rng: np.random.Generator) -> dict:
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
def test_novel_ap_of_coco_is_that_of_an_evaluation_of_novel_classes(backend: str) -> None:
    """And the mean over the classes; what is called all is COCO's AP."""
    rng = np.random.default_rng(0)
    truth = many_objects(rng)
    found = detections(truth, rng)

    def evaluated(categories: list[dict]) -> dict:
        evaluator = CocoEvaluator(build_ground_truth({**truth, "categories": categories}), backend)
        evaluator.update(found)
        return evaluator.summarize()

    whole = evaluated(truth["categories"])
    novel = ("kind1", "kind3", "kind5")
    rows = few_shot.add_groups(whole["per_class"], novel)
    means = few_shot.group_means(rows)
    alone = {
        "novel": evaluated([c for c in truth["categories"] if c["name"] in novel]),
        "base": evaluated([c for c in truth["categories"] if c["name"] not in novel]),
        "all": whole,
    }
    for name, summary in alone.items():
        assert means[name] == pytest.approx(summary["stats"][:3], abs=1e-12), name
        assert 0 < means[name][0] < 1
    by_hand = {row["name"]: row["AP"] for row in whole["per_class"]}
    assert means["novel"][0] == pytest.approx((by_hand["kind1"] + by_hand["kind3"]) / 2, abs=1e-12)


@pytest.mark.parametrize("metric", ["11point", "area"])
def test_novel_ap_of_voc(metric: str) -> None:
    rng = np.random.default_rng(1)
    truth = many_objects(rng)
    found = detections(truth, rng)

    def evaluated(*classes: int) -> dict:
        part = {
            **truth,
            "annotations": [
                item for item in truth["annotations"] if item["category_id"] in classes
            ],
        }
        evaluator = VocEvaluator(parse_coco(part, "truth"), metric)
        evaluator.update(found)
        return evaluator.summarize()

    means = few_shot.group_means(
        few_shot.add_groups(evaluated(*range(5))["per_class"], ("kind0", "kind2"))
    )
    for name, classes in (("novel", (0, 2)), ("base", (1, 3, 4)), ("all", range(5))):
        assert means[name] == pytest.approx(evaluated(*classes)["stats"], abs=1e-12)
        assert 0 < means[name][0] < 1


def test_nothing_found_and_nothing_to_find() -> None:
    """A detector of base classes alone has novel AP 0, data without novel objects -1; neither is NaN."""
    rng = np.random.default_rng(2)
    truth = many_objects(rng)
    found = {
        image: {name: value[prediction["labels"] < 3] for name, value in prediction.items()}
        for image, prediction in detections(truth, rng).items()
    }
    evaluator = CocoEvaluator(build_ground_truth(truth))
    evaluator.update(found)
    rows = evaluator.summarize()["per_class"]
    means = few_shot.group_means(few_shot.add_groups(rows, ("kind3", "kind4")))
    assert means["novel"] == [0.0] * 3
    assert means["base"][0] > 0
    assert means["all"][0] == pytest.approx(means["base"][0] * 3 / 5)
    assert few_shot.group_means(few_shot.add_groups(rows, ("kind5",)))["novel"] == [-1.0] * 3
    assert few_shot.group_means([]) == {"base": [-1.0] * 3, "novel": [-1.0] * 3, "all": [-1.0] * 3}


# ---------------------------------------------------------------------------------------------------- runs


def test_from_base_classes_to_few_shots(coco: Path, tmp_path: Path) -> None:
    """Base training, then few shots from its file; what was drawn serves another run; an evaluation needs no shots."""
    base, few, same = tmp_path / "base", tmp_path / "few", tmp_path / "same"
    common = ("--coco_path", coco, *RED, "--epochs", 1, *FROZEN)
    fine_tune(*common, "--few_shot", "base", "--output_dir", base)
    record = json.loads((base / "subset.json").read_text())
    assert (record["few_shot"], record["novel_classes"], "annotations" in record) == (
        "base",
        ["red"],
        False,
    )
    assert record["ids"] == trained_on(coco, "--few_shot", "base", *RED).image_ids.tolist()

    with captured_log() as lines:
        fine_tune(
            *common,
            "--few_shot",
            "all",
            "--shots",
            2,
            "--seed",
            5,
            "--pretrain",
            base / "checkpoint.pth",
            "--output_dir",
            few,
        )
    assert any(
        "class_embed: 4 of 91 class rows kept by name" in line for line in lines
    )  # up to the last name: 0, red, green, blue
    assert any(
        "base and novel classes:\n  base     2 classes  AP " in line
        and "\n  novel    1 classes  AP " in line
        for line in lines
    )
    logs = read_log(few)[-1]
    assert set(logs["test_few_shot"]) == {"base", "novel", "all"}
    assert logs["test_few_shot"]["all"] == pytest.approx(logs["test_coco_eval_bbox"][:3], abs=1e-12)
    groups = {
        row["name"]: row["group"]
        for row in json.loads((few / "per_class.json").read_text())["classes"]
    }
    assert groups == {"red": "novel", "green": "base", "blue": "base"}
    assert "Base and novel classes" in (few / "result.html").read_text()
    assert read_checkpoint(few / "checkpoint.pth")["class_names"] == {
        1: "red",
        2: "green",
        3: "blue",
    }

    drawn = trained_on(coco, "--few_shot", "all", *RED, "--shots", 2, "--seed", 5)
    kept = json.loads((few / "subset.json").read_text())
    assert sorted(item["id"] for item in kept["annotations"]) == sorted(drawn.ids.tolist())
    again = trained_on(coco, "--few_shot", "all", *RED, "--few_shot_file", few / "subset.json")
    assert objects(again) == objects(drawn)
    with pytest.raises(
        UserError, match="holds objects of few shots, not whole images: give it as --few_shot_file"
    ):
        trained_on(coco, "--split_file", few / "subset.json")
    fine_tune(
        *common,
        "--few_shot",
        "all",
        "--few_shot_file",
        few / "subset.json",
        "--output_dir",
        same,
        "--dry_run",
    )

    fine_tune(
        "--coco_path", coco, "--resume", few / "checkpoint.pth", "--eval", "--output_dir", same
    )  # the run's own settings
    assert (
        json.loads((same / "metrics.json").read_text())["few_shot"].keys()
        == logs["test_few_shot"].keys()
    )
    fine_tune(
        *common[:4],
        "--few_shot",
        "all",
        "--resume",
        base / "checkpoint.pth",
        "--eval",
        "--output_dir",
        tmp_path / "eval",
    )
    of_base = json.loads((tmp_path / "eval" / "metrics.json").read_text())["few_shot"]
    assert all(
        0 <= value <= 1 for value in of_base["novel"]
    )  # and not NaN, though it was never trained on
    fine_tune("--resume", "auto", "--output_dir", few, "--epochs", 2, "--eval_every", 9)
    assert json.loads((few / "subset.json").read_text()) == kept


def test_few_shots_of_own_data_and_voc(voc: Path, tmp_path: Path) -> None:
    """Ids in subset.json are those of the user's file; VOC's objects have no ids of their own."""
    own = write_custom_dataset(tmp_path / "own")
    flags = (*custom_dataset_flags(own), "--few_shot", "all", *RED, "--epochs", 1, *FROZEN)
    fine_tune(*flags, "--shots", 1, "--output_dir", tmp_path / "few")
    kept = json.loads((tmp_path / "few" / "subset.json").read_text())
    assert {item["id"]: item["name"] for item in kept["categories"]} == {
        7: "red",
        3: "green",
        1000: "blue",
    }
    source = {
        item["id"]: item for item in json.loads((own / "train.json").read_text())["annotations"]
    }
    assert [(i["category_id"], i["image_id"]) for i in kept["annotations"]] == [
        (source[i["id"]]["category_id"], source[i["id"]]["image_id"]) for i in kept["annotations"]
    ]
    fine_tune(
        *flags,
        "--few_shot_file",
        tmp_path / "few" / "subset.json",
        "--output_dir",
        tmp_path / "again",
        "--dry_run",
    )
    pascal = (
        "--dataset_file",
        "voc",
        "--voc_path",
        voc,
        "--few_shot",
        "all",
        "--epochs",
        1,
        *FROZEN,
    )
    fine_tune(*pascal, "--shots", 2, "--output_dir", tmp_path / "voc")
    numbers = json.loads((tmp_path / "voc" / "metrics.json").read_text())
    assert numbers["few_shot"]["all"] == pytest.approx(numbers["coco_eval_bbox"], abs=1e-12)
    drawn = json.loads((tmp_path / "voc" / "subset.json").read_text())["annotations"]
    assert [item["id"] for item in drawn] == list(range(1, len(drawn) + 1))
    fine_tune(
        *pascal,
        "--few_shot_file",
        tmp_path / "voc" / "subset.json",
        "--output_dir",
        tmp_path / "voc_again",
        "--dry_run",
    )
