"""tools/convert_dataset.py: small exports of each format give the objects that were drawn, and pass the check."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.labelled.subsets import sample_image_ids
from tests.tiny import captured_log, custom_dataset_flags, voc_xml
from tools import check_dataset, convert_dataset
from util.errors import UserError
from util.runs.session import run_script

ROTATED_BY_90 = 6  # EXIF orientation
TRIANGLE = [10.5, 8.0, 24.0, 8.0, 17.25, 20.5]
TINY = [
    3.0,
    3.0,
    6.0,
    3.0,
    6.0,
    6.0,
    3.0,
    6.0,
]  # filled on whole pixels, it would have an area of 16
# file -> (size as viewers show it, objects as (class, x0, y0, x1, y1, polygon)). Boxes are on whole pixels, for VOC.
SCENES: dict[str, tuple[tuple[int, int], list]] = {
    "plain.png": ((48, 64), [("cat", 4, 6, 30, 40, None), ("dog", 20, 10, 60, 44, None)]),
    "with space.png": ((40, 40), [("cat", 0, 0, 40, 40, None)]),
    "größe/ø re.png": ((50, 70), [("zebra", 10, 8, 24, 20, TRIANGLE)]),
    "turned.jpg": ((60, 40), [("dog", 2, 30, 38, 58, None)]),
    "empty.png": ((40, 50), []),
    "much/more.png": ((44, 44), [("cat", 3, 3, 6, 6, TINY)]),
}
YOLO_CLASSES = {0: "cat", 4: "dog", 9: "zebra"}  # with gaps


def write_pictures(folder: Path) -> None:
    rng = np.random.RandomState(0)
    for name, ((height, width), _) in SCENES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.randint(0, 255, (height, width, 3), dtype=np.uint8))
        if name == "turned.jpg":  # stored turned, and shown upright by its EXIF tag
            exif = Image.Exif()
            exif[0x0112] = ROTATED_BY_90
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        else:
            image.save(path)


def write_coco_export(root: Path) -> list[str]:
    write_pictures(root / "images")
    ids = {name: 10 * number for number, name in enumerate(("zebra", "dog", "cat"), start=1)}
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": class_id, "name": name} for name, class_id in ids.items()],
    }
    for image_id, (name, ((height, width), objects)) in enumerate(SCENES.items(), start=100):
        row = {"id": image_id, "file_name": name, "height": height, "width": width, "license": 3}
        content["images"].append(row)
        for kind, x0, y0, x1, y1, polygon in objects:
            row = {
                "id": 1000 + len(content["annotations"]),
                "image_id": image_id,
                "category_id": ids[kind],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "attributes": {"occluded": True},
            }
            row |= {"segmentation": [polygon]} if polygon else {}
            content["annotations"].append(row)
    (root / "instances.json").write_text(json.dumps(content))
    return ["--annotations", f"{root}/instances.json", "--images", f"{root}/images"]


def write_voc_export(root: Path) -> list[str]:
    write_pictures(root / "JPEGImages")
    for name, (size_hw, objects) in SCENES.items():
        boxes = [(kind, [x0, y0, x1 - x0, y1 - y0], 0) for kind, x0, y0, x1, y1, _ in objects]
        text = voc_xml(Path(name).name, size_hw, boxes)
        for _, x0, y0, _, _, polygon in objects:
            if polygon:
                points = "".join(
                    f"<{'yx'[i % 2]}{(i + 1) // 2}>{value + 1}</{'yx'[i % 2]}{(i + 1) // 2}>"
                    for i, value in enumerate(polygon, start=1)
                )
                box = f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
                text = text.replace(box, f"<polygon>{points}</polygon>{box}", 1)
        path = (root / "Annotations" / name).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ["--annotations", f"{root}/Annotations", "--images", f"{root}/JPEGImages"]


def yolo_line(size_hw: tuple[int, int], row: tuple) -> str:
    kind, x0, y0, x1, y1, polygon = row
    height, width = size_hw
    label = next(class_id for class_id, name in YOLO_CLASSES.items() if name == kind)
    if polygon:
        numbers = [value / (height if i % 2 else width) for i, value in enumerate(polygon)]
    else:
        numbers = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width]
        numbers.append((y1 - y0) / height)
    return " ".join([str(label), *(f"{number:.9f}" for number in numbers)])


def write_yolo_export(root: Path) -> list[str]:
    write_pictures(root / "images")
    for name, (size_hw, objects) in SCENES.items():
        path = (root / "labels" / name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if objects:  # no file for an image without objects
            path.write_text("\n".join(yolo_line(size_hw, row) for row in objects) + "\n")
    names = "".join(f"  {class_id}: {name}\n" for class_id, name in YOLO_CLASSES.items())
    (root / "data.yaml").write_text(f"names:\n{names}")
    return ["--annotations", f"{root}/labels", "--images", f"{root}/images"]


def write_labelme_export(root: Path) -> list[str]:
    write_pictures(root)
    for name, ((height, width), objects) in SCENES.items():
        shapes = []
        for kind, x0, y0, x1, y1, polygon in objects:
            points = np.reshape(polygon or [x1, y1, x0, y0], (-1, 2)).tolist()
            shape_type = "polygon" if polygon else "rectangle"
            shapes.append({"label": kind, "points": points, "shape_type": shape_type})
        content = {
            "shapes": shapes,
            "imagePath": Path(name).name,
            "imageHeight": height,
            "imageWidth": width,
        }
        (root / name).with_suffix(".json").write_text(json.dumps(content))
    return ["--annotations", str(root)]


FORMATS: dict[str, Callable[[Path], list[str]]] = {
    "coco": write_coco_export,
    "voc": write_voc_export,
    "yolo": write_yolo_export,
    "labelme": write_labelme_export,
}


def require_supervision(format_name: str) -> None:
    if format_name in ("yolo", "labelme"):
        pytest.importorskip("supervision", reason="the extra supervision reads this format")


def convert(*words: object) -> list[str]:
    """Run the tool and return its log."""
    with captured_log() as lines:
        given = [str(word) for word in (*words, "--num_workers", 0)]
        convert_dataset.main(convert_dataset.parse(given))
    return lines


def check(root: Path) -> tuple[int, list[str]]:
    """Run tools/check_dataset.py, with masks, on a converted dataset."""
    paths = {f"{name}_{part}": root / f"{name}{end}" for name in ("train", "val") for part, end in
             (("images", ""), ("annotations", ".json"))}  # fmt: skip
    words = [*custom_dataset_flags(root, **paths), "--masks", "--num_workers", "0"]
    with captured_log() as lines:
        try:
            run_script(check_dataset.main, check_dataset.parse, words)
        except SystemExit as error:
            return error.code, lines
    return 0, lines


def read(root: Path, *splits: str) -> dict[str, tuple[tuple[int, int], list]]:
    """Return the scenes in converted files, in the form of SCENES."""
    found = {}
    for split in splits or ("train", "val"):
        content = json.loads((root / f"{split}.json").read_text())
        names = {row["id"]: row["name"] for row in content["categories"]}
        files = {row["id"]: row for row in content["images"]}
        for row in files.values():
            found[row["file_name"]] = ((row["height"], row["width"]), [])
            assert (root / split / row["file_name"]).is_file()
        for row in content["annotations"]:
            x, y, width, height = row["bbox"]
            polygon = row["segmentation"][0] if "segmentation" in row else None
            scene = found[files[row["image_id"]]["file_name"]]
            scene[1].append((names[row["category_id"]], x, y, x + width, y + height, polygon))
    return found


def assert_same_scenes(found: dict, expected: dict, polygon_error: float = 1e-4) -> None:
    assert set(found) == set(expected)
    for name, (size_hw, objects) in expected.items():
        assert found[name][0] == size_hw
        assert [row[0] for row in found[name][1]] == [row[0] for row in objects]
        for row, other in zip(found[name][1], objects, strict=True):
            assert row[1:5] == pytest.approx(other[1:5], abs=1e-4)
            if other[5] is None:
                assert row[5] is None
            else:
                assert row[5] == pytest.approx(other[5], abs=polygon_error)


@pytest.mark.parametrize("format_name", FORMATS)
def test_export_becomes_a_dataset_that_passes(format_name: str, tmp_path: Path) -> None:
    require_supervision(format_name)
    export, out = tmp_path / "export", tmp_path / "out"
    words = ["--format", format_name, *FORMATS[format_name](export)]
    lines = convert(*words, "--output_dir", out, "--val_fraction", 0.5, "--seed", 3)

    expected = dict(SCENES)
    if format_name == "yolo":  # the box of a polygon is the one around it
        kind, *_, polygon = SCENES["größe/ø re.png"][1][0]
        row = (kind, *np.reshape(polygon, (-1, 2)).min(0), *np.reshape(polygon, (-1, 2)).max(0))
        expected["größe/ø re.png"] = ((50, 70), [(*row, polygon)])
    if format_name == "labelme":
        kind, *_, polygon = SCENES["größe/ø re.png"][1][0]
        expected["größe/ø re.png"] = ((50, 70), [(kind, 10.5, 8, 24, 20.5, polygon)])
    assert_same_scenes(read(out), expected)
    assert check(out)[0] == 0
    assert not any("dropped" in line for line in lines)

    # The draw is that of tools/make_split.py, over the sorted names.
    drawn = sample_image_ids(np.arange(len(SCENES)), 0.5, 3)
    assert set(read(out, "val")) == {sorted(SCENES)[i] for i in drawn}
    summary = json.loads((out / "conversion.json").read_text())
    assert summary["train"]["objects"] + summary["val"]["objects"] == 6
    assert summary["dropped"] == {}
    rows = json.loads((out / "train.json").read_text())["annotations"]
    assert next(row["area"] for row in rows if "segmentation" in row) == 9
    name = next(iter(read(out, "val")))
    source = next(path for path in export.rglob(Path(name).name) if path.suffix == ".png")
    assert source.stat().st_ino == (out / "val" / name).stat().st_ino  # a link


def category_ids(root: Path) -> dict[str, int]:
    content = json.loads((root / "train.json").read_text())
    return {row["name"]: row["id"] for row in content["categories"]}


def test_class_ids_and_coco_keys_are_kept(tmp_path: Path) -> None:
    for name in ("coco", "voc"):
        words = ["--format", name, *FORMATS[name](tmp_path / name)]
        convert(*words, "--output_dir", tmp_path / f"{name}_out", "--val_fraction", 0, "--copy")
    assert category_ids(tmp_path / "coco_out") == {"zebra": 10, "dog": 20, "cat": 30}
    assert category_ids(tmp_path / "voc_out") == {"cat": 1, "dog": 2, "zebra": 3}
    assert (tmp_path / "coco_out" / "classes.txt").read_text() == "zebra\ndog\ncat\n"
    assert not (tmp_path / "coco_out" / "val").exists()

    content = json.loads((tmp_path / "coco_out" / "train.json").read_text())
    original = json.loads((tmp_path / "coco" / "instances.json").read_text())
    assert content["images"] == original["images"]
    for row, other in zip(content["annotations"], original["annotations"], strict=True):
        assert {**row, **other} == row  # nothing is changed; area and iscrowd are added
    copied = tmp_path / "coco_out" / "train" / "plain.png"
    assert copied.stat().st_nlink == 1


def test_yolo_yaml_with_its_own_splits(tmp_path: Path) -> None:
    """Ultralytics' layout with lists, and Roboflow's ../train/images; ids have gaps."""
    pytest.importorskip("supervision", reason="the extra supervision reads this format")
    write_yolo_export(tmp_path)
    for name in ("train", "valid"):
        for part in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
    (tmp_path / "images" / "plain.png").rename(tmp_path / "train" / "images" / "plain.png")
    (tmp_path / "labels" / "plain.txt").rename(tmp_path / "train" / "labels" / "plain.txt")
    (tmp_path / "list.txt").write_text(
        "./images/turned.jpg\ndata/images/größe/ø re.png\ngone.png\n"
    )
    yaml = tmp_path / "data.yaml"
    yaml.write_text(
        yaml.read_text() + "train: ../train/images\nval: list.txt\ntest: ../test/images\n"
    )
    lines = convert("--format", "yolo", "--annotations", yaml, "--output_dir", tmp_path / "out")
    train, val = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert_same_scenes(train, {"plain.png": SCENES["plain.png"]})
    assert set(val) == {"turned.jpg", "größe/ø re.png"}
    assert val["turned.jpg"] == SCENES["turned.jpg"]
    assert category_ids(tmp_path / "out") == {"cat": 0, "dog": 4, "zebra": 9}
    text = "\n".join(lines)
    assert "dropped: split not used: 1" in text
    assert "dropped: image missing: 1" in text
    assert "gone.png" in text
    assert "train has no object of: zebra" in text
    with pytest.raises(UserError, match="has its own validation images"):
        convert("--format", "yolo", "--annotations", yaml, "--output_dir", tmp_path / "two",
                "--val_fraction", 0.1)  # fmt: skip


def test_layouts_of_yolo_without_yaml(tmp_path: Path) -> None:
    """CVAT's YOLO 1.1: labels next to the images, names one folder above. Keypoints of a pose dataset are dropped."""
    pytest.importorskip("supervision", reason="the extra supervision reads this format")
    write_yolo_export(tmp_path)
    words = ["--format", "yolo", "--val_fraction", 0, "--output_dir", tmp_path / "out"]
    (tmp_path / "labels").rename(tmp_path / "obj_train_data")
    (tmp_path / "images" / "plain.png").rename(tmp_path / "obj_train_data" / "plain.png")
    labels = tmp_path / "obj_train_data"
    for path in labels.rglob("*.txt"):
        if path.name != "plain.txt":
            path.unlink()
    names = tmp_path / "data.yaml"
    names.rename(tmp_path / "pose.yaml")
    with pytest.raises(UserError, match="give the class names with --class_names FILE"):
        convert(*words, "--annotations", labels)
    (tmp_path / "obj.names").write_text("cat\n\nrare\n\ndog\n")
    convert(*words, "--annotations", labels)
    assert_same_scenes(read(tmp_path / "out", "train"), {"plain.png": SCENES["plain.png"]})
    assert category_ids(tmp_path / "out") == {"cat": 0, "rare": 2, "dog": 4}

    pose = tmp_path / "pose.yaml"
    pose.write_text(pose.read_text() + "kpt_shape: [2, 2]\n")
    lines = (labels / "plain.txt").read_text().splitlines()
    (labels / "plain.txt").write_text("".join(f"{line} 0.1 0.1 0.9 0.9\n" for line in lines))
    words[-1] = tmp_path / "two"
    convert(*words, "--annotations", labels, "--class_names", pose)
    assert_same_scenes(read(tmp_path / "two", "train"), {"plain.png": SCENES["plain.png"]})


def dropped_kinds(root: Path) -> dict[str, str]:
    """Return kind -> place and detail of the rows of dropped.csv."""
    with (root / "dropped.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert json.loads((root / "conversion.json").read_text())["dropped"] == {
        row["kind"]: sum(other["kind"] == row["kind"] for other in rows) for row in rows
    }
    return {row["kind"]: f"{row['file']} {row['place']} {row['detail']}" for row in rows}


def test_everything_that_is_dropped_is_listed(tmp_path: Path) -> None:
    """In a COCO file: what remains passes the check."""
    words = write_coco_export(tmp_path / "export")
    file = tmp_path / "export" / "instances.json"
    content = json.loads(file.read_text())
    content["images"] += [
        {"id": 1, "file_name": "gone.png", "height": 5, "width": 5},
        {"id": 2, "file_name": "broken.png", "height": 5, "width": 5},
        {"id": 3, "file_name": "resized.png", "height": 80, "width": 50},
        {"id": 4, "file_name": "plain.png", "height": 48, "width": 64},
    ]
    (tmp_path / "export" / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (25, 40)).save(tmp_path / "export" / "images" / "resized.png")
    for image_id, bbox, category, segmentation in (
        (100, [5, 5, 0, 9], 10, None),
        (100, [5, float("nan"), 4, 9], 10, None),
        (100, [200, 5, 9, 9], 10, None),
        (100, [5, 5, 9], 10, None),
        (100, [5, 5, 9, 9], 11, None),
        (777, [5, 5, 9, 9], 10, None),
        (100, [1, 2, 9, 9], 10, [[1, 2, "x"]]),  # the box stays
    ):
        row = {"id": 2000 + len(content["annotations"]), "image_id": image_id, "bbox": bbox}
        row |= {"category_id": category, "segmentation": segmentation}
        content["annotations"].append(row)
    file.write_text(json.dumps(content))
    convert("--format", "coco", *words, "--output_dir", tmp_path / "out")
    found = dropped_kinds(tmp_path / "out")
    expected = {
        "image missing": "gone.png",
        "image unreadable": "broken.png",
        "image of another size": "resized.png  labelled as 50 x 80, is 25 x 40",
        "image listed twice": "plain.png",
        "box without area": "annotation 2006",
        "box not finite": "annotation 2007",
        "box outside image": "annotation 2008",
        "box is not four numbers": "annotation 2009",
        "object of a class that is not listed": "category_id 11",
        "object of an image that is not listed": "image 777",
        "segmentation broken": "annotation 2012",
    }
    assert set(found) == set(expected)
    for kind, part in expected.items():
        assert part in found[kind]
    assert len(read(tmp_path / "out")["plain.png"][1]) == 3
    assert check(tmp_path / "out")[0] == 0


def test_faults_of_text_and_json_files(tmp_path: Path) -> None:
    pytest.importorskip("supervision", reason="the extra supervision reads these formats")
    words = write_yolo_export(tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels" / "plain.txt"
    labels.write_text(labels.read_text() + "0 0.5 0.5\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.2 0.2 0.93\n")
    (tmp_path / "yolo" / "labels" / "nobody.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    convert("--format", "yolo", *words, "--output_dir", tmp_path / "out")
    found = dropped_kinds(tmp_path / "out")
    assert "line 3" in found["line unreadable"]
    assert "class 7" in found["object of a class that is not listed"]
    assert "nobody.txt" in found["image missing"]
    assert len(read(tmp_path / "out")["plain.png"][1]) == 3  # a confidence is no fault

    yaml = tmp_path / "yolo" / "data.yaml"
    yaml.write_text("train: images/plain.png\nnames: [cat]\n")  # an image in place of a folder
    with pytest.raises(UserError, match=r"plain.png can't be read as a list of image paths"):
        convert("--format", "yolo", "--annotations", yaml, "--output_dir", tmp_path / "no")
    yaml.write_text("train: images\nnames: [cat, a, b, c, dog]\nkpt_shape: [many, 2]\n")
    convert("--format", "yolo", "--annotations", yaml, "--output_dir", tmp_path / "pose")
    assert len(read(tmp_path / "pose")["plain.png"][1]) == 3, "no keypoints without a usable shape"

    words = write_labelme_export(tmp_path / "labelme")
    shapes = [
        {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "circle"},
        {"label": "cat", "points": [[1, 1]], "shape_type": "rectangle"},
        *(
            {"label": "pair", "points": points, "shape_type": "polygon", "group_id": 5}
            for points in ([[1, 1], [5, 1], [5, 4]], [[20, 20], [30, 20], [30, 28]])
        ),
    ]
    more = {"imagePath": "..\\plain.png", "shapes": shapes, "imageHeight": 48, "imageWidth": 64}
    (tmp_path / "labelme" / "plain.json").write_text(json.dumps(more))
    (tmp_path / "labelme" / "settings.json").write_text('{"theme": 1}')
    (tmp_path / "labelme" / "much" / "more.json").unlink()
    convert("--format", "labelme", *words, "--output_dir", tmp_path / "two", "--val_fraction", 0)
    found = dropped_kinds(tmp_path / "two")
    assert found["shape is no box or polygon"].endswith("shape 1 circle")
    assert "shape 2" in found["shape unreadable"]
    assert "settings.json" in found["annotation file unreadable"]
    assert "much/more.png" in found["image without annotations"]
    content = json.loads((tmp_path / "two" / "train.json").read_text())
    pair = next(row for row in content["annotations"] if len(row.get("segmentation", [])) == 2)
    assert pair["bbox"] == [1, 1, 29, 27]
    assert pair["area"] < 4 * 3 + 10 * 8  # of the two triangles, not of the box


def test_given_splits_and_folders_stay_together(tmp_path: Path) -> None:
    words = write_coco_export(tmp_path / "export")
    train, val = (tmp_path / "export" / f"{name}.json" for name in ("a", "b"))
    content = json.loads((tmp_path / "export" / "instances.json").read_text())
    train.write_text(json.dumps({**content, "images": content["images"][:3], "annotations": []}))
    other = json.loads(json.dumps(content))
    for row in other["categories"]:  # the validation file numbers its classes otherwise
        row["id"] += 1
    for row in other["annotations"]:
        row["category_id"] += 1
    other["images"] = other["images"][3:]
    other["annotations"] = [row for row in other["annotations"] if row["image_id"] >= 103]
    val.write_text(json.dumps(other))
    images = tmp_path / "export" / "images"
    convert("--format", "coco", "--annotations", train, "--images", images, "--val_annotations", val,
            "--output_dir", tmp_path / "out")  # fmt: skip
    found = read(tmp_path / "out", "val")
    assert found == {name: SCENES[name] for name in ("turned.jpg", "empty.png", "much/more.png")}
    assert category_ids(tmp_path / "out") == {"zebra": 10, "dog": 20, "cat": 30}

    convert("--format", "coco", *words, "--output_dir", tmp_path / "by", "--split_by", "folder",
            "--val_fraction", 0.34)  # fmt: skip
    folders = [
        {str(Path(name).parent) for name in read(tmp_path / "by", s)} for s in ("train", "val")
    ]
    assert not folders[0] & folders[1]
    assert folders[1]


def test_orientation_that_no_size_tells_is_reported(tmp_path: Path) -> None:
    """A square image: training must be told that boxes are as viewers show it."""
    words = write_coco_export(tmp_path / "export")
    exif = Image.Exif()
    exif[0x0112] = ROTATED_BY_90
    path = tmp_path / "export" / "images" / "with space.png"
    with Image.open(path) as image:
        image.save(path, exif=exif)
    lines = convert("--format", "coco", *words, "--output_dir", tmp_path / "out")
    assert "--exif apply" in lines[-1]


def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--format", "coco", *write_coco_export(tmp_path / "export")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for flags, message in (
        (["--output_dir", tmp_path / "full"], "is not empty"),
        (["--output_dir", tmp_path / "export" / "images" / "out"], "is inside the image folder"),
        (["--output_dir", tmp_path / "out", "--val_fraction", 0.01], "leaves a split empty"),
        (["--output_dir", tmp_path / "out", "--annotations", tmp_path / "no"], "does not exist"),
        (["--output_dir", tmp_path / "out", "--format", "voc"], "needs a folder of annotations"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*words, *flags)
    for change in (
        {"categories": [{"name": "cat"}]},
        {"categories": [{"id": "one", "name": "cat"}]},
        {"images": [7]},
        {"images": [{"id": "x1", "file_name": "plain.png"}]},
        {"annotations": [None]},
    ):
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps({"images": [], "annotations": [], "categories": [], **change}))
        with pytest.raises(UserError, match="broken.json: an entry of 'images'"):
            convert(*words, "--annotations", broken, "--output_dir", tmp_path / "out")
    content = json.loads((tmp_path / "export" / "instances.json").read_text())
    broken.write_text(json.dumps({**content, "categories": [], "annotations": []}))
    with pytest.raises(UserError, match="broken.json has no class"):
        convert(*words, "--annotations", broken, "--output_dir", tmp_path / "out")
    broken.unlink()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    for flag, value, message in (
        ("--num_workers", "-1", "must be 0 or more, got -1"),
        ("--val_fraction", "a fifth", "must be at least 0 and below 1, got a fifth"),
    ):
        with pytest.raises(SystemExit):
            convert_dataset.parse([*map(str, words), "--output_dir", "out", flag, value])
        assert message in capsys.readouterr().err
    # Nothing is left of a conversion that failed.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "full"]

    for name in [name for name in sys.modules if name.split(".")[0] == "supervision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "supervision", None)
    words = write_labelme_export(tmp_path / "labelme")
    with pytest.raises(UserError, match="pip install 'supervision>=0.31'"):
        convert("--format", "labelme", *words, "--output_dir", tmp_path / "out")
