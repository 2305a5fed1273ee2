"""Small models, batches, data sets and runs that several test modules use."""

import contextlib
import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

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
from util.runs.session import end_loaders
from util.settings import FINETUNE, PRETRAIN, Settings, make_parser, resolve, settings

ROOT = Path(__file__).resolve().parent.parent
MODEL_FLAGS = [
    "--backbone",
    "resnet18",
    "--hidden_dim",
    "32",
    "--nheads",
    "4",
    "--dim_feedforward",
    "64",
    "--enc_layers",
    "1",
    "--dec_layers",
    "2",
    "--num_queries",
    "20",
]
RUN_FLAGS = [
    *MODEL_FLAGS,
    "--backbone_weights",
    "none",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--image_size",
    "64",
]
FROZEN = (
    "--lr_backbone",
    "0",
    "--backbone_norm",
    "frozen",
)  # small checkpoints: no moments of the backbone
PRETEXT_FLAGS = ["--num_patches", "5", "--patch_size", "32"]


def tiny_args(script: str = FINETUNE, *flags: str) -> Namespace:
    """Resolved flags of a small model; `flags` come last and win."""
    pretext = PRETEXT_FLAGS if script == PRETRAIN else []
    return resolve(make_parser(script).parse_args([*RUN_FLAGS, *pretext, *flags]))


def proposal_settings(**flags: object) -> Settings:
    """Settings of region prior with these values, which are not checked together."""
    return settings(PRETRAIN, pretext="region_prior").replace(**flags)


def make_targets(
    counts: list[int], num_classes: int = 5, seed: int = 0, patches: int = 0, patch_size: int = 32
) -> list[dict[str, Tensor]]:
    """A target for each count, with boxes inside the image and as many objects; `patches` replaces the counts for a
    pretext.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for i, count in enumerate(counts):
        count = patches or count
        centre, size = (
            torch.rand(count, 2, generator=generator) * 0.5 + 0.25,
            torch.rand(count, 2, generator=generator) * 0.4 + 0.05,
        )
        labels = (
            torch.ones(count, dtype=torch.int64)
            if patches
            else torch.randint(1, num_classes, (count,), generator=generator)
        )
        target = {
            "boxes": torch.cat([centre, size], 1),
            "labels": labels,
            "image_id": torch.tensor([100 + i]),
        }
        if patches:
            target["patches"] = torch.randn(patches, 3, patch_size, patch_size, generator=generator)
        targets.append(target)
    return targets


def make_batch(sizes: list[tuple[int, int]] | int = 2, seed: int = 0) -> NestedTensor:
    """Random normalised images of these (height, width), or as many of 64 x 64."""
    sizes = [(64, 64)] * sizes if isinstance(sizes, int) else sizes
    generator = torch.Generator().manual_seed(seed)
    return as_nested_tensor(
        [torch.randn(3, height, width, generator=generator) for height, width in sizes]
    )


def draw(seed: int, height: int, width: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """A noisy picture with one to three plain rectangles: (uint8 [H, W, 3], boxes (x, y, w, h), class ids 1 to 3)."""
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


def write_coco(root: Path, train: int = 4, val: int = 3, empty: tuple[int, ...] = ()) -> Path:
    """A small data set in COCO's layout with images of several sizes; the training images in `empty` have no object."""
    (root / "annotations").mkdir(parents=True)
    for name, count, first in (("train2017", train, 0), ("val2017", val, 500)):
        (root / name).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = 60 + 6 * (i % 3), 72 - 8 * (i % 2)
            pixels, boxes, labels = draw(first + i, height, width)
            Image.fromarray(pixels).save(root / name / f"{i:06d}.png")
            images.append(
                {"id": first + i + 1, "file_name": f"{i:06d}.png", "height": height, "width": width}
            )
            for box, label in (
                zip(boxes, labels, strict=True) if i not in empty or name != "train2017" else ()
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": first + i + 1,
                        "bbox": box,
                        "category_id": label,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [
            {"id": i, "name": name} for i, name in enumerate(("red", "green", "blue"), start=1)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def write_shots(
    coco: Path, folder: Path, shots: tuple[int, ...] = (10, 30), prefix: str = "COCO_train2014_"
) -> Path:
    """The first objects of each class of `write_coco` as Wang et al. publish theirs: a COCO file for each class and
    number of shots.
    """
    folder.mkdir(parents=True)
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    for count, category in (
        (count, category) for count in shots for category in content["categories"]
    ):
        chosen = [item for item in content["annotations"] if item["category_id"] == category["id"]][
            :count
        ]
        images = [
            {**image, "file_name": f"{prefix}{image['file_name']}"}
            for image in content["images"]
            if image["id"] in {item["image_id"] for item in chosen}
        ]
        path = folder / f"full_box_{count}shot_{category['name']}_trainval.json"
        path.write_text(json.dumps({**content, "images": images, "annotations": chosen}))
    return folder


VOC_NAMES = {1: "bird", 2: "cat", 3: "dog"}  # class id of `draw` -> VOC's class
VOC_LISTS = {"2007_trainval": 3, "2012_trainval": 2, "2007_test": 3}


def voc_xml(name: str, size_hw: tuple[int, int], objects: list[tuple[str, list[int], int]]) -> str:
    """objects: (class, (x, y, w, h) from 0 on, difficult)."""
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
    """A small VOCdevkit with as many images in each list; the last object of an image is difficult where there are
    several.
    """
    for first, (image_set, count) in enumerate((lists or VOC_LISTS).items()):
        year, _, part = image_set.partition("_")
        folder = root / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        names = [
            f"{100 * first + i + 1:06d}" if year == "2007" else f"{year}_{100 * first + i + 1:06d}"
            for i in range(count)
        ]
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            height, width = 60 + 6 * (i % 3), 72 - 8 * (i % 2)
            pixels, boxes, labels = draw(100 * first + i, height, width)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            objects = [
                (VOC_NAMES[k], box, int(0 < j == len(boxes) - 1))
                for j, (box, k) in enumerate(zip(boxes, labels, strict=True))
            ]
            (folder / "Annotations" / f"{name}.xml").write_text(
                voc_xml(f"{name}.jpg", (height, width), objects)
            )
    return root


SHIPS_HW = 60, 72  # size of the images of `write_airbus`


def runs_of(mask: np.ndarray) -> str:
    """bool [H, W] -> the competition's text, by its definition: pixels from 1 down the columns."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [0]])
    change = np.flatnonzero(np.diff(flat))
    return " ".join(
        f"{first + 1} {end - first}" for first, end in zip(change[::2], change[1::2], strict=True)
    )


def write_airbus(root: Path, images: int = 10) -> Path:
    """Images with a ship, with two, and with none, in turn."""
    (root / "train_v2").mkdir(parents=True)
    rng, lines = np.random.RandomState(0), []
    for i in range(images):
        name, pixels = (
            f"{rng.randint(16**8):08x}.jpg",
            rng.randint(90, 130, (*SHIPS_HW, 3), dtype=np.uint8),
        )
        for ship in range(i % 3):
            mask = np.zeros(SHIPS_HW, bool)
            mask[10 + ship : 30, 5 + 30 * ship : 25 + 30 * ship] = True
            pixels[mask] = 250
            lines.append(f"{name},{runs_of(mask)}")
        if not i % 3:
            lines.append(f"{name},")
        Image.fromarray(pixels).save(root / "train_v2" / name)
    (root / "train_ship_segmentations_v2.csv").write_text(
        "\n".join(["ImageId,EncodedPixels", *lines]) + "\n"
    )
    return root


OWN_IDS = {1: 7, 2: 3, 3: 1000}  # category ids of `write_coco` -> of `write_own_data`


def renumber(content: dict, ids: dict[int, int]) -> dict:
    """COCO annotations with other category ids, changed in place."""
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    return content


def write_own_data(root: Path) -> Path:
    """`write_coco` as a user's own: photos/a/*.png with train.json, held_out/*.png with val.json, category ids with
    gaps.
    """
    write_coco(root, train=4, val=3)
    (root / "photos").mkdir()
    (root / "train2017").rename(root / "photos" / "a")
    (root / "val2017").rename(root / "held_out")
    for name, old in (("train", "instances_train2017.json"), ("val", "instances_val2017.json")):
        content = renumber(json.loads((root / "annotations" / old).read_text()), OWN_IDS)
        for image in content["images"] if name == "train" else ():
            image["file_name"] = f"a/{image['file_name']}"
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def own_flags(root: Path, *parts: str, **files: Path) -> list[str]:
    """The flags of `write_own_data`, or those of `parts` ("train", "val"); `files` replaces places by flag name."""
    places = {
        "train_images": root / "photos",
        "train_annotations": root / "train.json",
        "val_images": root / "held_out",
        "val_annotations": root / "val.json",
        **files,
    }
    chosen = [name for name in places if not parts or name.split("_")[0] in parts]
    return [
        "--dataset_file",
        "custom",
        *(word for name in chosen for word in (f"--{name}", str(places[name]))),
    ]


def write_images(root: Path, count: int = 4) -> Path:
    """Unlabelled images below a folder."""
    root.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(draw(i, 66 + 4 * i, 80)[0]).save(root / f"{i:03d}.png")
    return root


def fine_tune(*flags: object) -> None:
    """Runs finetune_main.py in this process with a small model."""
    with loaders_end():
        finetune_main.main(finetune_main.parse([*RUN_FLAGS, *map(str, flags)]))


def pre_train(*flags: object) -> None:
    """Runs main.py in this process with a small model."""
    with loaders_end():
        pretrain_main.main(pretrain_main.parse([*RUN_FLAGS, *PRETEXT_FLAGS, *map(str, flags)]))


@contextlib.contextmanager
def loaders_end() -> Iterator[None]:
    """Ends the loader processes of a run, as a script does; otherwise some later test waits for them when they are
    collected.
    """
    try:
        yield
    finally:
        end_loaders()


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Collects the lines of the project's log."""
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


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equality of nested containers, bit for bit in tensors."""
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
    """Every logged number but the seconds."""
    for line, other in zip(read_log(folder), read_log(expected), strict=True):
        line.pop("train_seconds"), other.pop("train_seconds")
        assert line == other


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run is asked to stop in the given training step, counted over epochs."""
    original, steps = engine.train_step, []

    def stopped(run, samples, targets, stop):
        steps.append(1)
        return original(run, samples, targets, len(steps) == step)

    monkeypatch.setattr(engine, "train_step", stopped)
