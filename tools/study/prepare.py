"""The data of a transfer study: resized images, boxes in their pixels, fixed splits, and a manifest.

annotations/{train,val,test}.json  in COCO's format; `val` is split off the dataset's training images
annotations/train_0.1.json         the images of splits/0.1.json, repeated until there are as many as in train.json
annotations/true_boxes.json        boxes of all classes of the training images
splits/0.1.json                    image ids, for --split_file
labelled/{train,test}/             images of train and val, and of test
labelled/true_boxes.txt            training images with a box
unlabelled/N/                      images of the N-th folder of --unlabelled
unlabelled.txt                     all images to pre-train on
settings.json                      flags of the call; written first
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
from datasets.evaluators.proposals import OBJECT_ID
from datasets.images.image_folder import (
    NO_SIZE,
    ImageFile,
    ImageFolder,
    decode_image,
    read_bytes,
)
from datasets.images.image_info import inspect_header
from datasets.images.pixels import ROTATED
from datasets.labelled.coco import CocoDetection
from datasets.labelled.subsets import sample_image_ids
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import check_outside_images, make_folder, write_atomically, write_text
from util.logger import log, progress
from util.runs.folder import read_json_object
from util.settings import resolve

FORMAT = 2  # 1 listed only images with two boxes or more in true_boxes.txt
MANIFEST, SETTINGS = "manifest.json", "settings.json"
DATA_FLAGS = [  # of finetune_main.py
    *("coco_path", "data_root", "dataset_file", "voc_path", "voc_train", "voc_val", "airbus_path"),
    *("train_images", "train_annotations", "val_images", "val_annotations"),
]
OWN_FLAGS = [
    *("unlabelled", "no_labelled_images", "max_unlabelled", "image_size", "quality", "val_share"),
    *("fractions", "split_seed", "min_objects", "one_class"),
]
MAX_RATIO = 1333 / 800  # long side / --image_size at most; DETR's sizes in training
MIN_SIDE = 17  # pixels; pre-training skips smaller images
# Images count as duplicates if the correlation of their thumbnails is at least this.
DUPLICATE_CORRELATION = 0.99
JPEG_MAGIC = b"\xff\xd8\xff"  # first bytes of a JPEG file

Coco = dict[str, Any]  # content of a COCO annotation file


def prepare(args: Namespace) -> None:
    """Write the study's data; images that an interrupted call wrote are reused.

    Raises:
        UserError: sources are missing or unusable, or the folder has data with other settings.
    """
    folder, settings = args.output_dir, _settings(args)
    if _is_prepared(folder, settings, args.unlabelled):
        log.info("%s is finished", folder)
        return

    parts = write_labelled(args, folder)
    unlabelled = write_unlabelled(args, folder, parts)

    texts = [*folder.glob("annotations/*"), *folder.glob("splits/*"), *folder.rglob("*.txt")]
    images = sorted(folder.rglob("*.jpg"))
    # One hash over all images: the manifest stays short, and `run` does not have to read them.
    image_hashes = json.dumps(_hashes(images, folder))
    manifest: dict[str, Any] = {
        "command": portable_command(),
        "settings": settings,
        **{name: _summarize(part) for name, part in parts.items()},
        "unlabelled": unlabelled,
        "sha256": {
            **_hashes(sorted(texts), folder),
            "all images": hashlib.sha256(image_hashes.encode()).hexdigest(),
        },
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    counts = ", ".join(f"{manifest[name]['images']} {name}" for name in (*parts, "unlabelled"))
    megabytes = sum(path.stat().st_size for path in images) / 1e6
    log.info("%s: %s images; %.1f MB", folder, counts, megabytes)


def _hashes(paths: list[Path], folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}


def _settings(args: Namespace) -> dict[str, Any]:
    """Return what decides the content of the data; another Pillow may resize and compress differently."""
    given = {name: getattr(args, name) for name in (*DATA_FLAGS, *OWN_FLAGS)}
    given["unlabelled"] = [_short_path(folder) for folder in args.unlabelled]
    for name, value in given.items():
        if isinstance(value, str) and "/" in value:
            given[name] = _short_path(value)
    # Through JSON, so that it equals what is read back from settings.json.
    return json.loads(json.dumps({**given, "pillow": pillow_version, "format": FORMAT}))


def _short_path(path: str) -> str:
    """Return the last two parts: enough to recognize a source, without directories of the user's disk."""
    return "/".join(Path(path).resolve().parts[-2:])


def portable_command() -> str:
    """Return the command line without directories of the user's disk."""
    argv = [
        _short_path(word) if word.startswith(("/", "..", "~")) else word for word in sys.argv[1:]
    ]
    return shlex.join(["python", "tools/transfer_study.py", *argv])


def _is_prepared(folder: Path, settings: dict[str, Any], sources: list[str]) -> bool:
    for source in sources:
        check_outside_images(folder, source)
    make_folder(folder)

    before = read_json_object(folder / SETTINGS)
    if not before and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} has other files: choose another folder")
    if before:
        for name, value in settings.items():
            if before.get(name) != value:
                was = f"was prepared with {name} {before.get(name)}, now it is {value}"
                raise UserError(f"--output_dir {folder} {was}: choose another folder")

    # First of all files: an interrupted call can only continue with the same settings.
    write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return (folder / MANIFEST).exists()


# ------------------------------------------------------------------------------------------------- labelled images


def write_labelled(args: Namespace, folder: Path) -> dict[str, Coco]:
    """Write images, annotations and splits; return the content of train, val and test."""
    settings = resolve({name: getattr(args, name) for name in DATA_FLAGS})
    train = _resize_dataset(build_dataset("train", settings), folder, "train", args)
    # The dataset's own validation images are the study's test images.
    test = _resize_dataset(build_dataset("val", settings), folder, "test", args)

    ids = {image["id"] for image in train["images"]}
    val_ids = set(sample_image_ids(np.array(sorted(ids)), args.val_share, args.split_seed).tolist())
    parts = {
        "train": _select_images(train, ids - val_ids),
        "val": _select_images(train, val_ids),
        "test": test,
    }

    # Before rare classes are dropped: as proposals, all objects count.
    _write_gt_boxes(folder, parts["train"])
    classes = _frequent_classes(parts, args.min_objects)
    parts = {name: _select_classes(part, classes) for name, part in parts.items()}
    if args.one_class:
        parts = {name: _merge_classes(part) for name, part in parts.items()}

    for name, part in parts.items():
        if name == "val" and not args.val_share:
            continue
        if not _objects_per_class(part):
            raise UserError(
                f"the {name} images have no box: use more data, or change --val_share or --min_objects"
            )
        write_text(folder / "annotations" / f"{name}.json", json.dumps(part))

    for fraction in args.fractions:
        if fraction < 1:
            _write_split(folder, parts["train"], fraction, args.split_seed)
    return parts


def _select_images(content: Coco, ids: Collection[int]) -> Coco:
    images = [image for image in content["images"] if image["id"] in ids]
    boxes = [box for box in content["annotations"] if box["image_id"] in ids]
    return {**content, "images": images, "annotations": boxes}


def _select_classes(content: Coco, ids: Collection[int]) -> Coco:
    boxes = [box for box in content["annotations"] if box["category_id"] in ids]
    classes = [category for category in content["categories"] if category["id"] in ids]
    return {**content, "annotations": boxes, "categories": classes}


def _merge_classes(content: Coco) -> Coco:
    """Give all boxes the one class "object"."""
    boxes = [{**box, "category_id": OBJECT_ID} for box in content["annotations"]]
    return {**content, "annotations": boxes, "categories": [{"id": OBJECT_ID, "name": "object"}]}


def _objects_per_class(content: Coco) -> Counter:
    """Return category id -> number of boxes, without crowds."""
    return Counter(box["category_id"] for box in content["annotations"] if not box["iscrowd"])


def _class_names(content: Coco) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _summarize(content: Coco) -> dict[str, Any]:
    names, objects = _class_names(content), _objects_per_class(content)
    per_class = {names[class_id]: count for class_id, count in sorted(objects.items())}
    return {"images": len(content["images"]), "boxes": objects.total(), "boxes_by_class": per_class}


def _frequent_classes(parts: dict[str, Coco], min_objects: int) -> set[int]:
    """Return the classes with enough objects to train on and to measure.

    COCO's AP is a mean over classes: one with three test objects adds noise at full weight.
    """
    names = _class_names(parts["train"])
    counts = [_objects_per_class(parts[name]) for name in ("train", "test")]
    kept = {
        class_id for class_id in names if all(count[class_id] >= min_objects for count in counts)
    }
    if not kept:
        raise UserError(
            f"--min_objects {min_objects}: no class has as many objects in train and test; use a smaller one"
        )

    if min_objects:
        kept_names = ", ".join(names[class_id] for class_id in sorted(kept))
        log.info("classes with %d objects or more: %s", min_objects, kept_names)
    return kept


def _resize_dataset(source: CocoDetection, folder: Path, name: str, args: Namespace) -> Coco:
    """Write the resized images of a dataset and return its annotations in their pixels."""
    content = source.annotations.to_coco()
    sizes_hw = source.annotations.sizes_hw
    images, scales = [], {}
    for i, image in enumerate(progress(content["images"], f"{name} images")):
        relative = f"{name}/{jpeg_name(image['file_name'])}"
        try:
            (width, height), (new_width, new_height) = resize_image(
                source.path(i), folder / "labelled" / relative, args, tuple(sizes_hw[i].tolist())
            )
            # A size of 0 means that the annotations do not tell it.
            if sizes_hw[i].all() and tuple(sizes_hw[i]) != (height, width):
                raise BadImageError("its size differs from the one in the annotations")
        except BadImageError as error:
            if name == "test":  # AP on a part of the test images would be another metric
                raise UserError(
                    f"{source.path(i)}: {error}; the test needs all of its images, replace it"
                ) from error
            log.warning("skipped %s: %s", source.path(i), error)
            continue

        scales[image["id"]] = (new_width / width, new_height / height)
        images.append(
            {"id": image["id"], "file_name": relative, "height": new_height, "width": new_width}
        )

    # `to_coco` has no crowds, because training does not use them.
    objects = [*content["annotations"], *_crowd_annotations(source, len(content["annotations"]))]
    boxes = [
        _scale_box(box, *scales[box["image_id"]]) for box in objects if box["image_id"] in scales
    ]
    return {**content, "images": images, "annotations": boxes}


def _crowd_annotations(source: CocoDetection, last_id: int) -> list[dict[str, Any]]:
    """Return COCO's crowd regions: training skips them, and evaluation ignores detections in them."""
    labels = {category_id: label for label, category_id in (source.category_ids or {}).items()}
    crowds = [
        {**box, "category_id": labels.get(box["category_id"], box["category_id"])}
        for box in source.ground_truth["annotations"]
        if box["iscrowd"]
    ]
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    return [
        {"id": last_id + i, **{key: box[key] for key in keys}}
        for i, box in enumerate(crowds, start=1)
    ]


def _scale_box(box: dict[str, Any], x: float, y: float) -> dict[str, Any]:
    """Scale an annotation's bbox (x, y, w, h) and area."""
    bbox = [round(value * scale, 2) for value, scale in zip(box["bbox"], (x, y, x, y), strict=True)]
    return {**box, "bbox": bbox, "area": round(box["area"] * x * y, 2)}


def _write_gt_boxes(folder: Path, train: Coco) -> None:
    """Write ground-truth boxes as proposals, and the list of images that have any."""
    content = {**train, "annotations": [box for box in train["annotations"] if not box["iscrowd"]]}
    with_box = {box["image_id"] for box in content["annotations"]}
    names = sorted(image["file_name"] for image in content["images"] if image["id"] in with_box)

    write_text(folder / "annotations" / "true_boxes.json", json.dumps(content))
    write_text(folder / "labelled" / "true_boxes.txt", "".join(f"{name}\n" for name in names))


def annotation_file(fraction: float) -> str:
    """Return the training annotations for a fraction of the labels, relative to the data's folder."""
    return "annotations/train.json" if fraction == 1 else f"annotations/train_{fraction:g}.json"


def _write_split(folder: Path, train: Coco, fraction: float, seed: int) -> None:
    all_ids = np.array([image["id"] for image in train["images"]])
    ids = sample_image_ids(all_ids, fraction, seed).tolist()
    if not ids:
        raise UserError(
            f"--fractions {fraction:g} of {len(all_ids)} images is none: use a larger one"
        )

    split = {
        "source": "annotations/train.json",
        "images": len(all_ids),
        "filter_pct": fraction,
        "seed": seed,
        "ids": ids,
    }
    write_text(folder / "splits" / f"{fraction:g}.json", json.dumps(split))
    subset = repeat_images(_select_images(train, ids), len(all_ids))
    write_text(folder / annotation_file(fraction), json.dumps(subset))


def repeat_images(content: Coco, count: int) -> Coco:
    """Repeat the images under new ids until there are `count`.

    All fractions then have equally long epochs, so evaluations and learning rate drops come after the same steps.
    """
    boxes: dict[int, list[dict]] = {}
    for box in content["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)

    images, annotations = [], []
    for i in range(count):
        image = content["images"][i % len(content["images"])]
        images.append({**image, "id": i + 1})
        annotations += [{**box, "image_id": i + 1} for box in boxes.get(image["id"], [])]
    annotations = [{**box, "id": box_id} for box_id, box in enumerate(annotations, start=1)]
    return {**content, "images": images, "annotations": annotations}


# ----------------------------------------------------------------------------------------------- unlabelled images


def write_unlabelled(args: Namespace, folder: Path, parts: dict[str, Coco]) -> dict[str, Any]:
    """Write resized images and the list of all images to pre-train on; return counts for the manifest.

    Images that look like one of val or test are skipped: pre-training must not see what AP is measured on.
    """
    names, sources, num_unreadable = _resize_unlabelled(args, folder)

    held_out = [
        folder / "labelled" / image["file_name"]
        for part in ("val", "test")
        for image in parts[part]["images"]
    ]
    duplicates = find_duplicates([folder / name for name in names], held_out)
    for path in duplicates:
        log.info("skipped %s: it shows a held-out image", path.relative_to(folder))
        path.unlink()
    names = [name for name in names if folder / name not in duplicates]

    train = []
    if not args.no_labelled_images:
        train = [f"labelled/{image['file_name']}" for image in parts["train"]["images"]]
    if not names and not train:
        raise UserError(
            "no image to pre-train on: give --unlabelled FOLDER, or remove --no_labelled_images"
        )

    write_text(folder / "unlabelled.txt", "".join(f"{name}\n" for name in [*names, *train]))
    return {
        "images": len(names) + len(train),
        "sources": sources,
        "of_the_labelled_training_part": len(train),
        "skipped_as_held_out": len(duplicates),
        "unreadable": num_unreadable,
    }


def _resize_unlabelled(
    args: Namespace, folder: Path
) -> tuple[list[str], list[dict[str, Any]], int]:
    """Return the names of the written images, facts about each source, and the number of unreadable images."""
    names, sources, num_unreadable = [], [], 0
    folders = [ImageFolder(str(source)) for source in args.unlabelled]
    drawn = draw_unlabelled(
        [len(images) for images in folders], args.max_unlabelled, args.split_seed
    )

    for number, images in enumerate(folders):
        for i in progress(drawn[number], f"unlabelled images {number + 1}/{len(folders)}"):
            relative = f"unlabelled/{number}/{jpeg_name(images.name(i))}"
            try:
                resize_image(images.file(i), folder / relative, args)
                names.append(relative)
            except BadImageError as error:
                log.warning("skipped %s: %s", images.path(i), error)
                num_unreadable += 1
        source = {"source": _short_path(args.unlabelled[number]), "images": len(drawn[number])}
        sources.append(source)
    return names, sources, num_unreadable


def draw_unlabelled(lengths: list[int], max_images: int | None, seed: int) -> list[list[int]]:
    """Draw images from all folders together, each with the same probability.

    Args:
        lengths: number of images in each folder.
        max_images: number of images to draw; None for all.

    Returns:
        For each folder the indices of its drawn images.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if lengths else 0
    chosen = np.arange(total)  # indices into the concatenation of all folders
    if max_images is not None and max_images < total:
        chosen = sample_image_ids(chosen, max_images / total, seed)

    owners = np.searchsorted(ends, chosen, side="right")
    return [(chosen[owners == i] - (ends[i] - length)).tolist() for i, length in enumerate(lengths)]


def jpeg_name(name: str) -> str:
    """Return the name of an image's JPEG copy: `a/b.jpg` stays, `a/b.png` becomes `a/b.png.jpg`.

    The old extension is kept so that `b.png` and `b.jpg` do not get the same name.
    """
    path = PurePosixPath(name)
    return str(path) if path.suffix == ".jpg" else f"{path}.jpg"


def resize_image(
    source: ImageFile, target: Path, args: Namespace, listed_hw: tuple[int, int] = NO_SIZE
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Write a JPEG with a short side of at most `args.image_size`; return the old and the new (width, height).

    A target that exists is kept. A JPEG that is small enough is copied, since compressing it again would lose quality.

    Args:
        listed_hw: (height, width) in the annotations, which decide whether an EXIF orientation is applied.

    Raises:
        BadImageError: the source can't be used.
    """
    try:
        with Image.open(target) as done:
            written = done.size
        info = inspect_header(source, None, listed_hw)
        if not info.error:
            return info.size_hw[::-1], written
    except (OSError, ValueError):
        pass  # missing or damaged: write it

    decoded = decode_image(source, None, listed_hw)
    image = decoded.image
    if min(image.size) < MIN_SIDE:
        raise BadImageError(f"{image.width} x {image.height} pixels are too few")

    limits = (args.image_size / min(image.size), MAX_RATIO * args.image_size / max(image.size))
    factor = min(1.0, *limits)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    data = read_bytes(source)
    if factor < 1 or not data.startswith(JPEG_MAGIC) or decoded.rotation == ROTATED:
        small = image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image
        file = BytesIO()
        small.save(file, "JPEG", quality=args.quality, optimize=True)
        data = file.getvalue()

    write_atomically(target, lambda out: out.write(data))
    return image.size, size


def find_duplicates(files: list[Path], held_out: list[Path]) -> set[Path]:
    """Return the `files` that show the same as one of `held_out`, at any size and quality."""
    if not files or not held_out:
        return set()
    thumbnails = np.stack([thumbnail(path) for path in held_out])  # [N, 256]
    duplicates = set()
    for path in progress(files, "comparing with held-out images"):
        correlations = thumbnails @ thumbnail(path)  # [N]
        if correlations.max() >= DUPLICATE_CORRELATION:
            duplicates.add(path)
    return duplicates


def thumbnail(path: Path) -> np.ndarray:
    """Return the gray values of 16 x 16 pixels as float32 [256] with mean 0 and norm 1.

    The dot product of two is their correlation, which ignores brightness and contrast.
    """
    with Image.open(path) as image:
        gray = image.convert("L").resize((16, 16), Image.Resampling.BOX)
        pixels = np.asarray(gray, dtype=np.float32).ravel()  # [16, 16] -> [256]
    pixels -= pixels.mean()
    # An image of one color has norm 0.
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


# ---------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check the hashes of all files but images.

    Raises:
        UserError: no prepared data, or its files have changed.
    """
    manifest = read_json_object(folder / MANIFEST)
    if not manifest:
        remedy = f"make it by `tools/transfer_study.py prepare --output_dir {folder}`"
        raise UserError(f"--data {folder} has no {MANIFEST}: {remedy}")

    for name, digest in manifest["sha256"].items():
        if name == "all images":
            continue
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise UserError(
                f"--data {folder}: {name} has changed since it was prepared; prepare it again into another folder"
            )
    return manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
