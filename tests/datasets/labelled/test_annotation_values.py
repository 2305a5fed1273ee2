"""Values in annotations that other programs write: what is decided, what is reported, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from datasets.collate import collate
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, build_ground_truth
from datasets.images.image_info import ImageInfo
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.startup import run_startup_checks, summarize_annotations
from datasets.labelled.checks.table import KINDS, run_checks
from datasets.labelled.coco_parser import box_around_rotated, parse_coco
from datasets.labelled.voc import read_xml_folder
from tests.tiny import captured_log, custom_dataset_flags, tiny_args, voc_xml
from tools.check_dataset import draw_summary
from util.errors import UserError
from util.runs.meters import BadImages
from util.settings import FINETUNE

NAMES = {1: "red", 2: "green"}
SIZE_WH = (400, 300)


def content(count: int = 8, size_wh: tuple[int, int] | None = SIZE_WH) -> dict:
    """A COCO file of `count` images with a red and a green object each, anywhere in the image."""
    rng = np.random.default_rng(0)
    size = {} if size_wh is None else dict(zip(("width", "height"), size_wh, strict=True))
    images = [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, count + 1)]
    annotations = []
    for image in images:
        for category in NAMES:
            x, y = int(rng.integers(0, 280)), int(rng.integers(0, 220))
            w, h = int(rng.integers(30, 120)), int(rng.integers(30, 80))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def changed(change: Callable[[dict], object], **kwargs) -> dict:
    """Apply `change` to each annotation of `content`."""
    data = content(**kwargs)
    for annotation in data["annotations"]:
        change(annotation)
    return data


def every_second(**values: object) -> dict:
    """Give every second annotation, all of the green objects, these values."""
    return changed(lambda item: item.update(values) if item["id"] % 2 == 0 else None)


def write_dataset(root: Path, data: dict, size_wh: tuple[int, int] = SIZE_WH) -> list[str]:
    """Write images, train.json and val.json, and return the flags of the dataset."""
    for folder in ("photos", "held_out"):
        (root / folder).mkdir(parents=True)
        for image in data["images"]:
            Image.new("RGB", size_wh).save(root / folder / image["file_name"])
    for name in ("train", "val"):
        (root / f"{name}.json").write_text(json.dumps(data))
    return custom_dataset_flags(root)


class Images:
    """A dataset as the checks see it."""

    image_folder = "folder"

    def __init__(self, data: dict) -> None:
        self.annotations = parse_coco(data, "some.json")

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, index: int) -> str:
        return f"folder/{self.annotations.file_names[index]}"


def found(data: dict, name: str = "train", size_wh: tuple[int, int] | None = None) -> dict:
    """Return kind -> findings of the checks that need only the annotations.

    size_wh: of all image files; None if they are not read.
    """
    split = Split(name, Images(data), num_queries=100, num_classes=91)
    if size_wh is not None:
        split.image_infos = [ImageInfo(size_hw=size_wh[::-1])] * len(data["images"])
    findings: dict[str, list] = {}
    for finding in run_checks([split]):
        findings.setdefault(finding.kind, []).append(finding)
    findings.pop("duplicate image", None)  # these files have no pixels
    return findings


def perfect_stats(data: dict, labels: tuple[int, ...] = (1, 2), backend: str = "auto") -> dict:
    """Return the summary for a detector that finds all objects of some classes, as parsed for training."""
    annotations = parse_coco(data, "some.json")
    evaluator = CocoEvaluator(build_ground_truth(data), backend)
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        target = annotations.target(index, SIZE_WH[::-1])
        keep = torch.isin(target["labels"], torch.tensor(labels))
        prediction = {"boxes": target["boxes"][keep], "labels": target["labels"][keep]}
        evaluator.update({image_id: {**prediction, "scores": torch.ones(int(keep.sum()))}})
    return evaluator.summarize()


def test_ordinary_values_are_not_reported() -> None:
    assert found(content()) == {}
    one_crowd = content()
    one_crowd["annotations"][3].update(iscrowd=1)
    assert set(found(one_crowd)) == {"crowd"}
    assert KINDS["crowd"].severity == "info"


# --------------------------------------------------------------------------------------------- crowds, ignored objects


@pytest.mark.parametrize("value", [1, True])
def test_many_crowds_are_reported(value: object) -> None:
    data = every_second(iscrowd=value, segmentation={"counts": [0, 5], "size": [300, 400]})
    findings = found(data)
    assert set(findings) == {"many crowds", "category without boxes"}
    assert len(findings["many crowds"]) == 8
    assert str(findings["many crowds"][0]) == "folder/1.png, image 1, annotation 2"


def test_crowds_that_are_most_of_a_class_are_reported() -> None:
    data = content(30)
    for annotation in data["annotations"][:6:2]:
        annotation.update(category_id=3, iscrowd=1)
    data["categories"].append({"id": 3, "name": "blue"})
    assert len(found(data)["many crowds"]) == 3
    data["annotations"][0].update(iscrowd=0)
    data["annotations"][2].update(iscrowd=0)
    assert set(found(data)) == {"crowd"}, "1 of 3, and 1 of 60 in all"


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_objects_are_not_trained_on_and_not_counted(backend: str) -> None:
    """A detector that does not find them, and one that does, have the same AP."""
    pytest.importorskip(backend)
    data = every_second(ignore=1)
    assert set(parse_coco(data, "file").labels.tolist()) == {1}
    assert len(found(data)["marked ignore"]) == 8
    missed = perfect_stats(data, backend=backend)
    assert missed["stats"][0] == pytest.approx(1)
    assert [row["name"] for row in missed["per_class"]] == ["red"]

    evaluator = CocoEvaluator(build_ground_truth(data), backend)
    plain = parse_coco(content(), "file")
    for index, image_id in enumerate(plain.image_ids.tolist()):
        target = plain.target(index, SIZE_WH[::-1])
        evaluator.update({image_id: {**target, "scores": torch.ones(2)}})
    assert evaluator.summarize()["stats"] == missed["stats"]


def test_ignore_must_be_0_or_1() -> None:
    for value in (False, None, 0):
        assert found(every_second(ignore=value)) == {}
    with pytest.raises(
        UserError, match="annotation 2 of image 1 has ignore '0': it must be 0 or 1"
    ):
        parse_coco(every_second(ignore="0"), "file")


# ------------------------------------------------------------------------------------------------------ area, rotation


@pytest.mark.parametrize(
    "area", [-500, 0, float("nan"), float("inf"), -float("inf"), 400 * 300, 1e11, "12", True]
)
def test_unusable_area_becomes_that_of_the_box(area: object) -> None:
    """Otherwise the green objects would be in no range, or in another one, and AP would be that of the red ones."""
    data = every_second(area=area)
    expected = parse_coco(content(), "file")
    assert parse_coco(data, "file").areas.tolist() == expected.areas.tolist()
    assert set(found(data)) == {"area unusable"}
    assert len(found(data)["area unusable"]) == 8
    assert [a["area"] for a in build_ground_truth(data)["annotations"]] == [
        a["area"] for a in content()["annotations"]
    ]
    assert perfect_stats(data, labels=(1,)) == perfect_stats(content(), labels=(1,))
    assert perfect_stats(data, labels=(1,))["stats"][0] == pytest.approx(0.5)


def test_evaluator_completes_the_content_of_a_file() -> None:
    """The green objects are in no area range, and the detector that misses them must not get AP 1."""
    evaluator = CocoEvaluator(every_second(area=-500))
    for item in content()["annotations"][::2]:
        x, y, w, h = item["bbox"]
        box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32)
        found_red = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.ones(1)}
        evaluator.update({item["image_id"]: found_red})
    assert evaluator.summarize()["stats"][0] == pytest.approx(0.5)


def test_area_of_a_mask_stays() -> None:
    """It is smaller than the box, or a little larger if the box is thin."""
    data = changed(lambda item: item.update(area=0.3 * item["area"]))
    thin = data["annotations"][0]
    thin.update(bbox=[5, 5, 1.2, 3], area=6.5)
    data["annotations"][1].pop("area")
    assert found(data) == {}
    assert parse_coco(data, "file").areas[0] == 6.5
    assert build_ground_truth(data)["annotations"][0]["area"] == 6.5


def test_box_around_a_rotated_rectangle() -> None:
    boxes = np.array([[10.0, 20, 40, 20]] * 6)
    degrees = np.array([0.0, 180, 90, -90, 45, 405])
    around = box_around_rotated(boxes, degrees)
    assert around[:2].tolist() == boxes[:2].tolist()
    np.testing.assert_allclose(around[2:4], [[20, 10, 20, 40]] * 2)
    side = 60 / np.sqrt(2)
    np.testing.assert_allclose(around[4:], [[30 - side / 2, 30 - side / 2, side, side]] * 2)


def test_rotated_boxes_of_cvat(tmp_path: Path) -> None:
    data = content()
    for annotation in data["annotations"]:
        annotation["attributes"] = {"occluded": False, "rotation": 0.0}
    assert found(data) == {}
    data["annotations"][0].update(bbox=[100, 100, 60, 20], area=1200)
    data["annotations"][0]["attributes"]["rotation"] = 90.0
    findings = found(data)
    assert list(map(str, findings.pop("rotated box"))) == ["folder/1.png, image 1, annotation 1"]
    assert findings == {}
    box = parse_coco(data, "file").boxes_xyxy_abs[0]
    np.testing.assert_allclose(box, [120, 80, 140, 140])
    in_evaluation = build_ground_truth(data)["annotations"][0]
    np.testing.assert_allclose(in_evaluation["bbox"], [120, 80, 20, 60])
    assert in_evaluation["area"] == 1200
    assert perfect_stats(data)["stats"][0] == pytest.approx(1)

    xml = voc_xml("1.png", (300, 400), [("red", [100, 100, 60, 20], 0)])
    angle = (
        "<attributes><attribute><name>occluded</name><value>0</value></attribute>"
        "<attribute><name>rotation</name><value>90.0</value></attribute></attributes></object>"
    )
    (tmp_path / "1.xml").write_text(xml.replace("</object>", angle))
    from_xml = read_xml_folder(str(tmp_path))
    np.testing.assert_allclose(from_xml.boxes_xyxy_abs, [box])
    assert list(from_xml.findings) == ["rotated box"]


# ---------------------------------------------------------------------------------------------------- sizes and formats


def to_fractions(item: dict) -> None:
    x, y, w, h = item["bbox"]
    item.update(bbox=[x / 400, y / 300, w / 400, h / 300], area=None)


def to_fractions_of_corners(item: dict) -> None:
    to_fractions(item)
    x, y, w, h = item["bbox"]
    item.update(bbox=[x, y, x + w, y + h])


def to_fractions_of_centers(item: dict) -> None:
    to_fractions(item)
    x, y, w, h = item["bbox"]
    item.update(bbox=[x + w / 2, y + h / 2, w, h])


def to_percent(item: dict) -> None:
    to_fractions(item)
    item.update(bbox=[100 * value for value in item["bbox"]])


def to_corners(item: dict) -> None:
    x, y, w, h = item["bbox"]
    item.update(bbox=[x, y, x + w, y + h])


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("change", "kind", "count"),
    [
        (to_fractions, "box in fractions", 16),
        (to_fractions_of_corners, "box in fractions", 16),
        (to_fractions_of_centers, "box in fractions", 16),
        (to_percent, "boxes in percent", 1),
        (to_corners, "boxes as corners", 1),
    ],
)
def test_other_box_formats_are_reported(
    change: Callable[[dict], None], kind: str, count: int, listed: bool
) -> None:
    """Also if the annotations list no image sizes, and those of the files are known."""
    data = changed(change, size_wh=SIZE_WH if listed else None)
    findings = found(data, size_wh=SIZE_WH)
    assert len(findings[kind]) == count
    assert set(findings) <= {kind, "size not listed", "box partly outside", "box twice"}
    assert KINDS[kind].severity == "problem"


def test_corners_in_one_part_of_the_image_are_known_by_their_area() -> None:
    """As [x, y, width, height], none of them exceeds the image."""
    data = content()
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation.update(bbox=[x // 8, y // 8, x // 8 + w, y // 8 + h])
    assert "boxes as corners" in found(data)
    for annotation in data["annotations"]:
        del annotation["area"]
    assert found(data) == {}, "may also be large objects"


def test_percent_beside_small_images() -> None:
    data = changed(to_percent)
    data["images"][0].update(width=150, height=120)
    assert "14 of them in images of at least 400 x 300" in str(found(data)["boxes in percent"][0])


def test_corners_in_one_class() -> None:
    """As in a file that was merged from those of two programs."""
    data = changed(lambda item: to_corners(item) if item["category_id"] == 2 else None, count=12)
    count = sum(item["category_id"] == 2 for item in data["annotations"])
    (finding,) = found(data)["boxes as corners"]
    assert f"{count} boxes, such as folder/1.png, image 1, annotation 2" in str(finding)


def test_large_objects_in_the_middle_are_ordinary() -> None:
    data = changed(lambda item: item.update(bbox=[40 + item["id"], 30, 300, 240], area=50_000))
    assert found(data) == {}


def test_boxes_outside_files_without_listed_size() -> None:
    data = changed(lambda item: item.update(bbox=[3 * value for value in item["bbox"]], area=None))
    for image in data["images"]:
        image.update(width=0, height=0)
    assert set(found(data)) == {"size not listed"}, "nothing is known of files that can't be read"
    findings = found(data, size_wh=SIZE_WH)
    assert len(findings["box outside file"]) > 6
    assert "the file has 400 x 300 pixels" in str(findings["box outside file"][0])
    assert len(findings["box partly outside"]) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_fractions, "all 16 boxes look like fractions, the first is .*1.png, image 1"),
        (
            lambda item: item.update(bbox=[500 + item["id"], 400, 10, 10]),
            "16 of 16 boxes that were tried are outside the pixels of their image files, the first: .* 400 x 300",
        ),
    ],
)
def test_training_set_without_any_box_in_its_images_is_refused(
    change: Callable[[dict], None], message: str, tmp_path: Path
) -> None:
    data = changed(change, size_wh=None)
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, data))
    train, val = (build_dataset(name, args) for name in ("train", "val"))
    with pytest.raises(UserError, match=message) as error:
        run_startup_checks(train, val, args)
    assert str(error.value).startswith(f"{tmp_path / 'train.json'}: ")
    assert "\n" not in str(error.value)
    with captured_log() as lines:
        run_startup_checks(None, val, args)
    assert any(re.match("box (in fractions|outside file): 16 ", line) for line in lines)


def test_startup_reads_only_some_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.labelled.checks.split.SAMPLED_SIZES", 3)
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, content(size_wh=None)))
    split = Split("train", build_dataset("train", args))
    assert split.sizes_hw.all(1).sum() == 3
    assert split.sizes_hw[0].tolist() == [300, 400]


def test_boxes_that_loading_drops_are_counted(tmp_path: Path) -> None:
    data = content(2, size_wh=None)
    data["annotations"][2].update(bbox=[900, 5, 9, 9])
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, data))
    dataset = build_dataset("train", args)
    _, packed = collate([dataset[0], dataset[1]])
    path = str(tmp_path / "photos" / "2.png")
    assert packed.to("cpu").dropped_boxes == [(path, 1)]
    counter = BadImages()
    with captured_log() as lines:
        for _ in range(2):
            counter.add_dropped_boxes(packed.dropped_boxes)
            counter.warn_of_dropped_boxes()
    assert lines == [
        "objects skipped: 1 in 1 images (boxes outside an image without a listed size, or segments that the PNG "
        f"lacks), the first image is {path}"
    ]


def test_plots_of_tiny_boxes(tmp_path: Path) -> None:
    images = Images(changed(to_fractions))
    images.annotations.boxes_xyxy_abs *= np.float32(0.01)
    split = Split("train", images, image_infos=[ImageInfo(size_hw=(300, 400))] * 8)
    draw_summary([split], tmp_path / "plots.png")
    assert (tmp_path / "plots.png").stat().st_size > 0


# ------------------------------------------------------------------------------------------- categories, odd JSON types


@pytest.mark.parametrize("entry", [{}, {"name": None}])
def test_category_without_name_is_called_by_its_id(entry: dict) -> None:
    data = content()
    data["categories"] = [{"id": key, **entry} for key in NAMES]
    assert parse_coco(data, "some.json").class_names == {1: "1", 2: "2"}
    assert [category["name"] for category in build_ground_truth(data)["categories"]] == ["1", "2"]


def test_category_without_boxes_is_named(tmp_path: Path) -> None:
    """Roboflow lists the parent category."""
    data = content()
    data["categories"].insert(0, {"id": 0, "name": "objects", "supercategory": "none"})
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, data))
    with captured_log() as lines:
        dataset = build_dataset("train", args)
    assert any(line.endswith("3 classes, 1 of them without boxes (objects)") for line in lines)
    assert dataset.num_classes == 3
    (finding,) = found(data)["category without boxes"]
    assert str(finding) == "some.json, 'objects'"
    assert KINDS[finding.kind].severity == "info"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bbox": ["1", "2", "3", "4"]},
            "has bbox .'1', .*: it must be .*, numbers without quotes",
        ),
        ({"bbox": [True, 2, 3, 4]}, r"has bbox \[True, 2, 3, 4\]: it must be"),
        ({"category_id": True}, "category_id of .* is True: it must be an integer"),
        ({"iscrowd": float("nan")}, "has iscrowd nan: it must be 0 or 1"),
    ],
)
def test_values_of_another_type_raise_a_one_line_error(change: dict, message: str) -> None:
    data = content()
    data["annotations"][0].update(change)
    with pytest.raises(UserError, match=message) as error:
        parse_coco(data, "some.json")
    assert str(error.value).startswith("some.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [{"width": True}, {"height": "300"}])
def test_image_size_of_another_type_raises(size: dict) -> None:
    data = content()
    data["images"][0].update(size)
    with pytest.raises(UserError, match="image 1 has .*: it must be in pixels, a number without"):
        parse_coco(data, "some.json")


def test_findings_are_recorded_with_the_run() -> None:
    annotations = parse_coco(every_second(ignore=1), "file")
    assert summarize_annotations(annotations)["found"] == {"marked ignore": 8}


# ------------------------------------------------------------------------------------- boxes that do not fit in images


def to_thousandths(item: dict) -> None:
    """As models of language and vision write boxes."""
    x, y, w, h = item["bbox"]
    item.update(bbox=[x * 1000 / 400, y * 1000 / 300, w * 1000 / 400, h * 1000 / 300], area=None)


@pytest.mark.parametrize("evaluates", [False, True])
def test_file_most_of_whose_boxes_are_skipped_is_refused(evaluates: bool, tmp_path: Path) -> None:
    """Training on the few others, or AP on them, would mean nothing. A subset may look better than the file."""
    data = changed(to_thousandths, count=12)
    skipped = 24 - len(parse_coco(data, "file").labels)
    assert 12 < skipped < 22
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, data), "--filter_pct", "0.5")
    train, val = (build_dataset(name, args) for name in ("train", "val"))
    with pytest.raises(UserError) as error:
        run_startup_checks(None if evaluates else train, val, args)
    name = "val" if evaluates else "train"
    assert str(error.value).startswith(
        f"{tmp_path / name}.json: {skipped} of 24 boxes are outside their image or have no area, the first: "
    )
    assert re.search(
        r"\d+\.png, image \d+, annotation \d+, bbox \[.*\] in 400 x 300 pixels; bbox must be",
        str(error.value),
    )
    assert "0..1000" in str(error.value)


def test_file_with_few_boxes_is_only_warned_of(tmp_path: Path) -> None:
    data = content(2)
    data["annotations"] = data["annotations"][:3]
    for annotation in data["annotations"][:2]:
        annotation.update(bbox=[900, 900, 9, 9])
    args = tiny_args(FINETUNE, *write_dataset(tmp_path, data))
    train = build_dataset("train", args)
    with captured_log():
        run_startup_checks(train, None, args)


def test_xml_files_with_width_and_height_as_corners_are_refused(tmp_path: Path) -> None:
    """<xmax> and <ymax> are smaller than <xmin> and <ymin> in most of them."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "xml").mkdir()
    for image in content(12)["images"]:
        Image.new("RGB", SIZE_WH).save(tmp_path / "photos" / image["file_name"])
    for image in content(12)["images"]:
        objects = [
            (
                NAMES[item["category_id"]],
                [bbox[0], bbox[1], bbox[2] - bbox[0], bbox[3] - bbox[1]],
                0,
            )
            for item in content(12)["annotations"]
            if item["image_id"] == image["id"]
            for bbox in [item["bbox"]]
        ]
        text = voc_xml(image["file_name"], SIZE_WH[::-1], objects)
        (tmp_path / "xml" / f"{image['id']}.xml").write_text(text)
    words = [f"--{name}_{kind}" for name in ("train", "val") for kind in ("images", "annotations")]
    paths = [str(tmp_path / "photos"), str(tmp_path / "xml")] * 2
    flags = [word for pair in zip(words, paths, strict=True) for word in pair]
    args = tiny_args(FINETUNE, "--dataset_file", "custom", *flags)
    train = build_dataset("train", args)
    count = 24 - len(train.annotations.labels)
    with pytest.raises(
        UserError, match=rf"xml: {count} of 24 boxes .*bndbox \[.*<bndbox> must"
    ) as error:
        run_startup_checks(train, None, args)
    assert (
        f"{count} of {count} boxes that exceed their image or have no area fit as x, y, width, height"
        in str(error.value)
    )


def to_pixel_centers(item: dict) -> None:
    x, y, w, h = item["bbox"]
    item.update(bbox=[x + w / 2, y + h / 2, w, h])


def to_swapped_axes(item: dict) -> None:
    x, y, w, h = item["bbox"]
    item.update(bbox=[y, x, h, w])


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (to_corners, "fit as corners [x0, y0, x1, y1], such as folder/"),
        (to_pixel_centers, "fit as centers [cx, cy, width, height] in pixels, such as folder/"),
        (to_swapped_axes, "fit as [y, x, height, width], x and y swapped, such as folder/"),
    ],
)
def test_format_of_some_boxes_is_guessed_from_those_that_exceed_their_image(
    change: Callable[[dict], None], name: str, listed: bool
) -> None:
    """In a quarter of the images. Objects that end at the border of the image show centers best."""
    data = changed(
        lambda item: change(item) if item["image_id"] % 4 == 0 else None,
        count=120,
        size_wh=SIZE_WH if listed else None,
    )
    findings = found(data, size_wh=SIZE_WH)
    (finding,) = findings.pop("boxes in another format")
    assert name in str(finding)
    exceeding = findings.keys() - {"size not listed"}
    assert exceeding <= {"box partly outside", "box outside image", "box outside file"}


def test_boxes_that_exceed_their_image_a_little_or_everywhere_are_in_no_other_format() -> None:
    def beyond_the_border(item: dict, pixels: int) -> None:
        x, y, w, h = item["bbox"]
        item.update(bbox=[400 + pixels - w, y, w, h])

    def around_the_border(item: dict) -> None:
        x, y, w, h = item["bbox"]
        item.update(bbox=[-w / 4 if item["id"] % 2 else 400 - w * 3 / 4, y, w, h])

    for change in (lambda item: beyond_the_border(item, 4), around_the_border):
        assert set(found(changed(change, count=20))) == {"box partly outside"}


def test_guess_of_a_format_needs_five_boxes() -> None:
    data = content(20)
    for annotation in data["annotations"][:4]:
        annotation.update(bbox=[200, 150, 390, 290])
    assert set(found(data)) == {"box partly outside"}
    data["annotations"][4].update(bbox=[200, 150, 390, 290])
    assert set(found(data)) == {"box partly outside", "boxes in another format"}
