"""COCO annotations: folder layouts, which boxes are kept or skipped, and errors of malformed files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset, build_labelled, sample
from datasets.evaluators.coco import build_ground_truth
from datasets.labelled import coco as labelled_coco
from datasets.labelled.coco import coco_files
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco, read_coco
from tests.tiny import write_airbus
from util.errors import UserError
from util.settings import FINETUNE, Settings, settings

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]


def record(annotation_id: int, image_id: int, bbox: list, **changes) -> dict:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "bbox": bbox,
        **changes,
    }


def content(annotations: list[dict], images: int = 3) -> dict:
    return {
        # Not sorted by id. The image with the highest id has no object.
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30}
            for i in reversed(range(10, 10 + images))
        ],
        "annotations": annotations,
        "categories": CATEGORIES,
    }


GOOD = [
    record(1, 11, [5, 6, 10, 12], area=77.0, iscrowd=0),
    record(2, 10, [-3, 2, 20.5, 40], category_id=90),
    record(3, 11, [0, 0, 40, 30], iscrowd=1),
    record(4, 11, [1, 1, 2, 3]),
]


def write_coco(
    root: Path, data: dict | None = None, folder: str = "train2017", name: str = "train2017"
) -> Path:
    data = data or content(GOOD)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image in data["images"]:
        pixels = np.random.RandomState(image["id"]).randint(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / folder / image["file_name"])
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(data))
    return root


def coco_args(root: Path | None, **changes) -> Settings:
    return settings(FINETUNE).replace(
        **{
            "seed": 3,
            "num_workers": 0,
            "batch_size": 2,
            "device": "cpu",
            "dataset_file": "coco",
            "coco_path": str(root) if root else None,
            "data_root": None,
            "imagenet_path": None,
            "pretext": None,
            "proposals": "random",
            "num_patches": 4,
            "patch_size": 24,
            "image_size": 48,
            "max_size": None,
            "train_images": None,
            "split_file": None,
            "filter_pct": -1.0,
            "few_shot": None,
            "eval": False,
            **changes,
        }
    )


def test_targets() -> None:
    annotations = parse_coco(content(GOOD), "file")
    assert annotations.image_ids.tolist() == [10, 11, 12]
    first, second, third = (annotations.target(i, (30, 40)) for i in range(3))
    assert first["boxes"].tolist() == [[0, 2, 17.5, 30]]
    assert first["labels"].tolist() == [90]
    assert second["boxes"].tolist() == [[5, 6, 15, 18], [1, 1, 3, 4]]
    assert second["area"].tolist() == [77, 6]
    assert second["image_id"].tolist() == [11]
    assert third["boxes"].shape == (0, 4)
    for target in (first, second, third):
        dtypes = {key: value.dtype for key, value in target.items()}
        assert dtypes.pop("boxes") == dtypes.pop("area") == torch.float32
        assert set(dtypes.values()) == {torch.int64}
        assert target["iscrowd"].tolist() == [0] * len(target["labels"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(9, 11, [5, 5, float("nan"), 4]), "not finite"),
        (record(9, 11, [5, 5, float("inf"), 4]), "not finite"),
        (record(9, 11, [5, 5, 0, 4]), "without area"),
        (record(9, 11, [5, 5, -3, 4]), "without area"),
        (record(9, 11, [50, 5, 3, 4]), "without area, or outside its image"),
        (record(9, 77, [5, 5, 3, 4]), "does not list"),
    ],
)
def test_unusable_boxes_are_skipped_with_a_warning(
    bad: dict, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="predetr"):
        annotations = parse_coco(content([*GOOD, bad]), "some.json")
    assert len(annotations.labels) == 3
    (line,) = caplog.messages
    assert message in line
    assert line.startswith("some.json: 1 annotation ")
    assert " is skipped" in line
    assert f"annotation 9 of image {bad['image_id']}" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"annotation 9 of image 11 has bbox \[1, 2, 3\]"),
        ({"bbox": None}, "annotation 9 of image 11 has bbox None"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 9 of image 11 has bbox"),
        ({"category_id": -1}, "category_id of .* is -1: it must be at least 0"),
        ({"category_id": "cat"}, "category_id of .* is 'cat': it must be an integer"),
        ({"image_id": "a"}, "image_id of .* is 'a'"),
    ],
)
def test_malformed_annotation_raises(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_coco(content([*GOOD, {**record(9, 11, [1, 2, 3, 4]), **change}]), "some.json")


def test_malformed_file_raises(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"images": [')
    for path, message in (
        (tmp_path / "none.json", "does not exist"),
        (tmp_path / "half.json", "not valid JSON"),
    ):
        with pytest.raises(UserError, match=message):
            read_coco(str(path))
    with pytest.raises(UserError, match="no list 'categories'"):
        parse_coco({"images": [], "annotations": []}, "file")
    twice = content(GOOD)
    twice["images"].append(twice["images"][0])
    with pytest.raises(UserError, match="same id"):
        parse_coco(twice, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [1]}, "entry 0 of 'images' is 1: it must be an object"),
        (
            {"annotations": [record(1, 11, [1, 2, 3, 4]), 3]},
            "entry 1 of 'annotations' is 3: it must be an object",
        ),
        ({"categories": ["cat"]}, "entry 0 of 'categories' is 'cat': it must be an object"),
        ({"categories": [{"id": None}]}, "id of .* is None: it must be an integer"),
        (
            {"images": [{"id": 11, "file_name": "a.png", "height": "a"}]},
            "image 11 has height 'a': it must be in pixels",
        ),
        (
            {"images": [{"id": 11, "file_name": "a.png", "width": [3]}]},
            r"image 11 has width \[3\]: it must be in pixels",
        ),
        (
            {"images": [{"id": 11, "file_name": "a.png", "width": float("nan")}]},
            "image 11 has width nan",
        ),
        (
            {"images": [{"id": 10**30, "file_name": "a.png"}]},
            "id of .* it must be at least 0 and less than",
        ),
        ({"images": [{"id": 11}]}, "image 11 has no file_name: add it"),
        ({"images": [{"id": 11, "file_name": ""}]}, "image 11 has no file_name: add it"),
        (
            {"images": [{"id": 11, "file_name": "\ud800.png"}]},
            "image 11 has the file_name .*, which is not a valid file name",
        ),
        ({"images": [{"id": -1, "file_name": "a.png"}]}, "id of .* is -1: it must be at least 0"),
        (
            {"images": [{"id": 2**53, "file_name": "a.png"}]},
            "id of .* it must be at least 0 and less than",
        ),
        ({"categories": [{"id": True, "name": "cat"}]}, "id of .* is True: it must be an integer"),
        (
            {"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]},
            "the categories 'cat' and 'dog' have the same id 1",
        ),
        (
            {"annotations": [{**record(1, 11, [1, 2, 3, 4]), "iscrowd": "0"}]},
            "annotation 1 of image 11 has iscrowd '0': it must be 0 or 1",
        ),
        ({"annotations": [record(1, 11, [1, 2, 3, 10**400])]}, "annotation 1 of image 11 has bbox"),
    ],
)
def test_malformed_entry_raises_a_one_line_error(
    tmp_path: Path, change: dict, message: str
) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({**content(GOOD), **change}))
    with pytest.raises(UserError, match=message) as error:
        read_coco(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_unusual_annotation_ids_and_areas_are_accepted() -> None:
    annotations = [
        record(10**30, 11, [1, 1, 2, 3], area=10**400),
        record("x", 11, [1, 1, 2, 3], area=None),
    ]
    assert parse_coco(content(annotations), "file").areas.tolist() == [6, 6]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(
        json.dumps({**content(GOOD), "info": "é"}, ensure_ascii=False), encoding=encoding
    )
    assert len(read_coco(str(path))) == len(parse_coco(content(GOOD), "file"))
    assert build_ground_truth(read_json(str(path))) == build_ground_truth(content(GOOD))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"info": "' + "é".encode("latin-1"), "is not UTF-8 .*: save it as UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),  # exceeds Python's recursion limit
    ],
)
def test_undecodable_file_raises(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_coco(str(tmp_path / "some.json"))


def test_boxes_beyond_float32_are_skipped_without_numpy_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    found = parse_coco(
        content([record(1, 11, [1, 1, 1e300, 3]), record(2, 11, [1, 1, 2, 3])]), "file"
    )
    assert len(found.labels) == 1
    assert set(found.findings) == {"box not finite"}
    assert not recwarn.list


def test_folder_instead_of_file_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read_coco(str(tmp_path))


def test_unlisted_categories_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="predetr"):
        annotations = parse_coco(content([record(1, 11, [1, 1, 2, 3], category_id=55)]), "file")
    assert "[55]" in caplog.text
    assert annotations.class_names == {1: "person", 90: "toothbrush", 55: "55"}


def test_no_annotations() -> None:
    annotations = parse_coco(content([]), "file")
    assert len(annotations) == 3
    assert annotations.target(1, (30, 40))["boxes"].shape == (0, 4)


@pytest.mark.parametrize("folder", ["train2017", "images/train2017"])
def test_layouts(tmp_path: Path, folder: str) -> None:
    write_coco(tmp_path, folder=folder)
    dataset = build_dataset("train", coco_args(tmp_path))
    assert len(dataset) == 3
    assert dataset.path(0).endswith(f"{folder}/10.png")
    assert dataset.annotation_file == str(tmp_path / "annotations" / "instances_train2017.json")


def test_data_root(tmp_path: Path) -> None:
    write_coco(tmp_path / "MSCoco")
    assert len(build_dataset("train", coco_args(None, data_root=str(tmp_path)))) == 3


def test_missing_folder_or_file_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--coco_path"):
        build_dataset("train", coco_args(None))
    with pytest.raises(UserError, match="is not a folder"):
        build_dataset("train", coco_args(tmp_path / "none"))
    with pytest.raises(UserError, match="neither val2017 nor images/val2017"):
        coco_files(str(write_coco(tmp_path)), "val")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(UserError, match=r"instances_val2017.json does not exist"):
        build_dataset("val", coco_args(tmp_path))


def test_file_without_annotations_is_only_for_evaluation(tmp_path: Path) -> None:
    """COCO's image_info_test-dev2017.json: an evaluation server keeps the annotations."""
    for key in ("annotations", "categories"):
        images = content([])
        del images["annotations"]
        images.pop(key, None)
        write_coco(tmp_path, images, "val2017", "val2017")
        dataset = build_dataset("val", coco_args(tmp_path, eval=True))
        assert dataset.annotations.image_ids.tolist() == [10, 11, 12]
        assert dataset.ground_truth["annotations"] == []
        with pytest.raises(UserError, match="has no list '(annotations|categories)'"):
            build_dataset("val", coco_args(tmp_path, eval=False))


def test_sample_is_determined_by_epoch_and_index(tmp_path: Path) -> None:
    dataset = build_dataset("train", coco_args(write_coco(tmp_path)))
    image, target = dataset[(1, 1)]
    assert image.dtype == torch.uint8
    assert target["size"].tolist() == list(image.shape[1:])
    assert target["orig_size"].tolist() == [30, 40]
    again = dataset[(1, 1)]
    assert torch.equal(image, again[0])
    assert all(torch.equal(target[key], again[1][key]) for key in target)
    assert len({tuple(dataset[(epoch, 1)][0].shape) for epoch in range(8)}) > 1


def test_validation_samples_are_only_resized(tmp_path: Path) -> None:
    write_coco(tmp_path, folder="val2017", name="val2017")
    dataset = build_dataset("val", coco_args(tmp_path, image_size=60))
    image, target = dataset[0]
    assert image.shape == (3, 60, 80)
    expected = torch.tensor([[8.75, 16, 17.5, 28]]) / torch.tensor([40, 30, 40, 30])
    assert torch.allclose(target["boxes"], expected)


def test_num_classes(tmp_path: Path) -> None:
    write_coco(tmp_path)
    assert build_dataset("train", coco_args(tmp_path)).num_classes == 91
    assert build_dataset("train", coco_args(tmp_path, num_classes=100)).num_classes == 100
    with pytest.raises(
        UserError,
        match=r"category id 90, but --num_classes is 90: .* --num_classes 91 \(or more\)$",
    ):
        build_dataset("train", coco_args(tmp_path, num_classes=90))
    write_coco(tmp_path, content([record(1, 11, [1, 1, 2, 3], category_id=120)]))
    with pytest.raises(
        UserError,
        match=r"category id 120, but --num_classes is 91: .* --num_classes 121 \(or more\)$",
    ):
        build_dataset("train", coco_args(tmp_path))
    dataset = build_dataset(
        "train", coco_args(tmp_path, num_classes=90), allow_any_num_classes=True
    )
    assert dataset.num_classes == 121
    write_coco(tmp_path, content([record(1, 11, [1, 1, 2, 3], category_id=2_905_442)]))
    with pytest.raises(UserError, match="2905443 rows for 3 classes .* --dataset_file custom"):
        build_dataset("train", coco_args(tmp_path))


def test_missing_image_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, folder="val2017", name="val2017")
    for folder in ("train2017", "val2017"):
        (tmp_path / folder / "11.png").unlink()
    with caplog.at_level(logging.WARNING, logger="predetr"):
        dataset = build_dataset("train", coco_args(tmp_path))
    assert r"1 of 3 images" in caplog.text
    assert "11.png (image 11)" in caplog.text
    assert [int(dataset[i][1]["image_id"]) for i in range(len(dataset))] == [10, 12]
    assert dataset.annotations.labels.tolist() == [90]
    with pytest.raises(UserError, match=r"1 of 3 images .* 11.png \(image 11\): add the files"):
        build_dataset("val", coco_args(tmp_path))
    for file in (tmp_path / "train2017").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="3 of 3 images"):
        build_dataset("train", coco_args(tmp_path))


def test_image_size_differs_from_annotation(tmp_path: Path) -> None:
    write_coco(tmp_path)
    Image.new("RGB", (30, 40)).save(tmp_path / "train2017" / "11.png")
    _, target = build_dataset("train", coco_args(tmp_path))[1]
    ((path, reason),) = target["problems"]
    assert path.endswith("11.png")
    assert "30 x 40 pixels, but image 11 is 40 x 30" in reason
    assert int(target["image_id"]) == 12


def test_sizes_may_be_missing(tmp_path: Path) -> None:
    data = content(GOOD)
    for image in data["images"]:
        del image["width"], image["height"]
    _, target = build_dataset("val", coco_args(write_coco(tmp_path, data, "val2017", "val2017")))[0]
    assert "problems" not in target
    assert len(target["boxes"]) == 1


def test_fingerprint_changes_with_the_boxes() -> None:
    first = parse_coco(content(GOOD), "a").fingerprint()
    assert parse_coco(content(GOOD), "b").fingerprint() == first
    moved = [*GOOD[:-1], record(4, 11, [1, 1, 2, 4])]
    assert parse_coco(content(moved), "a").fingerprint() != first


def test_pre_training_on_images_of_a_labelled_dataset(tmp_path: Path) -> None:
    write_coco(tmp_path)
    dataset = build_dataset("train", coco_args(tmp_path, pretext="random_query_patch"))
    assert len(dataset) == 3
    assert dataset[0][1]["labels"].tolist() == [1] * 4


def test_annotation_file_is_read_once_for_all_evaluators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(tmp_path, content(GOOD), "val2017", "val2017")
    reads: list[str] = []
    for module in (labelled_coco, sample):
        monkeypatch.setattr(
            module, "read_json", lambda *args: reads.append(args) or read_json(*args)
        )
    args = coco_args(tmp_path, coco_evaluator="auto")
    dataset = build_dataset("val", args)
    evaluators = [dataset.evaluator(args) for _ in range(3)]
    assert len(reads) == 1
    assert all(evaluator.ground_truth is dataset.ground_truth for evaluator in evaluators)


def test_dataset_does_not_change_the_settings(tmp_path: Path) -> None:
    for name in ("train2017", "val2017"):
        write_coco(tmp_path, content(GOOD), name, name)
    args = coco_args(tmp_path, eval=False)
    train, val = build_labelled(args)
    assert (train.num_classes, val.num_classes) == (91, 91)
    write_airbus(tmp_path / "ships")
    ships = {
        "dataset_file": "airbus_ship",
        "airbus_path": str(tmp_path / "ships"),
        "pretext": "random_query_patch",
    }
    args = args.replace(**ships)
    assert len(build_dataset("train", args)) > 0
