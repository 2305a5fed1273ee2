"""COCO panoptic data on synthetic images: segments from PNG files, boxes around them, missing and broken files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from datasets import build_dataset, build_labelled, build_loader
from datasets.evaluators.coco import CocoEvaluator
from datasets.evaluators.combined import CombinedEvaluator
from datasets.labelled.checks.startup import run_startup_checks
from datasets.labelled.coco_panoptic import (
    CocoPanoptic,
    boxes_of_masks,
    read_panoptic,
    read_segment_ids,
)
from datasets.sample import BadImageError
from datasets.transforms import Compose, ToSample
from tests.tiny import captured_log, pre_train, tiny_args
from util.box_ops import generalized_box_iou, paired_giou
from util.errors import UserError
from util.settings import FINETUNE

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 120, "name": "grass", "isthing": 0},
]
SIZE_HW = 30, 40
GRASS, PERSON, CAR, CROWD = 5, 300, 70000, 256 * 256 * 9 + 1


def draw_ids(image_id: int) -> np.ndarray:
    """Return the segment ids of an image, int [H, W]: grass below, a person, a car of two parts, and a crowd."""
    ids = np.zeros(SIZE_HW, np.int64)
    ids[20:] = GRASS
    ids[5 : 10 + image_id % 3, 4:9] = PERSON
    ids[12:14, 20:26] = ids[16:18, 30:31] = CAR
    ids[0:3, 36:] = CROWD
    return ids


def segments_of(ids: np.ndarray) -> list[dict]:
    labels = {GRASS: 120, PERSON: 1, CAR: 3, CROWD: 1}
    segments = []
    for segment_id in np.unique(ids[ids > 0]).tolist():
        rows, columns = np.nonzero(ids == segment_id)
        x, y = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": segment_id,
                "category_id": labels[segment_id],
                "iscrowd": int(segment_id == CROWD),
                "bbox": [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y],
                "area": len(rows),
            }
        )
    return segments


def write_png(path: Path, ids: np.ndarray) -> None:
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colors).save(path)


def write_panoptic(
    root: Path, count: int = 4, change: Callable[[dict], None] | None = None
) -> Path:
    """Write images in the published layout: those of COCO, and the panoptic folder next to them."""
    for name in ("train2017", "val2017"):
        (root / "coco" / name).mkdir(parents=True)
        pngs = root / "panoptic" / f"panoptic_{name}"
        pngs.mkdir(parents=True)
        (root / "panoptic" / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for image_id in range(7, 7 + count):
            pixels = np.random.RandomState(image_id).randint(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
            stem = f"{image_id:012d}"
            Image.fromarray(pixels).save(root / "coco" / name / f"{stem}.jpg")
            ids = draw_ids(image_id)
            write_png(pngs / f"{stem}.png", ids)
            images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": 30, "width": 40})
            annotations.append(
                {
                    "image_id": image_id,
                    "file_name": f"{stem}.png",
                    "segments_info": segments_of(ids),
                }
            )
        # Not in the order of the ids.
        data = {"images": images[::-1], "annotations": annotations[1:] + annotations[:1]}
        data["categories"] = CATEGORIES
        data = json.loads(json.dumps(data))
        if change:
            change(data)
        (root / "panoptic" / "annotations" / f"panoptic_{name}.json").write_text(json.dumps(data))
    return root


def panoptic_args(root: Path, *flags: object):
    words = ["--dataset_file", "coco_panoptic", "--coco_path", root / "coco"]
    words += ["--coco_panoptic_path", root / "panoptic", *flags]
    return tiny_args(FINETUNE, *map(str, words))


def plain_dataset(root: Path, *flags: object) -> CocoPanoptic:
    """Return the training images without augmentation."""
    dataset = build_dataset("train", panoptic_args(root, *flags))
    dataset.transforms = Compose([ToSample()])
    return dataset


def boxes_xyxy_abs(target: dict) -> list[list[float]]:
    height, width = SIZE_HW
    cx, cy, w, h = (target["boxes"] * torch.tensor([width, height, width, height])).unbind(1)
    boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
    return boxes.round(decimals=3).tolist()


def test_boxes_and_masks_come_from_the_png(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    dataset = plain_dataset(root, "--masks")
    assert (len(dataset), dataset.num_classes) == (4, 250)
    assert dataset.class_names == {1: "person", 3: "car", 120: "grass"}
    assert dataset.things == {1: True, 3: True, 120: False}
    for i in range(4):
        _, target = dataset[i]
        ids = draw_ids(7 + i)
        listed = segments_of(ids)
        assert target["image_id"].tolist() == [7 + i]
        assert target["labels"].tolist() == [item["category_id"] for item in listed]
        assert target["iscrowd"].tolist() == [0, 0, 0, 1], "crowds are objects, as published"
        assert target["area"].tolist() == [item["area"] for item in listed]
        assert target["masks"].dtype == torch.uint8
        for mask, item in zip(target["masks"], listed, strict=True):
            assert np.array_equal(mask.numpy(), ids == item["id"])
        expected = [item["bbox"] for item in listed]
        assert boxes_xyxy_abs(target) == [[x, y, x + w, y + h] for x, y, w, h in expected]

        found, segments = dataset.segments(i)
        assert np.array_equal(found, ids)
        assert segments == listed == dataset.segments_info_of(7 + i)


def test_boxes_alone(tmp_path: Path) -> None:
    """The first stage trains boxes only: the same ones, and no masks."""
    root = write_panoptic(tmp_path)
    with_masks, without = plain_dataset(root, "--masks")[1][1], plain_dataset(root)[1][1]
    assert set(with_masks) - set(without) == {"masks"}
    assert all(torch.equal(with_masks[key], without[key]) for key in without)


def test_published_boxes_are_one_pixel_short(tmp_path: Path) -> None:
    """A line has a box without area, which must not give NaN."""
    masks = np.zeros((2, 6, 8), bool)
    masks[0, 2:5, 1:4] = masks[1, 3, 2:7] = True
    assert boxes_of_masks(masks).tolist() == [[1, 2, 4, 5], [2, 3, 7, 4]]
    published = boxes_of_masks(masks, published=True)
    assert published.tolist() == [[1, 2, 3, 4], [2, 3, 6, 3]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)
    boxes = torch.tensor([*published.tolist(), [2, 3, 2, 3]])
    assert torch.isfinite(paired_giou(boxes, boxes)).all()
    assert torch.isfinite(generalized_box_iou(boxes, boxes)).all()

    root = write_panoptic(tmp_path)
    _, exact = plain_dataset(root)[0]
    _, short = plain_dataset(root, "--reproduce_published")[0]
    differences = np.array(boxes_xyxy_abs(exact)) - boxes_xyxy_abs(short)
    assert (differences == [0, 0, 1, 1]).all()


def test_any_split_into_things_and_stuff(tmp_path: Path) -> None:
    def change(data: dict) -> None:
        for category, isthing in zip(data["categories"], (0, 1, True), strict=True):
            category["isthing"] = isthing

    root = write_panoptic(tmp_path, change=change)
    dataset = plain_dataset(root)
    assert dataset.things == {1: False, 3: True, 120: True}
    names = {category["name"] for category in dataset.ground_truth["categories"]}
    assert names == {"car", "grass"}


def test_names_of_images_may_be_absent(tmp_path: Path) -> None:
    plain = write_panoptic(tmp_path / "a")
    expected = [plain_dataset(plain)[i][1]["boxes"] for i in range(4)]
    root = write_panoptic(tmp_path / "b", change=lambda data: data.pop("images"))
    dataset = plain_dataset(root)
    assert dataset.path(0).endswith("000000000007.jpg")
    assert all(torch.equal(dataset[i][1]["boxes"], expected[i]) for i in range(4))


def test_segments_without_pixels_are_dropped_and_counted(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    ids = draw_ids(7)
    ids[ids == CAR] = GRASS
    write_png(root / "panoptic" / "panoptic_train2017" / f"{7:012d}.png", ids)
    dataset = plain_dataset(root, "--masks")
    _, target = dataset[0]
    assert target["labels"].tolist() == [120, 1, 1]
    assert target["masks"].shape == (3, *SIZE_HW)
    assert target["dropped_boxes"] == [(dataset.path(0), 1)]
    assert "dropped_boxes" not in dataset[1][1]


def damage(root: Path, kind: str) -> None:
    png = root / "panoptic" / "panoptic_train2017" / f"{7:012d}.png"
    if kind == "other size":
        write_png(png, draw_ids(7)[:20])
    elif kind == "not RGB":
        Image.fromarray(draw_ids(7).astype(np.uint8)).save(png)
    elif kind == "truncated":
        png.write_bytes(png.read_bytes()[:60])
    elif kind == "gone while training":
        png.unlink()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("other size", r"^40 x 30 pixels, but .*000000000007.png has 40 x 20$"),
        ("not RGB", r"000000000007.png is not an RGB image, but of Pillow's mode L$"),
        ("truncated", r"000000000007.png can't be decoded$"),
        ("gone while training", r"000000000007.png does not exist$"),
    ],
)
def test_images_with_unusable_pngs_are_replaced(kind: str, reason: str, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    dataset = plain_dataset(root)
    damage(root, kind)
    with pytest.raises(BadImageError, match=reason):
        dataset.load(0, None)
    _, target = dataset[0]
    assert target["image_id"].tolist() == [8]
    assert len(target["problems"]) == 1


def test_segments_of_a_broken_validation_png_count_as_missed(tmp_path: Path) -> None:
    """The image is skipped, as any broken one, so the evaluation ends with its metrics."""
    root = write_panoptic(tmp_path)
    args = panoptic_args(root, "--masks")
    dataset = build_dataset("val", args)
    evaluator = dataset.evaluator(args).panoptic
    for index in range(1, 4):
        ids, segments = dataset.segments(index)
        shifted = [{**segment, "id": segment["id"] - 1} for segment in segments]
        image_id = int(dataset.annotations.image_ids[index])
        evaluator.update({image_id: {"ids": ids - 1, "segments_info": shifted}})

    (root / "panoptic" / "panoptic_val2017" / f"{7:012d}.png").write_bytes(b"broken")
    with pytest.raises(BadImageError):
        dataset.load(0, None)
    evaluator.synchronize_between_processes()
    rows = evaluator.summarize()["panoptic_per_class"]
    assert [(row["id"], row["segments"]) for row in rows] == [(1, 4), (3, 4), (120, 4)]
    assert all(row["SQ"] == 1 and row["RQ"] == pytest.approx(3 / 3.5) for row in rows)


def test_images_without_png(tmp_path: Path) -> None:
    """Skipped in training with a warning, refused in evaluation, and an error if it is all of them."""

    def change(data: dict) -> None:
        data["annotations"] = [item for item in data["annotations"] if item["image_id"] != 9]

    root = write_panoptic(tmp_path, change=change)
    for name in ("train2017", "val2017"):
        (root / "panoptic" / f"panoptic_{name}" / f"{7:012d}.png").unlink()
    with captured_log() as lines:
        dataset = build_dataset("train", panoptic_args(root))
    assert dataset.annotations.image_ids.tolist() == [8, 10]
    [line] = [line for line in lines if "have no segments" in line]
    assert "2 images of" in line
    assert "image 7, " in line
    assert "000000000007.png does not exist: they are skipped" in line
    with pytest.raises(
        UserError, match="2 images of .* have no segments: image 7, .*add the files"
    ):
        build_dataset("val", panoptic_args(root))
    for png in (root / "panoptic" / "panoptic_train2017").iterdir():
        png.unlink()
    with pytest.raises(UserError, match="none of 4 images of .* has segments: image 7, "):
        build_dataset("train", panoptic_args(root))


def test_annotations_of_unlisted_images_are_findings(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path, change=lambda data: data["images"].pop(0))  # image 10
    dataset = build_dataset("train", panoptic_args(root))
    assert dataset.annotations.image_ids.tolist() == [7, 8, 9]
    ids, _ = dataset.annotations.findings["image not listed"]
    assert set(ids[:, 1].tolist()) == {10}


def first_segment(data: dict) -> dict:
    return data["annotations"][0]["segments_info"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("annotations"), "has no list 'annotations'"),
        (lambda data: data.pop("categories"), "has no list 'categories'"),
        (lambda data: data["categories"][1].pop("isthing"), "category 3 has isthing None"),
        (lambda data: data["annotations"][1].pop("segments_info"), "image 9 needs file_name"),
        (lambda data: data["annotations"][1].pop("image_id"), "image_id 'None' is not an integer"),
        (lambda data: data["annotations"][1].update(image_id=8), "two annotations of image 8"),
        (lambda data: first_segment(data).update(id=0), "segment 0 of image 8: its id must be"),
        (lambda data: first_segment(data).update(id=2**24), "its id must be R"),
        (
            lambda data: first_segment(data).update(id=PERSON),
            "segment 300 of image 8 is listed twice",
        ),
        (lambda data: first_segment(data).update(bbox=[1, 2]), "bbox must be"),
        (lambda data: first_segment(data).update(category_id="1"), "has category_id '1'"),
        (lambda data: data.update(images={}), "'images' must be a list"),
    ],
)
def test_malformed_files(change: Callable[[dict], None], message: str, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path, change=change)
    with pytest.raises(UserError, match=message) as error:
        build_dataset("train", panoptic_args(root))
    assert "\n" not in str(error.value)
    assert "panoptic_train2017.json" in str(error.value)


def test_missing_folders(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    with pytest.raises(UserError, match="--coco_panoptic_path takes one with annotations"):
        build_dataset("train", panoptic_args(root).replace(coco_panoptic_path=None))
    (root / "panoptic" / "annotations" / "panoptic_train2017.json").unlink()
    with pytest.raises(UserError, match="panoptic_train2017.json does not exist"):
        build_dataset("train", panoptic_args(root))


def test_num_classes(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    assert build_dataset("train", panoptic_args(root, "--num_classes", 121)).num_classes == 121
    with pytest.raises(UserError, match="category id 120, but --num_classes is 91"):
        build_dataset("train", panoptic_args(root, "--num_classes", 91))


def test_ground_truth_of_things(tmp_path: Path) -> None:
    """Without instance annotations, the things are the ground truth, with masks from the PNG files."""
    root = write_panoptic(tmp_path)
    args = panoptic_args(root, "--masks")
    dataset = build_dataset("val", args)
    truth = dataset.ground_truth
    assert [category["id"] for category in truth["categories"]] == [1, 3]
    assert len(truth["annotations"]) == 3 * 4
    assert sum(item["iscrowd"] for item in truth["annotations"]) == 4
    for item in truth["annotations"]:
        mask = coco_mask.decode(item["segmentation"])
        assert mask.sum() == item["area"]
        assert coco_mask.toBbox(item["segmentation"]).tolist() == item["bbox"]
    assert isinstance(dataset.evaluator(args), CombinedEvaluator)
    assert isinstance(dataset.evaluator(panoptic_args(root)), CocoEvaluator)
    plain = build_dataset("val", panoptic_args(root)).ground_truth["annotations"]
    assert plain == [
        {key: value for key, value in item.items() if key != "segmentation"}
        for item in truth["annotations"]
    ]


def test_instance_annotations_are_preferred(tmp_path: Path) -> None:
    """As published. Those of other images do not count; a file that lacks images is not used."""
    root = write_panoptic(tmp_path)
    (root / "coco" / "annotations").mkdir()
    file = root / "coco" / "annotations" / "instances_val2017.json"
    box = {"bbox": [1, 2, 5, 6], "category_id": 3, "segmentation": [[1, 2, 6, 2, 6, 8, 1, 8]]}
    data = {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 30, "width": 40} for i in range(5, 15)
        ],
        "annotations": [{"id": i, "image_id": i, **box} for i in range(5, 15)],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}],
    }
    file.write_text(json.dumps(data))
    truth = build_dataset("val", panoptic_args(root, "--masks")).ground_truth
    assert [item["image_id"] for item in truth["annotations"]] == [7, 8, 9, 10]
    assert [image["id"] for image in truth["images"]] == [7, 8, 9, 10]
    assert all(item["segmentation"]["size"] == [30, 40] for item in truth["annotations"])
    data["images"] = data["images"][:4]
    file.write_text(json.dumps(data))
    truth = build_dataset("val", panoptic_args(root)).ground_truth
    assert len(truth["annotations"]) == 12


def test_batches_of_two_workers(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    batches = []
    for workers in (0, 2):
        args = panoptic_args(root, "--masks", "--num_workers", workers, "--batch_size", 2)
        batches.append(list(build_loader(build_dataset("train", args), args, train=True)))
    for (samples, packed), (others, other) in zip(*batches, strict=True):
        assert torch.equal(samples.tensors, others.tensors)
        assert packed.counts["masks"] == packed.counts["boxes"]
        assert all(torch.equal(packed.tensors[key], other.tensors[key]) for key in packed.tensors)


def test_segments_are_arrays(tmp_path: Path) -> None:
    """No Python object is kept per segment."""
    from tests.datasets.images.test_large_data import count_objects

    counts = []
    for images in (4, 40):
        root = write_panoptic(tmp_path / str(images), count=images)
        path = str(root / "panoptic" / "annotations" / "panoptic_train2017.json")
        annotations, segments, _ = read_panoptic(path)
        assert len(segments.ids) == 4 * images
        counts.append(count_objects(annotations) + count_objects(segments))
    assert counts[0] == counts[1]


def test_startup_checks_and_pre_training(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    args = panoptic_args(root)
    with captured_log() as lines:
        run_startup_checks(*build_labelled(args), args)
    assert not [line for line in lines if line.startswith(("crowd", "many crowds", "no panoptic"))]
    flags = ["--pretext", "random_query_patch", "--dataset_file", "coco_panoptic"]
    pre_train(*flags, "--coco_path", root / "coco", "--batch_size", 2, "--dry_run")


def test_ids_are_little_endian_colors(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[1, 2, 3], [255, 255, 255]]], np.uint8)).save(tmp_path / "a.png")
    assert read_segment_ids(str(tmp_path / "a.png")).tolist() == [
        [1 + 2 * 256 + 3 * 65536, 2**24 - 1]
    ]
