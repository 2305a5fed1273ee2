"""Masks of COCO files: kept as text, decoded as pycocotools does, broken and missing ones, ground truth with RLE."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import build_dataset, build_labelled, build_loader
from datasets.evaluators.coco import build_ground_truth
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.checks.startup import run_startup_checks
from datasets.labelled.coco import CocoDetection
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.segmentations import (
    SegmentationError,
    SegmentationTexts,
    decode_counts,
    decode_mask,
    find_empty,
    pairs_text,
)
from datasets.sample import BadImageError
from datasets.transforms import Compose, ToSample
from tests.datasets.images.test_large_data import count_objects
from tests.datasets.labelled.test_coco import content, record, write_coco
from tests.tiny import (
    SHIPS_HW,
    captured_log,
    custom_dataset_flags,
    rle_encode,
    tiny_args,
    write_airbus,
    write_custom_dataset,
    write_few_shot_files,
    write_voc,
)
from tests.tiny import write_coco as write_tiny_coco
from util.errors import UserError
from util.masks import encode_mask
from util.settings import FINETUNE

SIZE_HW = 30, 40  # of the images of `write_coco`
TRIANGLE = [2.0, 3.0, 20.0, 3.0, 20.0, 25.0]
SQUARE = [25, 5, 35, 5, 35, 15, 25, 15]


def blob(seed: int, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """Return a random mask of several runs, uint8."""
    return (np.random.RandomState(seed).rand(*size_hw) < 0.4).astype(np.uint8)


def compressed(mask: np.ndarray) -> dict:
    rle = encode_mask(mask)
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict:
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


# Image 10 has a polygon, two parts and both kinds of RLE; image 11 a crowd and an object; image 12 nothing.
OBJECTS = [
    record(1, 10, [2, 3, 18, 22], segmentation=[TRIANGLE]),
    record(2, 10, [2, 3, 33, 22], segmentation=[TRIANGLE, SQUARE, [1, 2, 3, 4]]),
    record(3, 10, [0, 0, 40, 30], segmentation=compressed(blob(1))),
    record(4, 10, [0, 0, 40, 30], segmentation=uncompressed(blob(2))),
    record(5, 11, [0, 0, 40, 30], segmentation=uncompressed(blob(3)), iscrowd=1),
    record(6, 11, [25, 5, 10, 10], segmentation=[SQUARE], category_id=90),
]


def write_splits(root: Path, data: dict) -> Path:
    for name in ("train2017", "val2017"):
        write_coco(root, data, name, name)
    return root


def mask_args(root: Path, *flags: object):
    words = ("--masks", "--coco_path", root, "--seed", 3, *flags)
    return tiny_args(FINETUNE, *map(str, words))


def raw_dataset(root: Path, name: str = "train2017") -> CocoDetection:
    """Return the training images without augmentation."""
    dataset = build_dataset("train", mask_args(root))
    dataset.transforms = Compose([ToSample()])
    return dataset


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "value",
    [
        [],
        [[]],
        [[1.5, 2, 3e-5, -4], [7, 8]],
        {"counts": [3, 4], "size": [5, 6]},
        {"size": [5, 6], "counts": "0`oMN1"},
        {"counts": 'ab]"segmentation": [9]'},
        {"counts": "a}b{"},
        [{"counts": [1], "size": [1, 1]}],
        [[1, 2], {"a": 1}],
        None,
        7,
        True,
        "segmentation",
    ],
)
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"separators": (",", ":")}])
def test_texts_are_the_values_of_the_file(value: object, form: dict, tmp_path: Path) -> None:
    """Whatever the regular expression matches, and also in files that it can't read at all."""
    objects = [record(i, 10, [1, 1, 5, 5], segmentation=value) for i in range(3)]
    objects[1]["segmentation"] = [TRIANGLE]
    data = content(objects)
    data["categories"][0]["name"] = '"segmentation": [1, 2]'
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(json.dumps(data, **form), encoding=encoding)
        texts = SegmentationTexts()
        read = read_json(str(path), texts)
        found = [texts.text(item.get("segmentation")) for item in read["annotations"]]
        assert [None if text is None else json.loads(text) for text in found] == [
            value,
            [TRIANGLE],
            value,
        ]
        parsed = parse_coco(read, "made", texts)
        found = parsed.texts_of(np.arange(3))
        assert json.loads(found[1]) == [TRIANGLE]
        assert parsed.class_names[1] == '"segmentation": [1, 2]'


def test_error_position_is_that_in_the_file(tmp_path: Path) -> None:
    text = json.dumps(content(OBJECTS))[:-1] + ", oops}"
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=rf"not valid JSON .*char {text.index('oops')}\)"):
        read_json(str(tmp_path / "bad.json"), SegmentationTexts())


def many_polygons(images: int) -> str:
    """Return a file with seven polygons in each image, as text."""
    rng = np.random.RandomState(0)
    objects = []
    for i in range(7 * images):
        points = rng.randint(0, 60, 40).tolist()
        objects.append(
            {
                "id": i,
                "image_id": i // 7,
                "category_id": 1,
                "bbox": [1, 2, 30, 20],
                "segmentation": [points],
            }
        )
    names = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 60, "width": 60} for i in range(images)
    ]
    return json.dumps(
        {"images": names, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    )


def test_no_object_is_kept_per_polygon(tmp_path: Path) -> None:
    """More than 20 000 objects are a few arrays, which dataloader workers share."""
    path = tmp_path / "large.json"
    path.write_text(many_polygons(3000))
    texts = SegmentationTexts()
    annotations = parse_coco(read_json(str(path), texts), str(path), texts)
    assert len(annotations.labels) == 21000
    assert annotations.segmentations.dtype == np.int64
    assert annotations.segmentations.shape == (21000,)
    assert isinstance(annotations.segmentation_texts, PackedStrings)
    data, ends = annotations.segmentation_texts.arrays()
    assert (data.dtype, ends.dtype) == (np.uint8, np.int64)
    # Attributes that hold one Python object per image or polygon would show here.
    small = tmp_path / "small.json"
    small.write_text(many_polygons(30))
    few_texts = SegmentationTexts()
    few = parse_coco(read_json(str(small), few_texts), str(small), few_texts)
    before = count_objects(annotations)
    assert before == count_objects(few)
    for index in range(200):  # an epoch leaves nothing behind
        assert len(annotations.target(index, (60, 60))["masks"]) == 7
    assert count_objects(annotations) == before


def test_without_masks_nothing_is_kept(tmp_path: Path) -> None:
    root = write_splits(tmp_path, content(OBJECTS))
    dataset = build_dataset("val", mask_args(root).replace(masks=False))
    assert dataset.annotations.segmentations is None
    assert "masks" not in dataset[0][1]
    assert not any("segmentation" in item for item in dataset.ground_truth["annotations"])


# ------------------------------------------------------------------------------------------------------ decoding


def test_masks_equal_those_of_pycocotools(tmp_path: Path) -> None:
    root = write_splits(tmp_path, content(OBJECTS))
    dataset = raw_dataset(root)
    coco = COCO()
    coco.dataset = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    # pycocotools takes four numbers for a box.
    coco.dataset["annotations"][1]["segmentation"].pop()
    coco.createIndex()

    _, target = dataset[0]
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].shape == (4, *SIZE_HW)
    for i, mask in enumerate(target["masks"]):
        expected = coco.annToMask(coco.anns[i + 1])
        assert expected.any()
        assert np.array_equal(mask.numpy(), expected)
    assert np.array_equal(target["masks"][2].numpy(), blob(1))
    assert np.array_equal(target["masks"][3].numpy(), blob(2))
    assert dataset[1][1]["masks"].shape == (1, *SIZE_HW), "the crowd is no object"
    assert dataset[1][1]["labels"].tolist() == [90]
    assert dataset[2][1]["masks"].shape == (0, *SIZE_HW)


def test_compressed_rle_is_checked() -> None:
    """pycocotools checks nothing: damaged RLE makes it read foreign memory."""
    rng = np.random.RandomState(0)
    for _ in range(30):
        size = int(rng.randint(1, 300)), int(rng.randint(1, 300))
        mask = (rng.rand(*size) < rng.rand() ** 3).astype(np.uint8)
        text = compressed(mask)["counts"]
        assert decode_counts(text).tolist() == uncompressed(mask)["counts"]
        assert np.array_equal(decode_mask(json.dumps(compressed(mask)), size), mask)
        for broken in (text[:-1], text + "1", text + "é", "\x01" + text, "p" + text, "o" * 20):
            with pytest.raises(SegmentationError):
                decode_mask(json.dumps({"size": list(size), "counts": broken}), size)


BROKEN = [
    {"size": [40, 30], "counts": compressed(blob(1).T)["counts"]},
    {"size": [30, 40], "counts": [5, 6]},
    {"size": [30, 40], "counts": [1300, -100]},
    {"size": [30, 40], "counts": ["1", "1199"]},
    {"size": [30, 40], "counts": [2**70]},
    {"size": [30, 40], "counts": ""},
    {"size": [30, 40], "counts": None},
    {"counts": [1200]},
    {},
    "polygon",
    17,
    [[1, 2, 3, 4, 5, 6, 7]],
    [[1, 2, 3, 4, 5, "6"]],
    [[1, 2, 3, 4, 5, None]],
    [[[1, 2], [3, 4], [5, 6]]],
    [{"x": 1}],
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, 1e9]],
    [[1, 2, 3, 4, 5, 10**30]],
]


@pytest.mark.parametrize("value", BROKEN, ids=lambda value: json.dumps(value)[:40])
def test_broken_segmentations(value: object, tmp_path: Path) -> None:
    """The image is replaced and reported with the annotation. In evaluation, the box is the mask."""
    objects = [*OBJECTS, record(77, 11, [1, 2, 3, 4], segmentation=value)]
    root = write_splits(tmp_path, content(objects))
    dataset = raw_dataset(root)
    with pytest.raises(BadImageError, match=r"^annotation 77: .*\(image 11 in "):
        dataset.load(1, None)
    _, target = dataset[1]
    assert target["image_id"].tolist() == [12]
    [(path, reason)] = target["problems"]
    assert path.endswith("11.png")
    assert reason.startswith("annotation 77: ")
    assert "\n" not in reason

    with captured_log() as lines:
        val = build_dataset("val", mask_args(root))
    assert any(
        "1 segmentations can't be decoded" in line and "annotation 77" in line for line in lines
    )
    rle = val.ground_truth["annotations"][-1]["segmentation"]
    assert coco_mask.toBbox(rle).tolist() == [1, 2, 3, 4]


MISSING = [None, [], [[]], [[1, 2, 3, 4]], [[1, 2], [3, 4, 5, 6]], [[1, 2, 3]], "absent"]


@pytest.mark.parametrize("value", MISSING, ids=str)
def test_objects_without_segmentation(value: object, tmp_path: Path) -> None:
    """Their whole box is the mask, in training and in evaluation, and this is a finding."""
    extra = record(77, 11, [3.5, 4, 8, 6.2], segmentation=value)
    if value == "absent":
        del extra["segmentation"]
    root = write_splits(tmp_path, content([*OBJECTS, extra, {**extra, "id": 78}]))
    _, target = raw_dataset(root)[1]
    expected = np.zeros(SIZE_HW, np.uint8)
    expected[4:11, 3:12] = 1
    assert np.array_equal(target["masks"][1].numpy(), expected)

    args = mask_args(root)
    train, val = build_labelled(args)
    rle = val.ground_truth["annotations"][-1]["segmentation"]
    assert rle["size"] == [30, 40]
    assert np.array_equal(coco_mask.decode(rle), expected)
    with captured_log() as lines:
        run_startup_checks(train, None, args)
    [line] = [line for line in lines if line.startswith("no segmentation: ")]
    assert line.startswith("no segmentation: 2 (with --masks, the whole box of such an object")
    assert "annotation 77" in line
    without = build_dataset("train", args.replace(masks=False))
    assert "no segmentation" not in without.annotations.findings


def test_longer_text_without_polygons_is_found_when_it_is_loaded() -> None:
    text = json.dumps([[1, 2, 3, 4]] * 40)
    texts = PackedStrings([text, "[[1,2,3,4],[1,2,3,4]]", "[[1,2,3,4],[1,2,3,4,5,6]]"])
    assert find_empty(texts, np.array([2, 1, 0, -1])).tolist() == [False, True, False, True]
    assert decode_mask(text, SIZE_HW) is None


def test_flat_polygon() -> None:
    """Some programs omit the outer list of a single polygon."""
    assert np.array_equal(
        decode_mask(json.dumps(SQUARE), SIZE_HW), decode_mask(json.dumps([SQUARE]), SIZE_HW)
    )


def test_file_without_any_segmentation(tmp_path: Path) -> None:
    root = write_splits(
        tmp_path, content([record(1, 10, [1, 2, 3, 4]), record(2, 10, [1, 2, 3, 4])])
    )
    for image_set in ("train", "val"):
        with pytest.raises(
            UserError, match="--masks: none of the 2 objects of .* has a segmentation"
        ) as error:
            build_dataset(image_set, mask_args(root))
        assert "\n" not in str(error.value)


def test_sizes_of_files_are_used_where_none_is_listed(tmp_path: Path) -> None:
    data = content(OBJECTS)
    for image in data["images"]:
        del image["width"], image["height"]
    root = write_splits(tmp_path, data)
    assert raw_dataset(root)[0][1]["masks"].shape == (4, *SIZE_HW)
    truth = build_dataset("val", mask_args(root)).ground_truth
    assert all(item["segmentation"]["size"] == [30, 40] for item in truth["annotations"])


def test_ground_truth_has_the_masks_of_the_file(tmp_path: Path) -> None:
    """Crowds, too. The RLE can be serialized."""
    root = write_splits(tmp_path, content(OBJECTS))
    truth = build_dataset("val", mask_args(root)).ground_truth["annotations"]
    assert [item["iscrowd"] for item in truth] == [0, 0, 0, 0, 1, 0]
    json.dumps(truth)
    masks = [coco_mask.decode(item["segmentation"]) for item in truth]
    assert np.array_equal(masks[2], blob(1))
    assert np.array_equal(masks[4], blob(3))
    plain = build_ground_truth(content(OBJECTS))["annotations"]
    assert [{**item, "segmentation": 0} for item in truth] == [
        {**item, "segmentation": 0} for item in plain
    ]


# -------------------------------------------------------------------------------- rows stay with their segmentation


def numbered_masks(annotations: Annotations) -> dict[int, bytes]:
    """Return annotation id -> its mask."""
    found = {}
    for index in range(len(annotations)):
        masks = annotations.target(index, SIZE_HW)["masks"]
        first = annotations.offsets[index]
        for i, mask in enumerate(masks):
            found[int(annotations.ids[first + i])] = mask.numpy().tobytes()
    return found


def test_selected_rows_keep_their_masks() -> None:
    rng = np.random.RandomState(0)
    objects = [
        record(i, 10 + rng.randint(6), [1, 1, 5, 5], segmentation=compressed(blob(i)))
        for i in range(40)
    ]
    del objects[7]["segmentation"]
    data = content(objects, images=6)
    texts = SegmentationTexts()
    whole = parse_coco(data, "made", texts)
    expected = numbered_masks(whole)
    assert len(set(expected.values())) == 40
    part = whole.select(np.array([4, 1]))
    found = numbered_masks(part)
    assert 0 < len(found) < 40
    assert all(expected[key] == mask for key, mask in found.items())
    assert part.fingerprint() != whole.select(np.array([1, 4])).fingerprint()


def with_masks(root: Path) -> Path:
    """Give the objects of `tests.tiny.write_coco` polygons: the upper left half of each box."""
    for path in root.rglob("*.json"):
        data = json.loads(path.read_text())
        for item in data["annotations"]:
            x, y, w, h = item["bbox"]
            item["segmentation"] = [[x, y, x + w, y, x, y + h]]
        path.write_text(json.dumps(data))
    return root


@pytest.mark.parametrize("from_file", [False, True])
def test_few_shot_objects_keep_their_masks(from_file: bool, tmp_path: Path) -> None:
    root = with_masks(write_tiny_coco(tmp_path / "coco", train=12, val=2))
    files = write_few_shot_files(root, tmp_path / "shots", shots=(2,))
    flags = ["--few_shot", "all", "--shots", 2, "--novel_classes", "red"]
    if from_file:
        flags += ["--few_shot_file", files]
    dataset = build_dataset("train", mask_args(root, *flags))
    dataset.transforms = Compose([ToSample()])
    count = 0
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert len(target["masks"]) == len(target["boxes"]) > 0
        count += len(target["boxes"])
        _check_half_boxes(target, tuple(image.shape[1:]))
    assert count == 6


def _check_half_boxes(target: dict, size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    for mask, (cx, cy, w, h) in zip(target["masks"], target["boxes"].tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        x0, y0 = (cx - w / 2) * width, (cy - h / 2) * height
        assert abs(columns.min() - x0) <= 1
        assert abs(rows.min() - y0) <= 1
        assert mask.sum() == pytest.approx(w * width * h * height / 2, rel=0.25)


def test_custom_dataset_with_masks(tmp_path: Path) -> None:
    root = with_masks(write_custom_dataset(tmp_path))
    train, val = build_labelled(tiny_args(FINETUNE, "--masks", *custom_dataset_flags(root)))
    for dataset in (train, val):
        for i in range(len(dataset)):
            image, target = dataset[i]
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
    assert all("segmentation" in item for item in val.ground_truth["annotations"])
    assert "masks" not in build_labelled(tiny_args(FINETUNE, *custom_dataset_flags(root)))[0][0][1]


def test_airbus_ships_have_masks(tmp_path: Path) -> None:
    root = write_airbus(tmp_path / "airbus", images=30)
    flags = ("--dataset_file", "airbus_ship", "--airbus_path", str(root), "--masks")
    train, val = build_labelled(tiny_args(FINETUNE, *flags))
    train.transforms = Compose([ToSample()])
    for i in range(len(train)):
        _, target = train[i]
        assert target["masks"].shape == (len(target["boxes"]), *SHIPS_HW)
        for mask, area in zip(target["masks"], target["area"].tolist(), strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert mask.sum() == area
            assert (rows.max(), columns.max()) in ((29, 24), (29, 54))
    truth = val.ground_truth["annotations"]
    assert [coco_mask.area(item["segmentation"]) for item in truth] == [
        item["area"] for item in truth
    ]
    mask = blob(5)
    assert np.array_equal(decode_mask(pairs_text(rle_encode(mask.astype(bool))), SIZE_HW), mask)


def test_boxes_only(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc")
    for name in ("voc", "voc_coco"):
        args = tiny_args(FINETUNE, "--dataset_file", name, "--voc_path", str(root), "--masks")
        with pytest.raises(UserError, match="^--masks: VOC's XML files have boxes only; "):
            build_dataset("train", args)
    folder = root / "VOC2007"
    flags = custom_dataset_flags(
        root, train_images=folder / "JPEGImages", train_annotations=folder / "Annotations"
    )
    with pytest.raises(UserError, match="^--masks: the XML files in .* have boxes only; "):
        build_dataset("train", tiny_args(FINETUNE, *flags, "--masks"))


# --------------------------------------------------------------------------------------------------------- batches


def test_two_workers_give_the_same_masks(tmp_path: Path) -> None:
    root = with_masks(write_tiny_coco(tmp_path / "coco", train=8, val=2, empty=(1, 4, 5)))
    batches = []
    for workers in (0, 2):
        args = mask_args(root, "--num_workers", workers, "--batch_size", 2)
        loader = build_loader(build_dataset("train", args), args, train=True)
        loader.batch_sampler.set_epoch(1, 0)
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) == 4
    counts = []
    for (samples, packed), (_, other) in zip(*batches, strict=True):
        masks = packed.tensors["masks"]
        height, width = samples.tensors.shape[-2:]
        assert masks.shape == (sum(packed.counts["boxes"]), height, -(-width // 8))
        assert packed.counts["masks"] == packed.counts["boxes"]
        assert torch.equal(masks, other.tensors["masks"])
        counts += packed.counts["masks"]
    assert counts.count(0) == 3
