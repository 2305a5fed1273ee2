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
    JSON_REPLACEMENTS,
    NUMBERS,
    PICKLE_TOKENS,
    mutate_array,
    mutate_bytes,
    mutate_csv,
    mutate_json,
    mutate_numbers,
    mutate_value,
    mutate_xml,
    mutate_zip,
)
from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import load_checkpoint, read_entries
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
<object><name>dog</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>24</xmax><ymax>20</ymax></bndbox>
<polygon><x1>5</x1><y1>6</y1><x2>24</x2><y2>6</y2><x3>24</x3><y3>20</y3></polygon>
<part><name>head</name><bndbox><xmin>6</xmin><ymin>7</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>
</annotation>
"""


def fuzz_voc(folder: Path, rng: Random) -> None:
    (folder / "a.xml").write_bytes(mutate_xml(VOC, rng))
    if rng.random() < 0.5:
        (folder / "b.xml").write_bytes(VOC)
    _use(read_xml_folder(str(folder)))


CSV = b"ImageId,EncodedPixels\na.png,5 3 25 3\na.png,101 10\nb.png,\nsub/c.png,1 20\n"
CELLS = (
    "1 480", "480 1", "480 2", "1 2 3", "20 1 1 20", "7 0", "0 7", "-1 5", "1e1 2", "1 9999999999999999999", "nan",
    "1.0 2.0", "1,2", "\u0661 \u0662", "1 1 " * 2000, "a", "A.PNG", "sub\\c.png", "/", "..", "ImageId", '"',
)  # fmt: skip


def fuzz_airbus(folder: Path, rng: Random) -> None:
    path = folder / "ships.csv"
    path.write_bytes(mutate_csv(CSV, rng, CELLS))
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


def _npy(content: Any) -> bytes:
    """Return an .npy file of an array, or of another object in an array []."""
    if not isinstance(content, np.ndarray):
        wrapped = np.empty((), object)
        wrapped[()] = content
        content = wrapped
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
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
        arrays = {NAMES[0]: BOXES, NAMES[1]: np.hstack([BOXES, [[0.5], [0.25]]])}
        if rng.random() < 0.5:
            name = rng.choice(list(arrays))
            np.savez(file, **{**arrays, name: mutate_array(arrays[name], rng)})
            path.write_bytes(file.getvalue())
        else:
            np.savez(file, **arrays)
            path.write_bytes(
                mutate_zip(file.getvalue(), rng, lambda _, data: mutate_numbers(data, rng))
            )
    else:
        path = folder / "cache"
        path.mkdir()
        content: Any = BOXES
        if kind == "pickle":
            content = {"box": BOXES, "score": np.array([0.5, 0.25])}
        if rng.random() < 0.5:
            data = _npy(_mutate_arrays(content, rng))
        else:
            mutate = mutate_numbers if kind == "npy" and rng.random() < 0.5 else mutate_bytes
            data = mutate(_npy(content), rng, PICKLE_TOKENS)
        (path / "a.npy").write_bytes(data)
    method = build_from_file(
        settings(PRETRAIN, pretext="region_prior").replace(proposals=f"file:{path}")
    )
    for name in NAMES[: 1 if kind in ("npy", "pickle") else 2]:
        boxes, _ = method.propose(np.zeros((*SIZE_HW, 3), np.uint8), name)
        assert (boxes[:, 2:] > boxes[:, :2]).all(), f"boxes without area: {boxes.tolist()}"


def _mutate_arrays(content: Any, rng: Random) -> Any:
    """Return an array, or a dict of arrays, with changes."""
    if isinstance(content, np.ndarray):
        return mutate_array(content, rng)
    key = rng.choice(list(content))
    if rng.random() < 0.5:
        return {**content, key: mutate_array(content[key], rng)}
    return mutate_value(content, rng, JSON_REPLACEMENTS)


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
    name = rng.choice(list(files))
    if name == HEADER:
        files[name] = mutate_json(files[name], rng)
    elif rng.random() < 0.6:
        files[name] = _npy(mutate_array(np.load(io.BytesIO(files[name])), rng))
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
def _checkpoint_content() -> dict[str, Any]:
    return {
        "model": _weights(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"step_size": 3, "last_epoch": 2},
        "epoch": 2,
        "args": Namespace(lr=1e-4, nheads=2, backbone="resnet18", score=np.float64(0.5), names=["a"], epochs=3),
        "class_names": {0: "cat", 1: "dog"},
        "random_states": [{"python": [3, [1, 2], None], "torch": torch.ones(4, dtype=torch.uint8)}],
    }  # fmt: skip


def _save(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@cache
def _checkpoint(zipped: bool) -> bytes:
    return _save(_checkpoint_content(), zipped)


# Values of a checkpoint that a program could have saved.
TREE_REPLACEMENTS: tuple[Callable[[Any, Random], Any], ...] = (
    *JSON_REPLACEMENTS,
    lambda value, rng: rng.choice(
        (b"x", 1j, {1, 2}, (1, "a"), Path("/x"), range(3), torch.Size([2]), torch.float16, torch.device("cpu"))
    ),
    lambda value, rng: rng.choice((np.float32(2), np.int64(-1), np.array([1, 2]), np.array("text"))),
    lambda value, rng: torch.full(
        rng.choice(((), (0,), (3,), (2, 3, 1, 1), (7, 7))), rng.choice(NUMBERS[9:]), dtype=torch.float64
    ),
    lambda value, rng: torch.ones(4).expand(rng.choice((4, 2**20)), 4),
    lambda value, rng: _mutate_tensor(value, rng) if isinstance(value, torch.Tensor) else Namespace(x=value),
)  # fmt: skip


def _mutate_tensor(tensor: torch.Tensor, rng: Random) -> Any:
    dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: tensor.to(rng.choice(dtypes)),
        lambda: tensor.flatten(),
        lambda: tensor[:0],
        lambda: tensor * float("nan"),
        lambda: torch.cat([tensor, tensor]),
        tensor.to_sparse,
        lambda: tensor.to("meta"),
        lambda: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        lambda: tensor.numpy(),
    )
    return rng.choice(changes)()


def _mutate_checkpoint(rng: Random) -> bytes:
    """Return a checkpoint of other values, as a program could have saved it."""
    content = dict(_checkpoint_content())
    is_args = rng.random() < 0.3
    part = vars(content["args"]) if is_args else content
    for _ in range(rng.choice((1, 1, 2, 4))):
        part = mutate_value(part, rng, TREE_REPLACEMENTS)
    if is_args:
        part = {**content, "args": Namespace(**part) if isinstance(part, dict) else part}
    return _save(part, zipped=rng.random() < 0.7)


@cache
def _safetensors() -> bytes:
    from safetensors.torch import save

    return save(_weights())


def fuzz_checkpoint(folder: Path, rng: Random) -> None:
    kind = rng.choice(("saved", "saved", "zip", "zip", "legacy", "safetensors"))
    path = folder / ("model.safetensors" if kind == "safetensors" else "checkpoint.pth")
    if kind == "saved":
        path.write_bytes(_mutate_checkpoint(rng))
    elif kind == "zip":

        def mutate(_: str, data: bytes) -> bytes:
            return mutate_bytes(data, rng, PICKLE_TOKENS)

        path.write_bytes(mutate_zip(_checkpoint(True), rng, mutate))
    elif kind == "legacy":
        path.write_bytes(mutate_bytes(_checkpoint(False), rng, PICKLE_TOKENS))
    else:
        content = _safetensors()
        path.write_bytes((mutate_numbers if rng.random() < 0.5 else mutate_bytes)(content, rng))
    read_entries(path)  # as --resume auto does first
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
def _image(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    if kind == "GIF":
        image.putpalette(bytes(range(256)) * 3)
        options = {"save_all": True, "append_images": [image.rotate(180)], "transparency": 3}
    if kind == "TIFF":
        options["compression"] = {"RGB": "raw", "1": "raw"}.get(mode, "tiff_lzw")
    if kind == "PNG" and mode == "P":
        options["transparency"] = bytes(range(256))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = (
    *[("JPEG", mode) for mode in ("RGB", "L", "CMYK")],
    *[("PNG", mode) for mode in ("RGB", "1", "L", "LA", "P", "RGBA", "I;16")],
    *[("TIFF", mode) for mode in ("RGB", "1", "L", "I;16", "F", "CMYK", "RGBA")],
    *[("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("GIF", "P"), ("BMP", "RGB"), ("BMP", "1"), ("PPM", "RGB")],
)  # fmt: skip
HEAD = 120  # bytes, of most headers


def fuzz_image(folder: Path, rng: Random) -> None:
    kind, mode = rng.choice(IMAGES)
    content = bytearray(_image(kind, mode))
    head = HEAD if rng.random() < 0.5 else len(content)
    content[:head] = mutate_bytes(bytes(content[:head]), rng)
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
