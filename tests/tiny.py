"""Small models, batches, datasets and runs that several test modules share."""

import contextlib
import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import engine
import finetune_main
import main as pretrain_main
from util.logger import log
from util.nested_tensor import NestedTensor, as_nested_tensor
from util.runs.session import kill_dataloader_workers
from util.settings import FINETUNE, PRETRAIN, Settings, make_parser, resolve, settings

ROOT = Path(__file__).resolve().parent.parent
MODEL_FLAGS = [
    "--backbone", "resnet18", "--hidden_dim", "32", "--nheads", "4", "--dim_feedforward", "64",
    "--enc_layers", "1", "--dec_layers", "2", "--num_queries", "20",
]  # fmt: skip
RUN_FLAGS = [
    *MODEL_FLAGS,
    "--backbone_weights", "none", "--device", "cpu", "--num_workers", "0", "--image_size", "64",
]  # fmt: skip
# A frozen backbone has no optimizer state, which keeps checkpoints small.
FROZEN = ("--lr_backbone", "0", "--backbone_norm", "frozen")
PRETEXT_FLAGS = ["--num_patches", "5", "--patch_size", "32"]

# For whole runs of one pretext: the detectors differ in the model only, which faster tests cover on all three.
one_detector_else_slow = pytest.mark.parametrize(
    "detector",
    [
        pytest.param("detr", marks=pytest.mark.slow),
        pytest.param("conditional_detr", marks=pytest.mark.slow),
        "deformable_detr",
    ],
)


def tiny_args(script: str = FINETUNE, *flags: str) -> Namespace:
    """Return the settings of a small model; `flags` come last and win."""
    pretext = PRETEXT_FLAGS if script == PRETRAIN else []
    return resolve(make_parser(script).parse_args([*RUN_FLAGS, *pretext, *flags]))


def proposal_settings(**flags: object) -> Settings:
    """Return settings of region prior with these values. Their combination is not checked."""
    return settings(PRETRAIN, pretext="region_prior").replace(**flags)


@contextlib.contextmanager
def without_initialization() -> Iterator[None]:
    """Leave the parameters of a new model as allocated, for a test that replaces all of them: drawing takes long."""
    random = ("uniform_", "normal_", "trunc_normal_")
    derived = ("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_")
    with contextlib.ExitStack() as stack:
        for name in (*random, *derived):
            stack.enter_context(
                mock.patch.object(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
            )
        yield


# ----------------------------------------------------------------------------------------------- targets, batches


def make_targets(
    counts: list[int], num_classes: int = 5, seed: int = 0, patches: int = 0, patch_size: int = 32
) -> list[dict[str, Tensor]]:
    """Return one target per count N: `boxes` [N, 4] (cx, cy, w, h) inside the image, and `labels` [N].

    patches: Number of objects of every target for a pretext, with `patches` [N, 3, S, S] and label 1.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for i, count in enumerate(counts):
        count = patches or count
        centers = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
        sizes = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
        if patches:
            labels = torch.ones(count, dtype=torch.int64)
        else:
            labels = torch.randint(1, num_classes, (count,), generator=generator)
        target = {
            "boxes": torch.cat([centers, sizes], 1),
            "labels": labels,
            "image_id": torch.tensor([100 + i]),
        }
        if patches:
            target["patches"] = torch.randn(patches, 3, patch_size, patch_size, generator=generator)
        targets.append(target)
    return targets


def make_batch(sizes: list[tuple[int, int]] | int = 2, seed: int = 0) -> NestedTensor:
    """Return random normalized images of these (height, width), or this number of 64 x 64."""
    sizes = [(64, 64)] * sizes if isinstance(sizes, int) else sizes
    generator = torch.Generator().manual_seed(seed)
    return as_nested_tensor(
        [torch.randn(3, height, width, generator=generator) for height, width in sizes]
    )


# ------------------------------------------------------------------------------------------------- COCO, few-shot


def draw(seed: int, height: int, width: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Draw a noisy image with one to three rectangles: uint8 [H, W, 3], boxes (x, y, w, h), class ids 1 to 3."""
    rng = np.random.RandomState(seed)
    image = rng.randint(90, 130, (height, width, 3), dtype=np.uint8)
    boxes, labels = [], []
    for _ in range(rng.randint(1, 4)):
        w, h = rng.randint(width // 5, width // 2), rng.randint(height // 5, height // 2)
        x, y, label = rng.randint(0, width - w), rng.randint(0, height - h), rng.randint(1, 4)
        image[y : y + h, x : x + w] = (np.arange(3) == label - 1) * 200
        boxes.append([int(x), int(y), int(w), int(h)])
        labels.append(int(label))
    return image, boxes, labels


def image_size_hw(number: int) -> tuple[int, int]:
    """Return one of six sizes, so that batches have padding."""
    return 60 + 6 * (number % 3), 72 - 8 * (number % 2)


def write_coco(root: Path, train: int = 4, val: int = 3, empty: tuple[int, ...] = ()) -> Path:
    """Write a small dataset in COCO's layout. The training images with an index in `empty` have no object."""
    (root / "annotations").mkdir(parents=True)
    categories = [
        {"id": i, "name": name} for i, name in enumerate(("red", "green", "blue"), start=1)
    ]
    for name, count, first in (("train2017", train, 0), ("val2017", val, 500)):
        (root / name).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = image_size_hw(i)
            file_name, image_id = f"{i:06d}.png", first + i + 1
            pixels, boxes, labels = draw(first + i, height, width)
            Image.fromarray(pixels).save(root / name / file_name)
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            if name == "train2017" and i in empty:
                continue
            for box, label in zip(boxes, labels, strict=True):
                x, y, w, h = box
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "bbox": box,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "category_id": label,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                annotations.append(annotation)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def write_panoptic(coco: Path, root: Path | None = None) -> Path:
    """Write panoptic annotations of `write_coco`: its objects, later ones above, and grass (stuff, id 120) elsewhere.

    root: where they go; default: the folder of `write_coco` itself.
    """
    root = root or coco
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name in ("train2017", "val2017"):
        folder = root / f"panoptic_{name}"
        folder.mkdir()
        content = json.loads((coco / "annotations" / f"instances_{name}.json").read_text())
        annotations = []
        for image in content["images"]:
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            ids = np.ones((image["height"], image["width"]), np.int64)
            labels = {1: 120}
            for segment_id, annotation in enumerate(own, start=300):
                x, y, w, h = annotation["bbox"]
                ids[y : y + h, x : x + w] = segment_id
                labels[segment_id] = annotation["category_id"]
            png = Path(image["file_name"]).with_suffix(".png").name
            colors = np.stack([ids % 256, ids // 256, ids * 0], axis=-1).astype(np.uint8)
            Image.fromarray(colors).save(folder / png)
            annotations.append(
                {
                    "image_id": image["id"],
                    "file_name": png,
                    "segments_info": [_segment(ids, i, labels[i]) for i in np.unique(ids).tolist()],
                }
            )
        categories = [{**category, "isthing": 1} for category in content["categories"]]
        categories.append({"id": 120, "name": "grass", "isthing": 0})
        panoptic = {
            "images": content["images"],
            "annotations": annotations,
            "categories": categories,
        }
        path = root / "annotations" / f"panoptic_{name}.json"
        path.write_text(json.dumps(panoptic))
    return root


def _segment(ids: np.ndarray, segment_id: int, label: int) -> dict:
    rows, columns = np.nonzero(ids == segment_id)
    x, y = int(columns.min()), int(rows.min())
    box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
    return {"id": segment_id, "category_id": label, "iscrowd": 0, "bbox": box, "area": len(rows)}


def write_few_shot_files(
    coco: Path, folder: Path, shots: tuple[int, ...] = (10, 30), prefix: str = "COCO_train2014_"
) -> Path:
    """Write the first K objects per class of `write_coco` as Wang et al. publish theirs: one COCO file per class."""
    folder.mkdir(parents=True)
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    for count, category in itertools.product(shots, content["categories"]):
        objects = [
            item for item in content["annotations"] if item["category_id"] == category["id"]
        ][:count]
        image_ids = {item["image_id"] for item in objects}
        images = [
            {**image, "file_name": f"{prefix}{image['file_name']}"}
            for image in content["images"]
            if image["id"] in image_ids
        ]
        path = folder / f"full_box_{count}shot_{category['name']}_trainval.json"
        path.write_text(json.dumps({**content, "images": images, "annotations": objects}))
    return folder


# ------------------------------------------------------------------------------------------------------------ VOC

VOC_NAMES = {1: "bird", 2: "cat", 3: "dog"}  # class id of `draw` -> VOC's class
VOC_LISTS = {"2007_trainval": 3, "2012_trainval": 2, "2007_test": 3}  # image set -> images


def voc_xml(name: str, size_hw: tuple[int, int], objects: list[tuple[str, list[int], int]]) -> str:
    """Return the XML of one image.

    objects: (class, (x, y, w, h) counted from 0, difficult). Each has a body part, as in VOC's person layout.
    """
    items = "".join(
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{x + 1}</xmin>"
        f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
        f"<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
        "</part></object>"
        for kind, (x, y, w, h), difficult in objects
    )
    size = f"<size><width>{size_hw[1]}</width><height>{size_hw[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{items}</annotation>"


def write_voc(root: Path, lists: dict[str, int] | None = None) -> Path:
    """Write a small VOCdevkit: image set -> number of images. The last of several objects of an image is difficult."""
    for first, (image_set, count) in enumerate((lists or VOC_LISTS).items()):
        year, _, image_list = image_set.partition("_")
        folder = root / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True, exist_ok=True)

        prefix = "" if year == "2007" else f"{year}_"
        names = [f"{prefix}{100 * first + i + 1:06d}" for i in range(count)]
        (folder / "ImageSets" / "Main" / f"{image_list}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            height, width = image_size_hw(i)
            pixels, boxes, labels = draw(100 * first + i, height, width)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            objects = [
                (VOC_NAMES[label], box, int(0 < j == len(boxes) - 1))
                for j, (box, label) in enumerate(zip(boxes, labels, strict=True))
            ]
            xml = voc_xml(f"{name}.jpg", (height, width), objects)
            (folder / "Annotations" / f"{name}.xml").write_text(xml)
    return root


# ---------------------------------------------------------------------------------------------------- Airbus Ship

SHIPS_HW = 60, 72  # size of the images of `write_airbus`


def rle_encode(mask: np.ndarray) -> str:
    """Encode a mask, bool [H, W], as the competition does: "start length" pairs of pixels, from 1, down the columns."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [0]])  # [H * W + 2]
    change = np.flatnonzero(np.diff(flat))
    return " ".join(
        f"{start + 1} {end - start}" for start, end in zip(change[::2], change[1::2], strict=True)
    )


def write_airbus(root: Path, images: int = 10) -> Path:
    """Write images without a ship, with one and with two, in turn."""
    (root / "train_v2").mkdir(parents=True)
    rng = np.random.RandomState(0)
    lines = ["ImageId,EncodedPixels"]
    for i in range(images):
        name = f"{rng.randint(16**8):08x}.jpg"
        pixels = rng.randint(90, 130, (*SHIPS_HW, 3), dtype=np.uint8)
        num_ships = i % 3
        for ship in range(num_ships):
            mask = np.zeros(SHIPS_HW, bool)
            mask[10 + ship : 30, 5 + 30 * ship : 25 + 30 * ship] = True
            pixels[mask] = 250
            lines.append(f"{name},{rle_encode(mask)}")
        if num_ships == 0:
            lines.append(f"{name},")
        Image.fromarray(pixels).save(root / "train_v2" / name)
    (root / "train_ship_segmentations_v2.csv").write_text("\n".join(lines) + "\n")
    return root


# ------------------------------------------------------------------------------------------------- custom datasets

CUSTOM_CATEGORY_IDS = {1: 7, 2: 3, 3: 1000}  # ids of `write_coco` -> ids of `write_custom_dataset`


def renumber(content: dict, ids: dict[int, int]) -> dict:
    """Change the category ids of COCO annotations, in place."""
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    return content


def write_custom_dataset(root: Path) -> Path:
    """Write `write_coco` as a custom dataset, whose category ids have gaps.

    Files: photos/a/*.png with train.json, held_out/*.png with val.json.
    """
    write_coco(root, train=4, val=3)
    (root / "photos").mkdir()
    (root / "train2017").rename(root / "photos" / "a")
    (root / "val2017").rename(root / "held_out")
    for name, old in (("train", "instances_train2017.json"), ("val", "instances_val2017.json")):
        annotations = json.loads((root / "annotations" / old).read_text())
        content = renumber(annotations, CUSTOM_CATEGORY_IDS)
        if name == "train":
            for image in content["images"]:
                image["file_name"] = f"a/{image['file_name']}"
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def custom_dataset_flags(root: Path, *parts: str, **files: Path) -> list[str]:
    """Return the flags of `write_custom_dataset`.

    parts: Only the flags of "train" or "val". files: Other paths, by flag name.
    """
    paths = {
        "train_images": root / "photos",
        "train_annotations": root / "train.json",
        "val_images": root / "held_out",
        "val_annotations": root / "val.json",
        **files,
    }
    flags = ["--dataset_file", "custom"]
    for name, path in paths.items():
        if not parts or name.split("_")[0] in parts:
            flags += [f"--{name}", str(path)]
    return flags


def write_images(root: Path, count: int = 4) -> Path:
    """Write unlabelled images to a folder."""
    root.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(draw(i, 66 + 4 * i, 80)[0]).save(root / f"{i:03d}.png")
    return root


# ------------------------------------------------------------------------------------------------------------ runs


def fine_tune(*flags: object) -> None:
    """Run finetune_main.py in this process, with a small model."""
    with shutting_down_workers():
        finetune_main.main(finetune_main.parse([*RUN_FLAGS, *map(str, flags)]))


def pre_train(*flags: object) -> None:
    """Run main.py in this process, with a small model."""
    with shutting_down_workers():
        pretrain_main.main(pretrain_main.parse([*RUN_FLAGS, *PRETEXT_FLAGS, *map(str, flags)]))


@contextlib.contextmanager
def shutting_down_workers() -> Iterator[None]:
    """End the dataloader workers of a run, as a script does. A later test would wait for them in garbage collection."""
    try:
        yield
    finally:
        kill_dataloader_workers()


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect the lines of the project's log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the next run to stop in this training step, counted from 1 over all epochs."""
    original, steps = engine.train_step, []

    def stopped(run, samples, targets, stop, *place):
        steps.append(1)
        return original(run, samples, targets, len(steps) == step, *place)

    monkeypatch.setattr(engine, "train_step", stopped)


# --------------------------------------------------------------------------------------------------------- results


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Assert that nested containers are equal; tensors bit-exactly."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), f"{where}: differs by {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, f"{where}: {a} {b}"


def assert_same_logs(folder: Path, expected: Path) -> None:
    """Assert that two runs logged the same values, except for the time."""
    for line, other in zip(read_log(folder), read_log(expected), strict=True):
        line.pop("train_seconds")
        other.pop("train_seconds")
        assert line == other
