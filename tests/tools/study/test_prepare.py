"""The data of a transfer study: disjoint splits, boxes that fit the resized images, calls that can be repeated."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.study_cases import argv, prepare_data, run_words, study
from tests.tiny import write_coco, write_voc
from tools.study.prepare import draw_unlabelled, read_manifest, repeat_images, resize_image
from util.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("study"))


def names(data: Path, part: str) -> set[str]:
    return {
        image["file_name"]
        for image in json.loads((data / "annotations" / f"{part}.json").read_text())["images"]
    }


def test_splits_are_disjoint_and_pre_training_sees_no_held_out_image(data: Path) -> None:
    train, val, test = (names(data, part) for part in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [20, 4, 6]
    assert not train & val
    assert not (train | val) & test
    listed = set((data / "unlabelled.txt").read_text().split())
    assert {f"labelled/{name}" for name in train} <= listed
    assert not {f"labelled/{name}" for name in val | test} & listed
    assert sorted(Path(name).name for name in listed if name.startswith("unlabelled")) == [
        "000.png.jpg",
        "001.png.jpg",
        "002.png.jpg",
    ]
    manifest = read_manifest(data)
    assert manifest["unlabelled"]["skipped_as_held_out"] == 2
    assert manifest["unlabelled"]["images"] == len(listed) == 23
    assert str(data.parent) not in json.dumps(manifest), "no directory of the user's disk"


def test_duplicates_of_validation_images_are_skipped(data: Path, tmp_path: Path) -> None:
    """With all training images as unlabelled images, those of val are skipped."""
    coco = data.parent / "coco"
    study(
        "prepare",
        coco_path=coco,
        unlabelled=coco / "train2017",
        no_labelled_images=True,
        image_size=64,
        fractions=1,
        output_dir=tmp_path / "data",
    )
    listed = {
        Path(name).name for name in (tmp_path / "data" / "unlabelled.txt").read_text().split()
    }
    assert listed == {Path(name).name for name in names(tmp_path / "data", "train")}
    assert read_manifest(tmp_path / "data")["unlabelled"]["skipped_as_held_out"] == 4


def test_val_share_0_and_max_unlabelled(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = argv(
        coco_path=data.parent / "coco",
        unlabelled=data.parent / "unlabelled",
        fractions=1,
        image_size=64,
    )
    study("prepare", *words, val_share=0, max_unlabelled=3, output_dir=tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    assert [manifest[part]["images"] for part in ("train", "val", "test")] == [24, 0, 6]
    assert manifest["unlabelled"]["sources"][0]["images"] == 3
    flags = {"fractions": 1, "evaluate_on": "val", "list": True}
    run = run_words(tmp_path / "data", tmp_path / "out", **flags)
    with pytest.raises(UserError, match="--evaluate_on val: .* was prepared with --val_share 0"):
        study("run", *run)
    for flag, value in (("--fractions", -1), ("--val_share", -1), ("--val_share", 1)):
        with pytest.raises(SystemExit):
            study("prepare", *words, flag, value, output_dir=tmp_path / "other")
        assert f"error: argument {flag}: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_one_class(data: Path, tmp_path: Path) -> None:
    """All boxes are kept and get one class."""
    words = argv(coco_path=data.parent / "coco", fractions=[1, 0.5], image_size=64)
    study("prepare", *words, "--one_class", output_dir=tmp_path / "one")
    study("prepare", *words, output_dir=tmp_path / "all")
    for file in ("train.json", "train_0.5.json", "val.json", "test.json"):
        one, several = (
            json.loads((tmp_path / folder / "annotations" / file).read_text())
            for folder in ("one", "all")
        )
        assert one["categories"] == [{"id": 1, "name": "object"}]
        assert {box["category_id"] for box in one["annotations"]} == {1}
        assert len({box["category_id"] for box in several["annotations"]}) > 1
        assert [box["bbox"] for box in one["annotations"]] == [
            box["bbox"] for box in several["annotations"]
        ]

    with pytest.raises(UserError, match="was prepared with one_class False, now it is True"):
        study("prepare", *words, "--one_class", output_dir=tmp_path / "all")


def test_true_boxes_list_every_training_image_with_a_box(data: Path) -> None:
    boxes = json.loads((data / "annotations" / "true_boxes.json").read_text())
    with_box = {box["image_id"] for box in boxes["annotations"]}
    expected = {image["file_name"] for image in boxes["images"] if image["id"] in with_box}
    assert set((data / "labelled" / "true_boxes.txt").read_text().split()) == expected
    assert expected <= names(data, "train")


def test_unlabelled_images_are_drawn_from_all_folders() -> None:
    assert (
        draw_unlabelled([2, 0, 3], None, 1)
        == draw_unlabelled([2, 0, 3], 9, 1)
        == [[0, 1], [], [0, 1, 2]]
    )
    drawn = draw_unlabelled([500, 500], 100, 1)
    assert drawn == draw_unlabelled([500, 500], 100, 1) != draw_unlabelled([500, 500], 100, 2)
    assert (
        sum(map(len, drawn)) == len({(i, j) for i, part in enumerate(drawn) for j in part}) == 100
    )
    assert 30 < len(drawn[0]) < 70


def test_small_jpegs_are_copied_and_other_images_converted(tmp_path: Path) -> None:
    args, image = Namespace(image_size=64, quality=82), Image.new("RGB", (40, 50), (200, 30, 30))
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name)
        assert resize_image(str(tmp_path / name), tmp_path / "out" / f"{name}.jpg", args) == (
            (40, 50),
            (40, 50),
        )
    assert (tmp_path / "out" / "a.jpg.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes()
    with Image.open(tmp_path / "out" / "a.png.jpg") as copy:
        assert copy.format == "JPEG"
    image.resize((80, 100)).save(tmp_path / "b.jpg")
    assert resize_image(str(tmp_path / "b.jpg"), tmp_path / "out" / "b.jpg", args) == (
        (80, 100),
        (64, 80),
    )


def test_images_are_rotated_where_the_annotations_list_the_rotated_size(tmp_path: Path) -> None:
    args, exif = Namespace(image_size=64, quality=82), Image.Exif()
    exif[0x0112] = 6
    source = tmp_path / "a.jpg"
    Image.new("RGB", (40, 50), (200, 30, 30)).save(source, exif=exif)
    for name, listed_hw, size in (("stored", (50, 40), (40, 50)), ("rotated", (40, 50), (50, 40))):
        target = tmp_path / f"{name}.jpg"
        for _ in range(2):  # the second time it exists
            assert resize_image(str(source), target, args, listed_hw) == (size, size)
        with Image.open(target) as copy:
            assert copy.size == size
            assert copy.getexif().get(0x0112, 1) == (6 if name == "stored" else 1)


@pytest.mark.parametrize("custom", [False, True])
def test_crowds_are_kept_in_test(custom: bool, tmp_path: Path) -> None:
    """The test annotations have them, scaled and with the class of their label. They do not count as objects."""
    coco = write_coco(tmp_path / "coco", train=24, val=6)
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    crowd = content["annotations"][0]
    crowd["iscrowd"] = 1
    file.write_text(json.dumps(content))
    words = argv(coco_path=coco)
    if custom:
        words = argv(
            dataset_file="custom",
            train_images=coco / "train2017",
            train_annotations=coco / "annotations" / "instances_train2017.json",
            val_images=coco / "val2017",
            val_annotations=file,
        )
    study("prepare", *words, image_size=32, fractions=1, output_dir=tmp_path / "data")
    test = json.loads((tmp_path / "data" / "annotations" / "test.json").read_text())
    assert len(test["annotations"]) == len(content["annotations"])
    (found,) = [box for box in test["annotations"] if box["iscrowd"]]
    classes = [
        {category["id"]: category["name"] for category in part["categories"]}
        for part in (test, content)
    ]
    assert classes[0][found["category_id"]] == classes[1][crowd["category_id"]]
    small, large = (
        next(image for image in part["images"] if image["id"] == crowd["image_id"])
        for part in (test, content)
    )
    assert found["bbox"][2] == pytest.approx(
        crowd["bbox"][2] * small["width"] / large["width"], abs=0.01
    )
    assert read_manifest(tmp_path / "data")["test"]["boxes"] == len(content["annotations"]) - 1


def test_a_label_fraction_is_repeated_to_full_length(data: Path) -> None:
    split = json.loads((data / "splits" / "0.5.json").read_text())
    whole, part = (
        json.loads((data / "annotations" / f"{name}.json").read_text())
        for name in ("train", "train_0.5")
    )
    chosen = {image["file_name"] for image in whole["images"] if image["id"] in split["ids"]}
    assert len(chosen) == 10
    assert len(part["images"]) == len(whole["images"]) == 20
    listed = [image["file_name"] for image in part["images"]]
    assert {name: listed.count(name) for name in chosen} == dict.fromkeys(chosen, 2)


def test_repeated_images_keep_their_boxes() -> None:
    content = {
        "images": [{"id": 7, "file_name": "a"}, {"id": 9, "file_name": "b"}],
        "categories": [],
        "annotations": [{"id": 1, "image_id": 9, "bbox": [1, 2, 3, 4]}],
    }
    again = repeat_images(content, 5)
    assert [image["file_name"] for image in again["images"]] == ["a", "b", "a", "b", "a"]
    assert [image["id"] for image in again["images"]] == [1, 2, 3, 4, 5]
    assert [(box["id"], box["image_id"]) for box in again["annotations"]] == [(1, 2), (2, 4)]


def test_boxes_are_in_pixels_of_the_resized_images(tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 8, "2007_test": 3})
    study(
        "prepare",
        dataset_file="voc",
        voc_path=voc,
        voc_train="2007_trainval",
        image_size=32,
        fractions=1,
        output_dir=tmp_path / "data",
    )
    content = json.loads((tmp_path / "data" / "annotations" / "test.json").read_text())
    assert content["annotations"]
    sizes = {image["id"]: image for image in content["images"]}
    for image in content["images"]:
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            assert small.size == (image["width"], image["height"])
            assert min(small.size) == 32
    for box in content["annotations"]:
        image, (x, y, width, height) = sizes[box["image_id"]], box["bbox"]
        assert x + width <= image["width"] + 1
        assert y + height <= image["height"] + 1
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            inner = np.asarray(small)[round(y + height / 2), round(x + width / 2)].astype(int)
        assert np.ptp(inner) > 80, "objects are rectangles of one color on gray"


def test_prepare_resumes_and_refuses_other_settings(data: Path, tmp_path: Path) -> None:
    words = argv(
        coco_path=data.parent / "coco",
        unlabelled=data.parent / "unlabelled",
        image_size=64,
        fractions=(1, 0.5),
    )
    assert study("prepare", *words, output_dir=data)[-1] == f"{data} is finished"
    with pytest.raises(UserError, match="prepared with val_share 0.15, now it is 0.3"):
        study("prepare", *words, val_share=0.3, output_dir=data)
    folder = tmp_path / "again"
    study("prepare", *words, output_dir=folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    missing = next(iter(sorted(before)))
    missing.unlink()
    (folder / "manifest.json").unlink()
    study("prepare", *words, output_dir=folder)
    assert {path for path, written in before.items() if path.stat().st_mtime_ns != written} == {
        missing
    }
    assert read_manifest(folder)["sha256"] == read_manifest(data)["sha256"]
    (folder / "annotations" / "test.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"annotations/test\.json has changed since it was prepared"
    ):
        read_manifest(folder)


def test_rare_classes_are_dropped(data: Path, tmp_path: Path) -> None:
    counts = [read_manifest(data)[part]["boxes_by_class"] for part in ("train", "test")]
    least = min(counts[1].values()) + 1
    study(
        "prepare",
        coco_path=data.parent / "coco",
        image_size=64,
        min_objects=least,
        output_dir=tmp_path / "data",
    )
    kept = {name for name in counts[0] if all(count[name] >= least for count in counts)}
    assert set(read_manifest(tmp_path / "data")["test"]["boxes_by_class"]) == kept != set(counts[0])
