"""What tools/fuzz.py damages: small valid files of each kind, and the code of a run that reads them.

A target writes a damaged file into a folder and reads it. It may raise UserError, or for an image or a segmentation the
error that names the object. Anything else is a finding.
"""

import io
import json
import zlib
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.images.image_folder import decode_image, find_images, read_header
from datasets.labelled.airbus_ship import IMAGE_FOLDER, read_rle_csv
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco, read_coco
from datasets.labelled.few_shot import read_shots
from datasets.labelled.segmentations import SegmentationError, SegmentationTexts
from datasets.labelled.subsets import read_split
from datasets.labelled.voc import read_xml_folder
from datasets.proposals.cache import FORMAT, HEADER, CachedProposals, ProposalCache
from datasets.proposals.from_file import build_from_file
from datasets.sample import BadImageError
from tools.fuzzing.mutations import (
    CSV_TOKENS,
    PICKLE_TOKENS,
    XML_TOKENS,
    mutate_bytes,
    mutate_json,
    mutate_numbers,
    mutate_zip,
)
from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import load_checkpoint
from util.checkpoints.classes import infer_classes
from util.checkpoints.conversion import infer_codebase, infer_pretext
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, resolve, settings

SIZE_HW = (20, 24)
NAMES = ("a.png", "b.png", "sub/c.png")


# ------------------------------------------------------------------------------------------------- annotations


@cache
def _coco() -> bytes:
    rle = {"size": list(SIZE_HW), "counts": [5, 10, 465]}
    content = {
        "images": [
            {"id": i, "file_name": name, "height": SIZE_HW[0], "width": SIZE_HW[1]}
            for i, name in enumerate(NAMES)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i % 3,
                "category_id": 1 + i % 2,
                "bbox": [1.5, 2, 8, 9.25],
                "area": 40.5,
                "iscrowd": int(i == 4),
                "ignore": 0,
                "score": 0.5,
                "attributes": {"rotation": 30.0},
                "segmentation": rle if i % 2 else [[2, 3, 9, 3, 9, 10]],
            }
            for i in range(6)
        ],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "dog"}],
    }
    return json.dumps(content).encode()


def _use(annotations: Annotations) -> None:
    """Do with annotations what a dataset does."""
    annotations.fingerprint()
    json.dumps(annotations.to_coco())
    list(annotations.file_names)
    for index in range(min(len(annotations), 5)):
        try:
            target = annotations.target(index, SIZE_HW)
        except SegmentationError:
            continue
        boxes = target["boxes"]
        inside = (
            (boxes >= 0).all()
            and (boxes[:, 2] <= SIZE_HW[1]).all()
            and (boxes[:, 3] <= SIZE_HW[0]).all()
        )
        assert inside, f"boxes outside the image: {boxes.tolist()}"
        assert (boxes[:, 2:] > boxes[:, :2]).all(), f"boxes without area: {boxes.tolist()}"


def fuzz_coco(folder: Path, rng: Random) -> None:
    path = folder / "instances.json"
    path.write_bytes(mutate_json(_coco(), rng))
    if rng.random() < 0.5:
        _use(read_coco(str(path)))
    else:
        texts = SegmentationTexts()
        _use(parse_coco(read_json(str(path), texts), str(path), texts, keep_crowds=True))


VOC = b"""<?xml version="1.0" encoding="UTF-8"?>
<annotation><folder>VOC2007</folder><filename>a.png</filename>
<size><width>24</width><height>20</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>10</xmax><ymax>12.5</ymax></bndbox>
<attributes><attribute><name>rotation</name><value>30</value></attribute></attributes></object>
<object><name>dog</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>24</xmax><ymax>20</ymax></bndbox></object>
</annotation>
"""


def fuzz_voc(folder: Path, rng: Random) -> None:
    mutate = mutate_numbers if rng.random() < 0.4 else mutate_bytes
    (folder / "a.xml").write_bytes(mutate(VOC, rng, XML_TOKENS))
    _use(read_xml_folder(str(folder)))


CSV = b"ImageId,EncodedPixels\na.png,5 3 25 3\na.png,101 10\nb.png,\nsub/c.png,1 20\n"


def fuzz_airbus(folder: Path, rng: Random) -> None:
    path = folder / "ships.csv"
    mutate = mutate_numbers if rng.random() < 0.4 else mutate_bytes
    path.write_bytes(mutate(CSV, rng, CSV_TOKENS))
    _write_images(folder / IMAGE_FOLDER)
    _use(read_rle_csv(str(path), str(folder / IMAGE_FOLDER), masks=rng.random() < 0.5))


def fuzz_split(folder: Path, rng: Random) -> None:
    annotations = _train_annotations(folder)
    path = folder / "split.json"
    if rng.random() < 0.5:
        content = {"source": "x.json", "filter_pct": 0.5, "seed": 1, "ids": [0, 2]}
        path.write_bytes(mutate_json(json.dumps(content).encode(), rng))
        read_split(str(path), annotations)
    else:
        path.write_bytes(mutate_json(_coco(), rng))
        _use(read_shots(str(path), None, annotations, annotations.class_names))


def _train_annotations(folder: Path) -> Annotations:
    path = folder / "train.json"
    path.write_bytes(_coco())
    return read_coco(str(path))


# --------------------------------------------------------------------------------------------------- proposals


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


BOXES = np.array([[1, 2, 10, 12], [3, 4, 20, 18]], dtype=np.float32)


def fuzz_proposals(folder: Path, rng: Random) -> None:
    """A COCO file, an .npz file, or the published .npy files: arrays, and pickled dicts."""
    kind = rng.choice(("json", "npz", "npy", "pickle"))
    path = folder / f"boxes.{kind}"
    if kind == "json":
        path.write_bytes(mutate_json(_coco(), rng))
    elif kind == "npz":
        file = io.BytesIO()
        np.savez(file, **{NAMES[0]: BOXES, NAMES[1]: np.hstack([BOXES, [[0.5], [0.25]]])})
        path.write_bytes(
            mutate_zip(file.getvalue(), rng, lambda _, data: mutate_numbers(data, rng))
        )
    else:
        path = folder / "cache"
        path.mkdir()
        content: Any = BOXES
        if kind == "pickle":
            content = {"box": BOXES, "score": np.array([0.5, 0.25])}
        mutate = mutate_numbers if kind == "npy" and rng.random() < 0.5 else mutate_bytes
        (path / "a.npy").write_bytes(mutate(_npy(content), rng, PICKLE_TOKENS))
    method = build_from_file(
        settings(PRETRAIN, pretext="region_prior").replace(proposals=f"file:{path}")
    )
    for name in NAMES[: 1 if kind in ("npy", "pickle") else 2]:
        boxes, _ = method.propose(np.zeros((*SIZE_HW, 3), np.uint8), name)
        assert (boxes[:, 2:] > boxes[:, :2]).all(), f"boxes without area: {boxes.tolist()}"


@cache
def _cache_files() -> dict[str, bytes]:
    names = b"".join(name.encode() for name in NAMES)
    header = {
        "format": FORMAT, "method": "random", "settings": {"num": 3}, "grid": 1, "images": 3, "boxes": 6,
        "scores": True, "names": "3 images, 0123456789abcdef", "unreadable": 0,
    }  # fmt: skip
    arrays = {
        "name_bytes": np.frombuffer(names, np.uint8),
        "name_ends": np.cumsum([len(name) for name in NAMES]),
        "offsets": np.array([0, 2, 4, 6]),
        "boxes": np.tile(BOXES, (3, 1)).astype(np.uint16),
        "scores": np.linspace(0, 1, 6, dtype=np.float32),
        "sizes": np.tile(np.array(SIZE_HW, np.int32), (3, 1)),
        "file_bytes": np.full(3, len(_image("PNG"))),
        "file_crc32": np.array([1, 2, 3], np.uint32),
    }
    files = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    return {HEADER: json.dumps(header).encode(), **files}


def fuzz_cache(folder: Path, rng: Random) -> None:
    files = dict(_cache_files())
    name = rng.choice((HEADER, *files))
    if name == HEADER:
        files[name] = mutate_json(files[name], rng)
    else:
        files[name] = (mutate_numbers if rng.random() < 0.5 else mutate_bytes)(files[name], rng)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    cached = CachedProposals(ProposalCache(folder))
    _write_images(folder / "images")
    try:
        cached.check(find_images(str(folder / "images"))[0])
    finally:
        for image in NAMES:
            try:
                cached.propose(np.zeros((*SIZE_HW, 3), np.uint8), image)
            except BadImageError:
                continue


# ------------------------------------------------------------------------------------------------- checkpoints


@cache
def _weights() -> dict[str, torch.Tensor]:
    width, classes = 4, 3
    layer = {
        "self_attn.in_proj_weight": (3 * width, width),
        "linear1.weight": (8, width),
        "norm1.weight": (width,),
    }
    shapes = {
        "backbone.0.body.conv1.weight": (2, 3, 1, 1),
        **{f"transformer.{part}.layers.0.{name}": shape for part in ("encoder", "decoder")
        for name, shape in layer.items()},
        "transformer.decoder.layers.0.multihead_attn.in_proj_weight": (3 * width, width),
        "transformer.decoder.norm.weight": (width,),
        "query_embed.weight": (5, width),
        "class_embed.weight": (classes, width),
        "class_embed.bias": (classes,),
    }  # fmt: skip
    return {name: torch.ones(shape) for name, shape in shapes.items()}


@cache
def _checkpoint(zipped: bool) -> bytes:
    content = {
        "model": _weights(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"step_size": 3, "last_epoch": 2},
        "epoch": 2,
        "args": Namespace(lr=1e-4, nheads=2, backbone="resnet18", score=np.float64(0.5), names=["a"], epochs=3),
        "class_names": {0: "cat", 1: "dog"},
        "random_states": [{"python": [3, [1, 2], None], "torch": torch.ones(4, dtype=torch.uint8)}],
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@cache
def _safetensors() -> bytes:
    from safetensors.torch import save

    return save(_weights())


def fuzz_checkpoint(folder: Path, rng: Random) -> None:
    kind = rng.choice(("zip", "zip", "legacy", "safetensors"))
    path = folder / ("model.safetensors" if kind == "safetensors" else "checkpoint.pth")
    if kind == "zip":

        def mutate(_: str, data: bytes) -> bytes:
            return mutate_bytes(data, rng, PICKLE_TOKENS)

        path.write_bytes(mutate_zip(_checkpoint(True), rng, mutate))
    elif kind == "legacy":
        path.write_bytes(mutate_bytes(_checkpoint(False), rng, PICKLE_TOKENS))
    else:
        content = _safetensors()
        path.write_bytes((mutate_numbers if rng.random() < 0.5 else mutate_bytes)(content, rng))
    checkpoint = load_checkpoint(path)
    checkpoint.missing_state()
    infer_codebase(checkpoint)
    infer_pretext(checkpoint)
    classes = infer_classes(checkpoint)
    json.dumps(classes.names)
    given = {"resume": str(path), "eval": True, "device": "cpu"}
    resolve(given, settings_from_checkpoint(checkpoint, given), FINETUNE)


# ------------------------------------------------------------------------------------------------------ images


@cache
def _image(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    if kind == "GIF":
        image = image.convert("P")
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def fuzz_image(folder: Path, rng: Random) -> None:
    kind = rng.choice(("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"))
    content = bytearray(mutate_bytes(_image(kind), rng))
    if kind == "PNG" and rng.random() < 0.7:
        _repair_png(content)
    path = folder / f"a.{kind.lower()}"
    path.write_bytes(content)
    for read in (
        lambda: read_header(str(path)),
        lambda: decode_image(str(path), rng.choice((None, "apply"))),
    ):
        try:
            read()
        except BadImageError as error:
            raise UserError(f"{path}: {error}") from error
    find_images(str(folder))


def _repair_png(content: bytearray) -> None:
    """Give each chunk its right checksum, so that damage gets beyond it."""
    start = 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        if end + 4 > len(content):
            return
        content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
        start = end + 4


def _write_images(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(_image("PNG"))


TARGETS: dict[str, Callable[[Path, Random], None]] = {
    "coco": fuzz_coco,
    "voc": fuzz_voc,
    "airbus": fuzz_airbus,
    "split": fuzz_split,
    "proposals": fuzz_proposals,
    "cache": fuzz_cache,
    "checkpoint": fuzz_checkpoint,
    "image": fuzz_image,
}
