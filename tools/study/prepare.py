"""The data of a transfer study: small copies of the images, boxes in their pixels, fixed splits, and a manifest.

annotations/{train,val,test}.json  COCO's format; `val` is split off the source's training part
annotations/train_0.1.json         the images of splits/0.1.json, repeated until there are as many as in train.json
annotations/true_boxes.json        boxes of all classes of the training images
splits/0.1.json                    image ids, for --split_file
labelled/{train,test}/             images of train and val, and of test
labelled/true_boxes.txt            training images with two boxes or more
unlabelled/N/                      images of source N
unlabelled.txt                     all images to pre-train on
manifest.json                      counts, seeds, hashes; written last
"""

import hashlib
import json
import shlex
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Collection
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from datasets import build_dataset
from datasets.images.image_folder import ImageFile, ImageFolder, open_file, open_image, read_bytes
from datasets.labelled.coco import CocoDetection
from datasets.labelled.subsets import draw_ids
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import check_apart, make_folder, write_atomically, write_text
from util.logger import log, progress
from util.runs.folder import read_record
from util.settings import resolve

MANIFEST, SETTINGS = "manifest.json", "settings.json"
DATA_FLAGS = [
    *("coco_path", "data_root", "dataset_file", "voc_path", "voc_train", "voc_val", "airbus_path"),
    *("train_images", "train_annotations", "val_images", "val_annotations"),
]
OWN_FLAGS = [
    *(
        "unlabelled",
        "no_labelled_images",
        "max_unlabelled",
        "image_size",
        "quality",
        "val_share",
        "fractions",
    ),
    *("split_seed", "min_objects"),
]
MAX_RATIO = 1333 / 800  # long side over --image_size, as in training
MIN_SIDE = 17  # pixels; pre-training skips smaller images
SAME = 0.99  # correlation of two thumbnails from which on they count as the same image
JPEG = b"\xff\xd8\xff"  # how such a file begins

Coco = dict[str, Any]  # the content of a COCO annotation file


def prepare(args: Namespace) -> None:
    """Writes the study's data; what an earlier, interrupted call wrote is kept.

    Raises:
        UserError: sources are missing or can't be used, or the folder holds data with other settings.
    """
    folder, settings = args.output_dir, _settings(args)
    if _is_prepared(folder, settings, args.unlabelled):
        log.info("%s is finished", folder)
        return
    parts = write_labelled(args, folder)
    unlabelled = write_unlabelled(args, folder, parts)
    texts = sorted(
        [*folder.glob("annotations/*"), *folder.glob("splits/*"), *folder.rglob("*.txt")]
    )
    images = sorted(folder.rglob("*.jpg"))
    digests = [
        {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
        for paths in (texts, images)
    ]
    all_images = hashlib.sha256(json.dumps(digests[1]).encode()).hexdigest()
    manifest = {
        "command": shown_command(),
        "settings": settings,
        **{name: _describe(part) for name, part in parts.items()},
        "unlabelled": unlabelled,
        "sha256": {**digests[0], "all images": all_images},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    counts = ", ".join(f"{manifest[name]['images']} {name}" for name in (*parts, "unlabelled"))
    log.info(
        "%s: %s images; %.1f MB", folder, counts, sum(path.stat().st_size for path in images) / 1e6
    )


def _settings(args: Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in (*DATA_FLAGS, *OWN_FLAGS)}
    given["unlabelled"] = [_short(place) for place in args.unlabelled]
    given = {
        name: _short(value) if isinstance(value, str) and "/" in value else value
        for name, value in given.items()
    }
    return json.loads(json.dumps({**given, "pillow": pillow_version}))


def _short(path: str) -> str:
    """Its last two parts: where data came from, without the places of one's own disk."""
    return "/".join(Path(path).resolve().parts[-2:])


def shown_command() -> str:
    """The command as it was typed, without the places of one's own disk."""
    words = [_short(word) if word.startswith(("/", "..", "~")) else word for word in sys.argv[1:]]
    return shlex.join(["python", "tools/transfer_study.py", *words])


def _is_prepared(folder: Path, settings: dict[str, Any], sources: list[str]) -> bool:
    for source in sources:
        check_apart(folder, source)
    make_folder(folder)
    before = read_record(folder / SETTINGS)
    for name, value in settings.items() if before else ():
        if before.get(name) != value:
            was = f"was prepared with {name} {before.get(name)}, now it is {value}"
            raise UserError(f"--output_dir {folder} {was}: choose another folder")
    if not before and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds other files: choose another folder")
    write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return (folder / MANIFEST).exists()


# ------------------------------------------------------------------------------------------------- labelled images


def write_labelled(args: Namespace, folder: Path) -> dict[str, Coco]:
    """train, val and test with their images, splits and annotation files."""
    settings = resolve({name: getattr(args, name) for name in DATA_FLAGS})
    train, test = (
        _shrink_all(build_dataset(image_set, settings), folder, name, args)
        for image_set, name in (("train", "train"), ("val", "test"))
    )
    ids = {image["id"] for image in train["images"]}
    val_ids = set(draw_ids(np.array(sorted(ids)), args.val_share, args.split_seed).tolist())
    parts = {"train": _select(train, ids - val_ids), "val": _select(train, val_ids), "test": test}
    _write_true_boxes(folder, parts["train"])
    classes = _frequent_classes(parts, args.min_objects)
    parts = {name: _with_classes(part, classes) for name, part in parts.items()}
    for name, part in parts.items():
        if name == "val" and not args.val_share:
            continue
        if not _objects(part):
            raise UserError(
                f"the {name} part has no box: give more data, or change --val_share or --min_objects"
            )
        write_text(folder / "annotations" / f"{name}.json", json.dumps(part))
    for fraction in args.fractions:
        if fraction < 1:
            _write_split(folder, parts["train"], fraction, args.split_seed)
    return parts


def _select(content: Coco, ids: Collection[int]) -> Coco:
    images = [image for image in content["images"] if image["id"] in ids]
    boxes = [box for box in content["annotations"] if box["image_id"] in ids]
    return {**content, "images": images, "annotations": boxes}


def _with_classes(content: Coco, ids: Collection[int]) -> Coco:
    boxes = [box for box in content["annotations"] if box["category_id"] in ids]
    classes = [category for category in content["categories"] if category["id"] in ids]
    return {**content, "annotations": boxes, "categories": classes}


def _objects(content: Coco) -> Counter:
    """category id -> boxes, without those of crowds."""
    return Counter(box["category_id"] for box in content["annotations"] if not box["iscrowd"])


def _class_names(content: Coco) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _describe(content: Coco) -> dict[str, Any]:
    names, objects = _class_names(content), _objects(content)
    per_class = {names[number]: count for number, count in sorted(objects.items())}
    return {"images": len(content["images"]), "boxes": objects.total(), "boxes_by_class": per_class}


def _frequent_classes(parts: dict[str, Coco], least: int) -> set[int]:
    """Classes with enough objects to train on and to measure: the AP of a class with three test objects is noise."""
    names, counts = (
        _class_names(parts["train"]),
        [_objects(parts[name]) for name in ("train", "test")],
    )
    kept = {number for number in names if all(count[number] >= least for count in counts)}
    if not kept:
        raise UserError(
            f"--min_objects {least}: no class has as many objects in training and test; give a smaller one"
        )
    if least:
        log.info(
            "classes with %d objects or more: %s",
            least,
            ", ".join(names[number] for number in sorted(kept)),
        )
    return kept


def _shrink_all(source: CocoDetection, folder: Path, name: str, args: Namespace) -> Coco:
    annotations, content = source.annotations, source.annotations.as_coco()
    images, scales = [], {}
    for i, image in enumerate(progress(content["images"], f"{name} images")):
        relative = f"{name}/{small_name(image['file_name'])}"
        try:
            (width, height), (new_width, new_height) = shrink(
                source.path(i), folder / "labelled" / relative, args
            )
            if annotations.sizes_hw[i].all() and tuple(annotations.sizes_hw[i]) != (height, width):
                raise BadImageError("its size is not the one in the annotations")
        except BadImageError as error:
            if name == "test":  # a test without some of its images is another test
                raise UserError(
                    f"{source.path(i)}: {error}; the test needs all of its images, replace it"
                ) from error
            log.warning("skipped %s: %s", source.path(i), error)
            continue
        scales[image["id"]] = new_width / width, new_height / height
        images.append(
            {"id": image["id"], "file_name": relative, "height": new_height, "width": new_width}
        )
    objects = [*content["annotations"], *_crowds(source, len(content["annotations"]))]
    boxes = [_scaled(box, *scales[box["image_id"]]) for box in objects if box["image_id"] in scales]
    return {**content, "images": images, "annotations": boxes}


def _crowds(source: CocoDetection, last_id: int) -> list[dict[str, Any]]:
    """COCO's crowd regions: nobody learns them, and evaluation ignores what is found there."""
    labels = {number: label for label, number in (source.category_ids or {}).items()}
    crowds = [
        {**box, "category_id": labels.get(box["category_id"], box["category_id"])}
        for box in source.ground_truth["annotations"]
        if box["iscrowd"]
    ]
    kept = ("image_id", "category_id", "bbox", "area", "iscrowd")
    return [
        {"id": last_id + i, **{key: box[key] for key in kept}}
        for i, box in enumerate(crowds, start=1)
    ]


def _scaled(box: dict[str, Any], x: float, y: float) -> dict[str, Any]:
    bbox = [round(value * scale, 2) for value, scale in zip(box["bbox"], (x, y, x, y), strict=True)]
    return {**box, "bbox": bbox, "area": round(box["area"] * x * y, 2)}


def _write_true_boxes(folder: Path, train: Coco) -> None:
    """Ground-truth boxes as proposals; region prior needs two in an image."""
    content = {**train, "annotations": [box for box in train["annotations"] if not box["iscrowd"]]}
    boxes = Counter(box["image_id"] for box in content["annotations"])
    names = [image["file_name"] for image in content["images"] if boxes[image["id"]] > 1]
    write_text(folder / "annotations" / "true_boxes.json", json.dumps(content))
    write_text(
        folder / "labelled" / "true_boxes.txt", "".join(f"{name}\n" for name in sorted(names))
    )


def annotation_file(fraction: float) -> str:
    """Below the data's folder."""
    return "annotations/train.json" if fraction == 1 else f"annotations/train_{fraction:g}.json"


def _write_split(folder: Path, train: Coco, fraction: float, seed: int) -> None:
    count = len(train["images"])
    ids = draw_ids(np.array([image["id"] for image in train["images"]]), fraction, seed).tolist()
    if not ids:
        raise UserError(f"--fractions {fraction:g} of {count} images is none: give a larger one")
    split = {
        "source": "annotations/train.json",
        "images": count,
        "filter_pct": fraction,
        "seed": seed,
        "ids": ids,
    }
    write_text(folder / "splits" / f"{fraction:g}.json", json.dumps(split))
    write_text(folder / annotation_file(fraction), json.dumps(repeated(_select(train, ids), count)))


def repeated(content: Coco, count: int) -> Coco:
    """The images again and again, under new ids, until there are `count`.

    With all fractions equally long, epochs, evaluations and the learning rate schedule come after the same steps.
    """
    boxes: dict[int, list[dict]] = {}
    for box in content["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)
    images, annotations = [], []
    for number in range(count):
        image = content["images"][number % len(content["images"])]
        images.append({**image, "id": number + 1})
        annotations += [{**box, "image_id": number + 1} for box in boxes.get(image["id"], [])]
    annotations = [{**box, "id": number} for number, box in enumerate(annotations, start=1)]
    return {**content, "images": images, "annotations": annotations}


# ----------------------------------------------------------------------------------------------- unlabelled images


def write_unlabelled(args: Namespace, folder: Path, parts: dict[str, Coco]) -> dict[str, Any]:
    """Copies, and the list of all images to pre-train on: none that is in val or test. Returns counts."""
    names, sources, unreadable = [], [], 0
    folders = [ImageFolder(str(place)) for place in args.unlabelled]
    drawn = draw_unlabelled(
        [len(images) for images in folders], args.max_unlabelled, args.split_seed
    )
    for number, images in enumerate(folders):
        for i in progress(drawn[number], f"unlabelled images {number + 1}/{len(folders)}"):
            relative = f"unlabelled/{number}/{small_name(images.name(i))}"
            try:
                shrink(images.file(i), folder / relative, args)
                names.append(relative)
            except BadImageError as error:
                log.warning("skipped %s: %s", images.path(i), error)
                unreadable += 1
        sources.append({"source": _short(args.unlabelled[number]), "images": len(drawn[number])})
    held_out = [
        folder / "labelled" / image["file_name"]
        for part in ("val", "test")
        for image in parts[part]["images"]
    ]
    copies = same_images([folder / name for name in names], held_out)
    for path in copies:
        log.info("skipped %s: it is one of the held-out images", path.relative_to(folder))
        path.unlink()
    names = [name for name in names if folder / name not in copies]
    train = (
        []
        if args.no_labelled_images
        else [f"labelled/{image['file_name']}" for image in parts["train"]["images"]]
    )
    if not names and not train:
        raise UserError(
            "no unlabelled image: give --unlabelled FOLDER, or remove --no_labelled_images"
        )
    write_text(folder / "unlabelled.txt", "".join(f"{name}\n" for name in [*names, *train]))
    return {
        "images": len(names) + len(train),
        "sources": sources,
        "of_the_labelled_training_part": len(train),
        "skipped_as_held_out": len(copies),
        "unreadable": unreadable,
    }


def draw_unlabelled(lengths: list[int], most: int | None, seed: int) -> list[list[int]]:
    """Of folders with so many images the indices of those that are used, at most `most` in all."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if lengths else 0
    chosen = (
        np.arange(total)
        if most is None or most >= total
        else draw_ids(np.arange(total), most / total, seed)
    )
    owners = np.searchsorted(ends, chosen, side="right")
    return [(chosen[owners == i] - (ends[i] - length)).tolist() for i, length in enumerate(lengths)]


def small_name(name: str) -> str:
    """`a/b.jpg` stays, `a/b.png` becomes `a/b.png.jpg`: two files never get one name."""
    path = PurePosixPath(name)
    return str(path) if path.suffix == ".jpg" else f"{path}.jpg"


def shrink(
    source: ImageFile, target: Path, args: Namespace
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Writes a JPEG whose short side is at most `args.image_size`; one that exists is kept, and a JPEG that is small
    enough is copied as it is. Returns the old and the new (width, height).

    Raises:
        BadImageError: the source can't be used.
    """
    try:
        with Image.open(target) as done, Image.open(open_file(source)) as image:
            return image.size, done.size
    except (OSError, ValueError):
        pass
    image = open_image(source)
    if min(image.size) < MIN_SIDE:
        raise BadImageError(f"{image.width} x {image.height} pixels are too few")
    factor = min(
        1.0, args.image_size / min(image.size), MAX_RATIO * args.image_size / max(image.size)
    )
    size, data = tuple(max(1, round(side * factor)) for side in image.size), read_bytes(source)
    if factor < 1 or not data.startswith(JPEG):
        small, file = (
            image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image,
            BytesIO(),
        )
        small.save(file, "JPEG", quality=args.quality, optimize=True)
        data = file.getvalue()
    write_atomically(target, lambda out: out.write(data))
    return image.size, size


def same_images(files: list[Path], held_out: list[Path]) -> set[Path]:
    """Those of `files` that show the same as one of `held_out`, whatever their size and quality."""
    if not files or not held_out:
        return set()
    thumbnails = np.stack([thumbnail(path) for path in held_out])
    shown = progress(files, "comparing with held-out images")
    return {path for path in shown if (thumbnails @ thumbnail(path)).max() >= SAME}


def thumbnail(path: Path) -> np.ndarray:
    """float32 [256] of mean 0 and length 1: the brightness of 16 x 16 pixels."""
    with Image.open(path) as image:
        pixels = np.asarray(
            image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32
        ).ravel()
    pixels -= pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


# ---------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no prepared data, or its files were changed.
    """
    manifest = read_record(folder / MANIFEST)
    if not manifest:
        remedy = f"make it by `tools/transfer_study.py prepare --output_dir {folder}`"
        raise UserError(f"--data {folder} holds no {MANIFEST}: {remedy}")
    for name, digest in manifest["sha256"].items():
        if name != "all images" and (
            not (folder / name).is_file() or _sha256(folder / name) != digest
        ):
            raise UserError(
                f"--data {folder}: {name} is not what was prepared: prepare it again into another folder"
            )
    return manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
