"""The data of a transfer study: small copies of the images, boxes in their pixels, fixed splits, and a manifest of it
all.

annotations/{train,val,test}.json    COCO's format; `val` is cut off from the source's training part, `test` is its
evaluation part annotations/train_0.1.json           the images of splits/0.1.json, listed again until an epoch is as
long as one of train.json splits/0.1.json                      their ids, for --split_file
labelled/{train,test}/               images of train and val, and of test
labelled/true_boxes.txt              training images with two boxes or more, for pre-training on
annotations/true_boxes.json unlabelled/N/, unlabelled.txt        images of source N; the list of all that are
pre-trained on manifest.json                        counts, seeds, hashes; written last
"""

import hashlib
import json
import math
import shlex
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from datasets import build_dataset
from datasets.images.image_folder import ImageFile, ImageFolder, open_file, open_image, read_bytes
from datasets.labelled.annotations import Annotations, read_json
from datasets.labelled.coco import CocoDetection
from datasets.labelled.subsets import draw_ids
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import check_apart, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.runs.folder import read_record
from util.settings.arguments import make_parser, resolve
from util.settings.flags import FINETUNE

MANIFEST, BEGUN = "manifest.json", "settings.json"
DATA_FLAGS = (
    "coco_path",
    "data_root",
    "dataset_file",
    "voc_path",
    "voc_train",
    "voc_val",
    "airbus_path",
    "train_images",
    "train_annotations",
    "val_images",
    "val_annotations",
)
LONGEST = 1333 / 800  # of the short side, as in training
JPEG = b"\xff\xd8\xff"  # how such a file begins
SMALLEST = 17  # pixels of a side; pre-training leaves out what is smaller
SAME = 0.99  # correlation of two pictures of 16 x 16 pixels from which on they count as the same one


@dataclass
class Part:
    """Images and boxes of train, val or test after resizing, as COCO content."""

    content: dict[str, Any]
    dropped: int = 0

    @property
    def ids(self) -> list[int]:
        return [image["id"] for image in self.content["images"]]

    def only(self, ids: set[int]) -> "Part":
        images = [image for image in self.content["images"] if image["id"] in ids]
        boxes = [box for box in self.content["annotations"] if box["image_id"] in ids]
        return Part({**self.content, "images": images, "annotations": boxes})

    def of_classes(self, ids: set[int]) -> "Part":
        boxes = [box for box in self.content["annotations"] if box["category_id"] in ids]
        classes = [category for category in self.content["categories"] if category["id"] in ids]
        return Part({**self.content, "annotations": boxes, "categories": classes})

    def objects(self) -> Counter:
        """category id -> boxes, without those of crowds."""
        return Counter(box["category_id"] for box in self.content["annotations"] if not box["iscrowd"])

    def describe(self) -> dict[str, Any]:
        names = {category["id"]: category["name"] for category in self.content["categories"]}
        per_class = {names[number]: count for number, count in sorted(self.objects().items())}
        return {"images": len(self.ids), "boxes": sum(self.objects().values()), "boxes_by_class": per_class}


def short_place(path: str | Path) -> str:
    """The last two parts of a path: what a manifest says of where data came from."""
    return "/".join(Path(path).resolve().parts[-2:])


def shown_command(words: list[str]) -> str:
    """As it was typed, without the places of one's own disk."""
    shown = ["/".join(Path(word).parts[-2:]) if word.startswith(("/", "..", "~")) else word for word in words[1:]]
    return shlex.join(["python", "tools/transfer_study.py", *shown])


def prepare(args: Namespace) -> Path:
    """Writes the study's data; what an earlier, interrupted call wrote is kept. Returns the manifest's path.

    Raises:
        UserError: sources are missing or can't be used, or the folder holds data of other settings.
    """
    folder = args.output_dir
    settings = {
        "labelled": {name: _short(getattr(args, name)) for name in DATA_FLAGS if getattr(args, name)},
        "unlabelled": [short_place(place) for place in args.unlabelled],
        "image_size": args.image_size,
        "quality": args.quality,
        "val_share": args.val_share,
        "fractions": args.fractions,
        "split_seed": args.split_seed,
        "min_objects": args.min_objects,
        "labelled_without_labels": not args.no_labelled_images,
        "max_unlabelled": args.max_unlabelled,
        "pillow": pillow_version,
    }
    if _begin(folder, settings, [*args.unlabelled]):
        log.info("%s is finished", folder)
        return folder / MANIFEST
    parts = write_labelled(args, folder)
    facts = write_unlabelled(args, folder, parts)
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in _texts(folder)}
    images = sorted(path for name in ("labelled", "unlabelled") for path in (folder / name).rglob("*.jpg"))
    size = sum(path.stat().st_size for path in images)
    manifest = {
        "command": shown_command(sys.argv),
        "settings": settings,
        **{name: part.describe() for name, part in parts.items()},
        **facts,
        "image_files": len(images),
        "image_bytes": size,
        "sha256": {**hashes, "all images": _digest(folder, images)},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    log.info(
        "%s: %d training, %d validation, %d test and %d unlabelled images; %.1f MB in %d files",
        folder,
        len(parts["train"].ids),
        len(parts["val"].ids),
        len(parts["test"].ids),
        facts["unlabelled"]["images"],
        size / 1e6,
        len(images),
    )
    return folder / MANIFEST


def _short(value: Any) -> Any:
    return short_place(value) if isinstance(value, str) and "/" in value else value


def _begin(folder: Path, settings: dict[str, Any], sources: list[str]) -> bool:
    """Whether all is done already."""
    for source in sources:
        check_apart(folder, source)
    make_folder(folder)
    before, settings = read_record(folder / BEGUN), json.loads(json.dumps(settings))
    differing = [name for name in settings if before and before.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"--output_dir {folder} was prepared with {name} {before.get(name)}, now it is {settings[name]}: choose "
            "another folder"
        )
    if not before and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds something that is not of a study: choose another folder")
    write_text(folder / BEGUN, json.dumps(settings, indent=1) + "\n")
    return (folder / MANIFEST).exists()


# ------------------------------------------------------------------------------------------------------------- labelled
# images


def write_labelled(args: Namespace, folder: Path) -> dict[str, Part]:
    """train, val and test with their images, splits and annotation files."""
    settings = make_parser(FINETUNE).parse_args([])
    for name in DATA_FLAGS:
        setattr(settings, name, getattr(args, name))
    resolve(settings)
    sources = {name: build_dataset(image_set, settings) for name, image_set in (("train", "train"), ("test", "val"))}
    both = {name: _shrink_all(source, folder, name, args) for name, source in sources.items()}
    if both["test"].dropped:
        raise UserError(
            f"{sources['test'].annotation_file}: {both['test'].dropped} images can't be read, see above: a test needs "
            "all of them"
        )
    whole = both["train"]
    cut = set(draw_ids(np.array(whole.ids), args.val_share, args.split_seed).tolist())
    parts = {"train": whole.only(set(whole.ids) - cut), "val": whole.only(cut), "test": both["test"]}
    _write_true_boxes(folder, parts["train"])
    kept = _frequent(parts, args.min_objects)
    parts = {name: part.of_classes(kept) for name, part in parts.items()}
    for name, part in parts.items():
        if name == "val" and not args.val_share:
            continue
        if not part.ids or not part.objects():
            raise UserError(
                f"the {name} part has {len(part.ids)} images and no box: give more data, or other --val_share and "
                "--min_objects"
            )
        write_text(folder / "annotations" / f"{name}.json", json.dumps(part.content))
    for fraction in args.fractions:
        _write_split(folder, parts["train"], fraction, args.split_seed)
    return parts


def _frequent(parts: dict[str, Part], least: int) -> set[int]:
    """Classes with enough objects to train on and to measure; AP of a class with three objects in the test is noise."""
    counts = [parts[name].objects() for name in ("train", "test")]
    classes = {category["id"]: category["name"] for category in parts["train"].content["categories"]}
    kept = {number for number in classes if all(count[number] >= least for count in counts)}
    if least and kept:
        log.info(
            "classes with %d objects or more in both parts: %s",
            least,
            ", ".join(classes[number] for number in sorted(kept)),
        )
    if not kept:
        raise UserError(
            f"--min_objects {least}: no class has as many objects in training and in test; give a smaller number"
        )
    return kept


def _shrink_all(source: CocoDetection, folder: Path, name: str, args: Namespace) -> Part:
    annotations: Annotations = source.annotations
    content = annotations.as_coco()
    bar, kept, scales, dropped = Progress(len(source), f"{name} images"), [], {}, 0
    for i, image in enumerate(content["images"]):
        relative = f"{name}/{small_name(image['file_name'])}"
        try:
            (width, height), (new_width, new_height) = shrink(source.path(i), folder / "labelled" / relative, args)
            if annotations.sizes_hw[i].all() and tuple(annotations.sizes_hw[i]) != (height, width):
                raise BadImageError("its size is not the one in the annotations")
        except BadImageError as error:
            log.warning("left out %s: %s", source.path(i), error)
            dropped += 1
        else:
            scales[image["id"]] = new_width / width, new_height / height
            kept.append({"id": image["id"], "file_name": relative, "height": new_height, "width": new_width})
        bar.step()
    objects = content["annotations"] + _crowds(source, len(content["annotations"]))
    boxes = [_scaled(box, *scales[box["image_id"]]) for box in objects if box["image_id"] in scales]
    return Part({**content, "images": kept, "annotations": boxes}, dropped)


def _crowds(source: CocoDetection, last: int) -> list[dict[str, Any]]:
    """Regions of many objects in COCO's files: nobody learns them, and evaluation counts what is found there as neither
    right nor wrong.
    """
    truth, labels = source.truth(), {number: label for label, number in (source.category_ids or {}).items()}
    content = read_json(truth) if isinstance(truth, str) else truth
    return [
        {
            "id": number,
            "image_id": box["image_id"],
            "category_id": labels.get(box["category_id"], box["category_id"]),
            "bbox": box["bbox"],
            "area": box.get("area", box["bbox"][2] * box["bbox"][3]),
            "iscrowd": 1,
        }
        for number, box in enumerate((box for box in content["annotations"] if box.get("iscrowd")), start=last + 1)
    ]


def _scaled(box: dict[str, Any], x: float, y: float) -> dict[str, Any]:
    left, top, width, height = box["bbox"]
    return {
        **box,
        "bbox": [round(value, 2) for value in (left * x, top * y, width * x, height * y)],
        "area": round(box["area"] * x * y, 2),
    }


def _write_true_boxes(folder: Path, train: Part) -> None:
    """Boxes of all classes, for a region prior that knows the truth; an image has to have two."""
    content = {**train.content, "annotations": [box for box in train.content["annotations"] if not box["iscrowd"]]}
    boxes = Counter(box["image_id"] for box in content["annotations"])
    names = [image["file_name"] for image in content["images"] if boxes[image["id"]] > 1]
    write_text(folder / "annotations" / "true_boxes.json", json.dumps(content))
    write_text(folder / "labelled" / "true_boxes.txt", "".join(f"{name}\n" for name in sorted(names)))


def split_name(fraction: float) -> str:
    return f"{fraction:g}"


def annotation_file(fraction: float) -> str:
    """Below the data's folder."""
    return "annotations/train.json" if fraction == 1 else f"annotations/train_{split_name(fraction)}.json"


def _write_split(folder: Path, train: Part, fraction: float, seed: int) -> None:
    if fraction == 1:
        return
    ids = draw_ids(np.array(train.ids), fraction, seed).tolist()
    if not ids:
        raise UserError(f"--fractions {fraction:g} of {len(train.ids)} images is none: give a larger one")
    record = {
        "source": "annotations/train.json",
        "images": len(train.ids),
        "filter_pct": fraction,
        "seed": seed,
        "ids": ids,
    }
    write_text(folder / "splits" / f"{split_name(fraction)}.json", json.dumps(record))
    write_text(folder / annotation_file(fraction), json.dumps(repeated(train.only(set(ids)).content, len(train.ids))))


def repeated(content: dict[str, Any], count: int) -> dict[str, Any]:
    """COCO content whose images come again under new ids until there are `count`.

    Epochs of few images would spend their time on checkpoints and evaluations, and rate schedules and curves could not
    be compared.
    """
    boxes: dict[int, list[dict]] = {}
    for box in content["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)
    images, annotations = [], []
    for number in range(1, count + 1):
        image = content["images"][(number - 1) % len(content["images"])]
        images.append({**image, "id": number})
        for box in boxes.get(image["id"], ()):
            annotations.append({**box, "id": len(annotations) + 1, "image_id": number})
    return {**content, "images": images, "annotations": annotations}


# ------------------------------------------------------------------------------------------------------------
# unlabelled images


def write_unlabelled(args: Namespace, folder: Path, parts: dict[str, Part]) -> dict[str, Any]:
    """Copies, and the list of what may be pre-trained on: nothing that is in val or test."""
    names, sources, unreadable = [], [], 0
    folders = [ImageFolder(str(place)) for place in args.unlabelled]
    drawn = draw_unlabelled([len(images) for images in folders], args.max_unlabelled, args.split_seed)
    for number, (place, images) in enumerate(zip(args.unlabelled, folders, strict=True)):
        bar = Progress(len(drawn[number]), f"unlabelled images {number + 1}/{len(args.unlabelled)}")
        found = []
        for i in drawn[number]:
            relative = f"unlabelled/{number}/{small_name(images.name(i))}"
            try:
                shrink(images.file(i), folder / relative, args)
                found.append(relative)
            except BadImageError as error:
                log.warning("left out %s: %s", images.path(i), error)
                unreadable += 1
            bar.step()
        sources.append({"source": short_place(place), "images": len(found)})
        names += found
    held_out = [
        folder / "labelled" / image["file_name"] for name in ("val", "test") for image in parts[name].content["images"]
    ]
    copies = same_pictures([folder / name for name in names], held_out)
    for name in copies:
        log.info("left out %s: it is one of the held-out images", name.relative_to(folder))
        name.unlink()
    names = [name for name in names if folder / name not in copies]
    own = (
        []
        if args.no_labelled_images
        else [f"labelled/{image['file_name']}" for image in parts["train"].content["images"]]
    )
    if not names and not own:
        raise UserError("no unlabelled image: give --unlabelled FOLDER, or leave out --no_labelled_images")
    write_text(folder / "unlabelled.txt", "".join(f"{name}\n" for name in [*names, *own]))
    return {
        "unlabelled": {
            "images": len(names) + len(own),
            "sources": sources,
            "of_the_labelled_training_part": len(own),
            "left_out_as_held_out": len(copies),
            "unreadable": unreadable,
        }
    }


def draw_unlabelled(lengths: list[int], most: int | None, seed: int) -> list[list[int]]:
    """Of folders with so many images the indices of those that are used, at most `most` in all."""
    total = sum(lengths)
    chosen = np.arange(total) if most is None or most >= total else draw_ids(np.arange(total), most / total, seed)
    starts = np.cumsum([0, *lengths])
    return [
        (chosen[(chosen >= start) & (chosen < end)] - start).tolist()
        for start, end in zip(starts[:-1], starts[1:], strict=True)
    ]


def small_name(name: str) -> str:
    """`a/b.jpg` stays, `a/b.png` becomes `a/b.png.jpg`: two files never get one name."""
    path = PurePosixPath(name)
    return str(path) if path.suffix == ".jpg" else f"{path}.jpg"


def shrink(source: ImageFile, target: Path, args: Namespace) -> tuple[tuple[int, int], tuple[int, int]]:
    """Writes a JPEG whose short side is `args.image_size` at most; one that is there already is kept. (old, new)
    (width, height).

    A JPEG that is small enough is copied as it is.

    Raises:
        BadImageError: the source can't be used.
    """
    try:
        with Image.open(target) as done, Image.open(open_file(source)) as image:
            return image.size, done.size
    except (OSError, ValueError):
        pass
    image = open_image(source)
    if min(image.size) < SMALLEST:
        raise BadImageError(f"{image.width} x {image.height} pixels are too few")
    factor = min(1.0, args.image_size / min(image.size), LONGEST * args.image_size / max(image.size))
    size, data = tuple(max(1, round(side * factor)) for side in image.size), read_bytes(source)
    if factor < 1 or not data.startswith(JPEG):
        small, file = image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image, BytesIO()
        small.save(file, "JPEG", quality=args.quality, optimize=True)
        data = file.getvalue()
    write_atomically(target, lambda out: out.write(data))
    return image.size, size


def same_pictures(files: list[Path], held_out: list[Path]) -> set[Path]:
    """Those of `files` that show what one of `held_out` shows, in whatever size or quality."""
    if not files or not held_out:
        return set()
    prints = np.stack([fingerprint(path) for path in held_out])
    found, bar = set(), Progress(len(files), "comparing with held-out images")
    for path in files:
        if (prints @ fingerprint(path)).max() >= SAME:
            found.add(path)
        bar.step()
    return found


def fingerprint(path: Path) -> np.ndarray:
    """float32 [256] of mean 0 and length 1: the brightness of a picture of 16 x 16 pixels."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()
    pixels -= pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no prepared data there, or its files were changed.
    """
    manifest = read_record(folder / MANIFEST)
    if not manifest:
        raise UserError(
            f"--data {folder} holds no {MANIFEST}: make it by `tools/transfer_study.py prepare --output_dir {folder}`"
        )
    for name, digest in manifest["sha256"].items():
        if name != "all images" and (not (folder / name).is_file() or _sha256(folder / name) != digest):
            raise UserError(f"--data {folder}: {name} is not what was prepared: prepare it again into another folder")
    return manifest


def steps_an_epoch(manifest: dict[str, Any], batch_size: int) -> int:
    return max(1, math.floor(manifest["train"]["images"] / batch_size))


def _texts(folder: Path) -> list[Path]:
    return sorted(
        [
            *(folder / "annotations").glob("*.json"),
            *(folder / "splits").glob("*.json"),
            folder / "unlabelled.txt",
            folder / "labelled" / "true_boxes.txt",
        ]
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(folder: Path, images: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in images:
        digest.update(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
