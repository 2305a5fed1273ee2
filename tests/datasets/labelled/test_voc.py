"""PASCAL VOC: VOCdevkit as published, custom XML files, COCO-style files, and a run from training to evaluation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import main as pretrain_main
from datasets import build_dataset, build_labelled
from datasets.evaluators.coco import CocoEvaluator
from datasets.evaluators.voc import VocEvaluator
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.table import KINDS, run_checks
from datasets.labelled.coco import ConvertedDetection
from datasets.labelled.coco_parser import read_coco
from datasets.labelled.voc import CLASSES, detreg_image_id, read_voc, read_xml, read_xml_folder
from tests.tiny import (
    FROZEN,
    captured_log,
    fine_tune,
    read_checkpoint,
    read_log,
    tiny_args,
    voc_xml,
    write_voc,
)
from tools import evaluate_proposals, voc_to_coco
from util.checkpoints.adoption import adopt_settings
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, resolve
from util.settings.registry import PRETEXTS

XML = "VOC2007/Annotations/000001.xml"


@pytest.fixture(scope="module")
def shared_devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOCdevkit that tests do not change."""
    return write_voc(tmp_path_factory.mktemp("voc") / "VOCdevkit")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A VOCdevkit that a test may change."""
    return write_voc(tmp_path / "VOCdevkit")


def voc_args(root: Path, *flags: str):
    return tiny_args(FINETUNE, "--dataset_file", "voc", "--voc_path", str(root), *flags)


# ----------------------------------------------------------------------------------------------------------- VOCdevkit


def test_published_image_sets_ids_labels_and_corners(shared_devkit: Path) -> None:
    train, val = build_labelled(voc_args(shared_devkit))
    assert train.annotations.image_ids.tolist() == [
        2021000001,
        2021000002,
        2021000003,
        20212012000101,
        20212012000102,
    ]
    assert val.annotations.image_ids.tolist() == [2021000201, 2021000202, 2021000203]
    assert val.path(0) == str(shared_devkit / "VOC2007" / "JPEGImages" / "000201.jpg")
    assert train.num_classes == 20
    assert (train.class_names[0], train.class_names[19]) == ("aeroplane", "tvmonitor")
    assert (detreg_image_id("2007_000027"), detreg_image_id("000005")) == (
        20212007000027,
        2021000005,
    )

    objects = read_xml(str(shared_devkit / XML))["objects"]
    text = (shared_devkit / XML).read_text()
    xmin, ymin, xmax, ymax = (
        int(re.search(f"<{corner}>(\\d+)<", text)[1]) for corner in ("xmin", "ymin", "xmax", "ymax")
    )
    name, box, difficult = objects[0]
    assert box == (xmin - 1, ymin - 1, xmax, ymax)
    assert (name, difficult) == (re.search("<name>(\\w+)<", text)[1], False)

    _, target = train[0]
    assert set(target["labels"].tolist()) <= {CLASSES.index(name) for name, _, _ in objects}
    rows = slice(0, train.annotations.offsets[1])
    assert train.annotations.boxes_xyxy_abs[rows].tolist() == [list(box) for _, box, _ in objects]
    num_difficult = sum(
        difficult
        for i in range(len(train))
        for _, _, difficult in read_xml(str(xml_path(train, i)))["objects"]
    )
    assert train.annotations.difficult.sum() == num_difficult > 0, (
        "difficult objects are used in training, as published"
    )


def xml_path(dataset, index: int) -> Path:
    image = Path(dataset.path(index))
    return image.parent.parent / "Annotations" / f"{image.stem}.xml"


def test_image_sets_and_num_classes_by_flag(shared_devkit: Path) -> None:
    image_sets = ("--voc_train", "2012_trainval", "--voc_val", "2007_test")
    train, val = build_labelled(voc_args(shared_devkit, *image_sets, "--num_classes", "21"))
    assert (len(train), len(val), train.num_classes, val.num_classes) == (2, 3, 21, 21)
    message = r"has category id 19, but --num_classes is 7: .* --num_classes 20 \(or more\)$"
    with pytest.raises(UserError, match=message):
        build_labelled(voc_args(shared_devkit, "--num_classes", "7"))
    both = read_voc(str(shared_devkit), ["2007_trainval", "2007_trainval"])
    assert len(both) == 3, "an image in two image sets counts once"


def test_dataset_name_of_detreg_and_folder_in_data_root(tmp_path: Path) -> None:
    write_voc(tmp_path / "pascal" / "VOCdevkit", {"2007_test": 1})
    args = tiny_args(FINETUNE, "--dataset", "voc", "--data_root", str(tmp_path))
    assert (args.dataset_file, args.voc_path) == ("voc", str(tmp_path / "pascal/VOCdevkit"))
    for flags in (
        ("--dataset", "voc"),
        ("--dataset_file", "voc"),
        ("--dataset_file", "voc", "--voc_path", str(tmp_path / "pascal")),
    ):
        args = tiny_args(FINETUNE, *flags, "--data_root", str(tmp_path))
        assert len(build_dataset("val", args)) == 1
    args = tiny_args(PRETRAIN, "--dataset", "voc")
    assert (args.dataset_file, args.voc_path) == ("voc", "data/pascal/VOCdevkit")
    with pytest.raises(
        UserError, match="--dataset voc without --pretext: main.py pre-trains without labels"
    ):
        pretrain_main.parse(["--dataset", "voc"])  # DETReg's main.py fine-tunes with it


def test_pre_training_on_voc_images_reads_no_labels(shared_devkit: Path, devkit: Path) -> None:
    for name in ("VOC2007", "VOC2012"):
        shutil.rmtree(devkit / name / "Annotations")
    for kind, count in (("voc", 5), ("voc_coco", 2)):
        flags = ("--dataset_file", kind, "--voc_path")
        for pretext in PRETEXTS:
            words = ("--pretext", pretext, "--num_patches", "10", "--proposals", "random")
            args = tiny_args(PRETRAIN, *words, *flags, str(devkit))
            train, val = build_dataset("train", args), build_dataset("val", args)
            assert (len(train), len(val)) == (count, 3)
        assert [val.images.name(i) for i in range(3)] == [
            f"VOC2007/JPEGImages/00020{i}.jpg" for i in (1, 2, 3)
        ]
        assert val.path(2) == str(devkit / "VOC2007/JPEGImages/000203.jpg")
    assert "patches" in build_dataset("train", tiny_args(PRETRAIN, *flags, str(devkit)))[0][1]
    first, second = (
        build_dataset("val", tiny_args(PRETRAIN, *flags, str(root))).fingerprint()
        for root in (devkit, shared_devkit)
    )
    assert first == second != train.fingerprint(), "it does not depend on the location"
    with pytest.raises(
        UserError, match="--imagenet_path and --voc_path both name the unlabelled images"
    ):
        tiny_args(PRETRAIN, *flags, "x", "--imagenet_path", "y")
    with pytest.raises(
        UserError, match="--voc_path x is not for --dataset_file coco: give --coco_path"
    ):
        tiny_args(PRETRAIN, "--voc_path", "x")
    (devkit / "VOC2007/ImageSets/Main/test.txt").write_text("")
    with pytest.raises(UserError, match=r"\(2007_test\) lists no image"):
        build_dataset("val", tiny_args(PRETRAIN, *flags, str(devkit)))


def convert(devkit: Path, output_dir: Path, *image_sets: str) -> None:
    """Run tools/voc_to_coco.py."""
    words = [str(devkit), "--output_dir", str(output_dir), "--sets", *image_sets]
    voc_to_coco.main(voc_to_coco.parse(words))


def test_voc_coco_equals_converted_files(shared_devkit: Path, tmp_path: Path) -> None:
    """`--dataset_file voc_coco` gives the same as the files that Siamese DETR reads, and uses COCO metrics."""
    convert(shared_devkit, tmp_path / "meta", "2012_trainval", "2007_test")
    args = voc_args(shared_devkit, "--dataset_file", "voc_coco")
    assert args.voc_train == ["2012_trainval"]
    train, val = build_labelled(args)
    assert (train.num_classes, train.category_ids, train.class_names[19]) == (20, None, "tvmonitor")
    for dataset, name in ((train, "voc_trainval2012"), (val, "voc_test2007")):
        published = read_coco(str(tmp_path / "meta" / f"{name}.cocostyle.json"))
        for field in ("image_ids", "sizes_hw", "offsets", "boxes_xyxy_abs", "labels", "areas"):
            assert (getattr(dataset.annotations, field) == getattr(published, field)).all(), field
        names = [published.file_names[i] for i in range(len(published))]
        assert [Path(dataset.path(i)).name for i in range(len(dataset))] == names
        assert all(Path(dataset.path(i)).is_file() for i in range(len(dataset)))
    plain = build_dataset("val", voc_args(shared_devkit))
    assert len(val.annotations.labels) == len(plain.annotations.labels), "difficult ones too"
    evaluator = val.evaluator(args)
    add_perfect_detections(evaluator, val.annotations)
    stats = evaluator.summarize()["stats"]
    assert (len(stats), stats[0]) == (12, pytest.approx(1.0))

    words = ("--dataset_file", "voc_coco", "--voc_train", "2007_trainval", "2012_trainval")
    train, _ = build_labelled(voc_args(shared_devkit, *words))
    assert len(train) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: root.rename(root.parent / "elsewhere"),
            r"VOCdevkit is not a folder: --voc_path takes VOCdevkit",
        ),
        (
            lambda root: (root / "VOC2012/ImageSets/Main/trainval.txt").unlink(),
            "VOC2012/ImageSets/Main/trainval.txt can't be read",
        ),
        (
            lambda root: (root / "VOC2007/ImageSets/Main/trainval.txt").write_text("cat"),
            "VOC image cat: names are numbers",
        ),
        (
            lambda root: (root / "VOC2012/ImageSets/Main/trainval.txt").write_text("000001"),
            "VOC2007 lists 000001 and VOC2012 lists 000001, which get the same image id 2021000001: give them",
        ),
        (lambda root: (root / XML).unlink(), f"{XML} can't be read"),
        (lambda root: (root / XML).write_text("<annotation><object>"), f"{XML} is not valid XML"),
        (
            lambda root: (root / XML).write_text(
                voc_xml("a", (60, 72), [("orc", [1, 1, 5, 5], 0)])
            ),
            "000001.xml: object 1 has the class 'orc'",
        ),
        (
            lambda root: (root / XML).write_text("<a><object><name>cat</name></object></a>"),
            "000001.xml: an object needs <name>",
        ),
        (
            lambda root: (root / XML).write_text("<annotation><object/></annotation>"),
            "000001.xml: an object needs <name>.*no name",
        ),
    ],
)
def test_bad_devkit_raises_a_one_line_error(devkit: Path, damage, message: str) -> None:
    damage(devkit)
    with pytest.raises(UserError, match=message) as error:
        build_labelled(voc_args(devkit))
    assert "\n" not in str(error.value)


def test_missing_image_is_skipped_in_training_and_stops_evaluation(devkit: Path) -> None:
    (devkit / "VOC2007/JPEGImages/000001.jpg").unlink()
    with captured_log() as lines:
        assert len(build_dataset("train", voc_args(devkit))) == 4
    assert any("1 of 5 images" in line and "000001.jpg" in line for line in lines)
    (devkit / "VOC2007/JPEGImages/000202.jpg").unlink()
    with pytest.raises(UserError, match="VOC2007/JPEGImages/000202.jpg"):
        build_dataset("val", voc_args(devkit))


def test_box_outside_its_image_is_skipped_with_a_warning(devkit: Path) -> None:
    (devkit / XML).write_text(
        voc_xml("a", (60, 72), [("cat", [500, 1, 5, 5], 0), ("dog", [1, 1, 5, 5], 1)])
    )
    with captured_log() as lines:
        train = build_dataset("train", voc_args(devkit))
    assert any(
        "outside its image" in line and "annotation 1 of image 2021000001" in line for line in lines
    )
    assert train.annotations.difficult[: train.annotations.offsets[1]].tolist() == [True], (
        "the marks stay with their boxes"
    )


@pytest.mark.parametrize(
    ("form", "encoding"), [("{}", "utf-8-sig"), ("{}", "utf-16"), ("JPEGImages\\{}.JPG", "utf-8")]
)
def test_image_sets_of_other_programs(form: str, encoding: str, devkit: Path) -> None:
    expected = read_voc(str(devkit), ["2007_trainval"]).fingerprint()
    path = devkit / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    names = path.read_text().split()
    path.write_bytes("".join(f"{form.format(name)}\r\n" for name in names).encode(encoding))
    assert read_voc(str(devkit), ["2007_trainval"]).fingerprint() == expected


# ---------------------------------------------------------------------------------- custom XML files, COCO-style files


def custom_args(**paths: Path):
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return tiny_args(FINETUNE, "--dataset_file", "custom", *words)


def test_custom_dataset_with_xml_files(shared_devkit: Path) -> None:
    images = shared_devkit / "VOC2007" / "JPEGImages"
    annotations = shared_devkit / "VOC2007" / "Annotations"
    args = custom_args(
        train_images=images,
        train_annotations=annotations,
        val_images=images,
        val_annotations=annotations,
    )
    train, val = build_labelled(args)
    assert (len(train), train.num_classes, train.category_ids) == (6, 3, None)
    assert train.class_names == {0: "bird", 1: "cat", 2: "dog"}
    evaluator = val.evaluator(args)
    assert isinstance(evaluator, CocoEvaluator)
    add_perfect_detections(evaluator, val.annotations)
    assert evaluator.summarize()["stats"][0] == pytest.approx(1)


def test_hidden_xml_files_are_skipped(devkit: Path) -> None:
    folder = devkit / "VOC2007" / "Annotations"
    count = len(read_xml_folder(str(folder)))
    (folder / "._000001.xml").write_bytes(b"\0\5\x16\7")
    assert len(read_xml_folder(str(folder))) == count


def test_file_name_on_a_line_of_its_own(devkit: Path) -> None:
    folder = devkit / "VOC2007" / "Annotations"
    before = read_xml_folder(str(folder))
    for path in folder.iterdir():
        path.write_text(
            path.read_text()
            .replace("<filename>", "<filename>\n  ")
            .replace("</filename>", "\n</filename>")
        )
    assert list(read_xml_folder(str(folder)).file_names) == list(before.file_names)


def test_folder_without_xml_files_raises(tmp_path: Path) -> None:
    args = custom_args(train_images=tmp_path, train_annotations=tmp_path)
    with pytest.raises(UserError, match="has no .xml file"):
        build_dataset("train", args)


# ------------------------------------------------------------------------------------ XML files as other programs write


def xml_folder(root: Path, files: dict[str, str], images: tuple[str, ...]) -> tuple[str, str]:
    """Write XML files, name -> <filename>, and empty images; return both folders."""
    for name, listed in files.items():
        path = root / "xml" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_xml(listed, (50, 60), [("cat", [1, 2, 30, 20], 0)]))
    for name in images:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).touch()
    return str(root / "xml"), str(root / "images")


@pytest.mark.parametrize(
    ("name", "listed", "images", "expected", "noted"),
    [
        ("a.xml", "a.jpg", ("a.jpg", "b.jpg"), "a.jpg", False),
        ("a.xml", "b.jpg", ("a.jpg", "b.jpg"), "a.jpg", True),
        ("a.xml", "b.jpg", ("b.jpg",), "b.jpg", False),
        ("a.xml", "gone.jpg", ("a.jpg",), "a.jpg", True),
        ("a.xml", "a", ("a.jpg",), "a.jpg", False),
        ("a.xml", "", ("a.png",), "a.png", False),
        ("a.xml", "a.jpg", ("a.png",), "a.png", False),
        ("a.xml", "", ("b.png",), "a.jpg", False),
        ("a.xml", "C:\\old\\a.jpg", ("a.jpg",), "a.jpg", False),
        ("é.xml", "%C3%A9.jpg", ("é.jpg",), "é.jpg", False),
        ("a.xml", "b.jpg", ("a.jpg", "a.png", "b.jpg"), "a.jpg", True),
        ("a.xml", "a.png", ("a.jpg", "a.png"), "a.png", False),
        ("more/a.xml", "a.jpg", ("a.jpg",), "a.jpg", False),
        ("more/a.xml", "a.jpg", ("a.jpg", "more/a.jpg"), "more/a.jpg", False),
        ("a.XML", "a.jpg", ("a.jpg",), "a.jpg", False),
    ],
)
def test_image_of_an_xml_file(
    name: str, listed: str, images: tuple[str, ...], expected: str, noted: bool, tmp_path: Path
) -> None:
    annotations = read_xml_folder(*xml_folder(tmp_path, {name: listed}, images))
    assert list(annotations.file_names) == [expected]
    notes = {"XML names another image": {1: f"<filename> of {name} is {listed}"}}
    assert annotations.image_notes == (notes if noted else {})


def test_images_without_xml_file_are_counted(tmp_path: Path) -> None:
    folders = xml_folder(tmp_path, {"a.xml": "a.jpg"}, ("a.jpg", "b.jpg", "more/c.png"))
    with captured_log() as lines:
        annotations = read_xml_folder(*folders)
    _, names = annotations.findings["image without XML file"]
    assert list(names) == ["b.jpg", "more/c.png"]
    assert any("2 of 3 images in" in line and line.endswith("first is b.jpg") for line in lines)


def read_bytes_as_xml(content: bytes, tmp_path: Path) -> dict:
    path = tmp_path / "x.xml"
    path.write_bytes(content)
    return read_xml(str(path))


CHINESE = voc_xml("a.jpg", (50, 60), [("中", [1, 2, 30, 20], 0)])


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("gb2312", "gb2312"),
        ("gbk", "gb18030"),
        ("big5", "big5"),
        ("shift_jis", "shift_jis"),
        ("euc-kr", "euc-kr"),
        ("utf8", "utf-8"),
        ("utf-8", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16", "utf-8"),  # a wrong declaration
        ("gb2312", "utf-8"),
    ],
)
def test_encodings_of_xml_files(declared: str, encoding: str, tmp_path: Path) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>{CHINESE}'
    record = read_bytes_as_xml(text.encode(encoding), tmp_path)
    assert record["objects"] == [("中", (1, 2, 31, 22), False)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'<?xml version="1.0" encoding="klingon"?>{CHINESE}'.encode(), "encoding klingon, which"),
        (CHINESE.encode("gbk"), "x.xml declares no encoding, which means utf-8, but its content"),
        (
            f'<?xml version="1.0" encoding="utf8"?>{CHINESE}'.encode("gbk"),
            "declares utf8, but its content is in another encoding",
        ),
        (b" \n", "x.xml is empty"),
        (b"<annotations><image/></annotations>", "outermost element is <annotations>"),
        (CHINESE.replace("<name>中", "<name> ").encode(), "no name"),
        (CHINESE.replace("bndbox>", "polygon>").encode(), "'中' has no xmin in a <bndbox>"),
        (CHINESE.replace("cult>0", "cult>maybe").encode(), "<difficult> is 'maybe'"),
    ],
)
def test_bad_xml_raises_a_one_line_error(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_bytes_as_xml(content, tmp_path)
    assert "\n" not in str(error.value)


def test_namespaces_and_blank_lines_in_xml_files(tmp_path: Path) -> None:
    text = CHINESE.replace("<annotation>", '<annotation xmlns="http://example.org">')
    text = f'\n <?xml version="1.0" encoding="utf-8"?>{text}'
    assert read_bytes_as_xml(text.encode(), tmp_path) == {
        "file": "a.jpg",
        "size_hw": (50, 60),
        "objects": [("中", (1, 2, 31, 22), False)],
        "rotations": [0.0],
        "polygons": [[]],
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(</?)object>", r"\1Object>"),
        ("(</?)bndbox>", r"\1bndBox>"),
        ("(</?)xmin>", r"\1xMin>"),
        ("(<object>.*</object>)", r"<objects>\1</objects>"),
    ],
)
def test_objects_under_other_tags_are_read(old: str, new: str, tmp_path: Path) -> None:
    text = re.sub(old, new, CHINESE)
    assert text != CHINESE
    assert read_bytes_as_xml(text.encode(), tmp_path)["objects"] == [("中", (1, 2, 31, 22), False)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("1", True), ("yes", True), ("True", True), ("1.0", True), ("2", True)]
    + [(word, False) for word in ("0", "no", "False", "Unspecified", "", " ", "0.0")],
)
def test_difficult_in_words(word: str, expected: bool, tmp_path: Path) -> None:
    text = CHINESE.replace("<difficult>0", f"<difficult>{word}")
    assert read_bytes_as_xml(text.encode(), tmp_path)["objects"][0][2] is expected


def add_perfect_detections(evaluator, annotations) -> None:
    for i, image_id in enumerate(annotations.image_ids.tolist()):
        rows = slice(annotations.offsets[i], annotations.offsets[i + 1])
        detections = {
            "boxes": torch.from_numpy(annotations.boxes_xyxy_abs[rows]),
            "labels": torch.from_numpy(annotations.labels[rows]),
            "scores": torch.ones(len(annotations.labels[rows])),
        }
        evaluator.update({image_id: detections})


def test_coco_style_files_have_the_published_format(shared_devkit: Path, tmp_path: Path) -> None:
    """File names and fields are those of Siamese DETR. Boxes are the raw corners, without + 1 or - 1, and difficult
    objects are not crowds.
    """
    convert(shared_devkit, tmp_path / "meta", "2012_trainval", "2007_test")
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == [
        "voc_test2007.cocostyle.json",
        "voc_trainval2012.cocostyle.json",
    ]
    content = json.loads((tmp_path / "meta" / "voc_test2007.cocostyle.json").read_text())
    assert [image["id"] for image in content["images"]] == [201, 202, 203]
    assert set(content["images"][0]) >= {"file_name", "width", "height"}
    assert [(category["id"], category["name"]) for category in content["categories"]] == list(
        enumerate(CLASSES)
    )
    first = content["annotations"][0]
    record = read_xml(str(shared_devkit / "VOC2007/Annotations/000201.xml"))
    name, (x0, y0, x1, y1), difficult = record["objects"][0]
    assert first["bbox"] == [x0 + 1, y0 + 1, x1 - x0 - 1, y1 - y0 - 1]
    assert first["area"] == first["bbox"][2] * first["bbox"][3]
    assert (CLASSES[first["category_id"]], first["difficult"]) == (name, difficult)
    assert (first["iscrowd"], first["id"]) == (0, 1)
    assert any(item["difficult"] for item in content["annotations"])
    content = json.loads((tmp_path / "meta" / "voc_trainval2012.cocostyle.json").read_text())
    assert [image["id"] for image in content["images"]] == [2012000101, 2012000102]

    args = custom_args(
        train_images=shared_devkit / "VOC2012/JPEGImages",
        train_annotations=tmp_path / "meta/voc_trainval2012.cocostyle.json",
        val_images=shared_devkit / "VOC2007/JPEGImages",
        val_annotations=tmp_path / "meta/voc_test2007.cocostyle.json",
    )
    train, val = build_labelled(args)
    assert (len(train), len(val), train.num_classes) == (2, 3, 20)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        convert(shared_devkit, tmp_path / "meta", "2007_test")


# ---------------------------------------------------------------------------------------------------------------- runs


def test_run_from_training_to_evaluation(shared_devkit: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ("--dataset_file", "voc", "--voc_path", shared_devkit)
    with captured_log() as lines:
        fine_tune(*data, "--epochs", 1, "--output_dir", run, *FROZEN)
    (line,) = read_log(run)
    assert len(line["test_coco_eval_bbox"]) == len(line["test_voc_area"]) == 3
    assert line["test_coco_eval_bbox"] == line["test_voc_11point"]
    assert any("AP, AP50 and objects of each class:" in text and "cat" in text for text in lines)
    classes = json.loads((run / "per_class.json").read_text())["classes"]
    assert {row["id"]: row["name"] for row in classes}.items() <= dict(enumerate(CLASSES)).items()
    assert np.mean([row["AP"] for row in classes]) == pytest.approx(line["test_coco_eval_bbox"][0])
    assert "per_class" not in json.loads((run / "metrics.json").read_text())
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    assert checkpoint["class_names"] == dict(enumerate(CLASSES))
    assert "per_class.json" in (run / "result.html").read_text()

    evaluation = ("--eval", "--resume", run / "checkpoint.pth", "--output_dir", tmp_path / "eval")
    fine_tune(*evaluation, "--voc_metric", "area")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["coco_eval_bbox"] == line["test_voc_area"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--voc_metric area",
            "--voc_metric has no effect with --dataset_file coco: omit it or use --dataset_file voc",
        ),
        (
            "--voc_train 2012_trainval",
            "--voc_train has no effect with --dataset_file coco: omit it or use --dataset_file voc or voc_coco",
        ),
        (
            "--dataset_file voc_coco --voc_metric area",
            "--voc_metric has no effect with --dataset_file voc_coco: omit it or use",
        ),
        (
            "--dataset_file custom --voc_val 2012_val",
            "--voc_val has no effect with --dataset_file custom",
        ),
    ],
)
def test_voc_flags_are_refused_for_other_datasets(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_args(FINETUNE, *flags.split())


def test_voc_settings_are_dropped_for_another_dataset(shared_devkit: Path) -> None:
    """A detector of `voc` is evaluated with COCO metrics."""
    stored = voc_args(
        shared_devkit, "--voc_metric", "area", "--voc_train", "2007_trainval"
    ).as_dict()
    given = {"dataset_file": "voc_coco"}
    args = resolve(given, adopt_settings(Checkpoint(model={}, args=stored), given, FINETUNE))
    assert (args.voc_metric, args.voc_train) == ("11point", ["2012_trainval"])
    assert args.num_queries == stored["num_queries"]


def test_proposals_are_evaluated_on_voc(shared_devkit: Path) -> None:
    words = ["--proposals", "random", "--max_prop", "50", "--num_workers", "0"]
    words += ["--dataset_file", "voc", "--voc_path", str(shared_devkit)]
    metrics = evaluate_proposals.main(evaluate_proposals.parse(words))
    assert 0 <= metrics["AR1"] <= metrics["AR1000"] <= 1


def test_dataset_selects_the_evaluator(shared_devkit: Path) -> None:
    args = voc_args(shared_devkit, "--voc_metric", "area", "--reproduce_published")
    evaluator = build_dataset("val", args).evaluator(args)
    assert isinstance(evaluator, VocEvaluator)
    assert (evaluator.metric, evaluator.published) == ("area", True)


def test_boxes_that_count_from_0_are_reported_once(tmp_path: Path) -> None:
    for number, corner in ((1, (0, 0)), (2, (9, -1)), (3, (9, 9))):
        text = voc_xml(f"{number}.jpg", (60, 80), [("cat", [*corner, 30, 20], 0)] * 2)
        (tmp_path / f"{number}.xml").write_text(text)
    split = Split(
        "train",
        ConvertedDetection(str(tmp_path), read_xml_folder(str(tmp_path)), None, num_classes=1),
        9,
        9,
    )
    (finding,) = [one for one in run_checks([split]) if one.kind == "counted from 0"]
    assert str(finding) == f"{tmp_path}, 2 of 6 boxes have xmin or ymin 0, the first is in 2.xml"
    assert KINDS[finding.kind].severity == "warning"

    (tmp_path / "2.xml").unlink()
    assert "counted from 0" not in read_xml_folder(str(tmp_path)).findings
