"""Synthetic labelled images, so that the demo runs without any dataset.

An image is a crop of a photo with one to three objects on it. The class is the shape (disc, triangle, star, ...). The
surface is a crop of another photo, so color and texture tell nothing about the class. Size, aspect ratio and rotation
vary; objects occlude each other and leave the image; clutter (bars and blobs with the same kind of surface) is
background. Masks and boxes are exact and cover the visible pixels. Everything is a function of (seed, split, index).

The photos are in scikit-image's wheel (`skimage/data`), public domain or CC0 by its documentation (`SOURCE_PHOTOS`).
Held-out images use other photos than training images, for backgrounds, surfaces and clutter.

    python -m tools.demo.scenes --output DIR --num_train 600 --num_val 100 --num_unlabelled 600 --size 160 --seed 1

writes `train2017/`, `val2017/`, `annotations/instances_{train,val}2017.json` (COCO's layout) and `unlabelled/`.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from tools.demo.shapes import OUTLINES, clutter_outlines, random_affine, rasterize
from util.errors import UserError
from util.logger import log, progress, setup_logger

# image, boxes_xyxy_abs, labels, masks: see `make_scene`.
Scene = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Slices = tuple[slice, slice]  # rows and columns

# File in skimage/data -> its license there. Only photos with an explicit statement are used.
SOURCE_PHOTOS = {
    "train": {
        "astronaut.png": "public domain, NASA",
        "coffee.png": "CC0, Rachel Michetti",
        "rocket.jpg": "public domain, SpaceX",
        "hubble_deep_field.jpg": "public domain, NASA",
        "grass.png": "CC0, linolafett",
        "brick.png": "CC0, CC0Textures",
        "clock_motion.png": "public domain, Stefan van der Walt",
    },
    "val": {
        "chelsea.png": "CC0, Stefan van der Walt",
        "retina.jpg": "CC0, Mikael Häggström",
        "gravel.png": "CC0, CC0Textures",
        "camera.png": "CC0, Lav Varshney",
    },
}
# Split -> (number in the random seed, group of photos). Unlabelled images must not show held-out photos.
SPLITS = {"train": (0, "train"), "val": (1, "val"), "unlabelled": (2, "train")}
MAX_PHOTO_SIDE = 720  # pixels; larger photos are reduced when they are read

CLASS_NAMES = ("disc", "triangle", "star", "ring", "cross", "crescent")
DEFAULT_NUM_CLASSES = 4
MIN_SIZE = 32  # pixels; in smaller images the shapes look the same

OBJECTS_PER_SCENE = (1, 3)
CLUTTER_PER_SCENE = (1, 2)
OBJECT_LENGTH = (0.32, 0.7)  # longest side of the whole object, as a fraction of the image side
CLUTTER_LENGTH = (0.15, 0.5)
MIN_VISIBLE = 0.5  # fraction of an object that has to be visible, or it is not drawn at all
GENERATOR_VERSION = 1  # increase it when a scene changes for the same (seed, split, index)
FINGERPRINT_FILE = "sample_scenes.json"


def class_names(num_classes: int = DEFAULT_NUM_CLASSES) -> dict[int, str]:
    """Return category id (from 1) -> name of the first `num_classes` classes.

    Raises:
        ValueError: there are not as many classes.
    """
    if not 1 <= num_classes <= len(CLASS_NAMES):
        raise ValueError(f"num_classes is {num_classes}, it has to be 1 to {len(CLASS_NAMES)}")
    return dict(enumerate(CLASS_NAMES[:num_classes], start=1))


def make_scene(
    seed: int,
    index: int,
    size: int,
    split: str,
    num_classes: int = DEFAULT_NUM_CLASSES,
    clutter: bool = True,
) -> Scene:
    """Draw scene `index` of a split.

    Args:
        seed, index: not negative; with the split they determine every pixel.
        size: side of the square image in pixels, at least 32.
        split: "train", "val" (held out: other photos) or "unlabelled".
        num_classes: number of classes, the first of `CLASS_NAMES`.
        clutter: whether there are shapes that belong to no class.

    Returns:
        image: uint8 [H, W, 3], RGB.
        boxes_xyxy_abs: float32 [N, 4], pixel edges of the visible region; x2 and y2 are exclusive. N is 1 to 3.
        labels: int64 [N], category ids from 1.
        masks: bool [N, H, W], the visible regions; they are disjoint.

    Raises:
        ValueError: an unknown split, a size below 32 or an invalid number of classes.
        UserError: scikit-image, which has the photos, is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, choose from {', '.join(SPLITS)}")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size} pixels, it has to be at least {MIN_SIZE}")

    classes = class_names(num_classes)
    split_number, group = SPLITS[split]
    rng = np.random.default_rng(np.random.SeedSequence([seed, split_number, index]))
    canvas = _Canvas(rng, size, _load_photos(group))

    labels, masks = [], []
    for is_object in _draw_layers(rng, clutter):
        if not is_object:
            canvas.add(clutter_outlines(rng), length=rng.uniform(*CLUTTER_LENGTH), min_visible=0.0)
            continue
        label = int(rng.integers(1, num_classes + 1))
        outlines = OUTLINES[classes[label]](rng)
        length = rng.uniform(*OBJECT_LENGTH)
        mask = canvas.add(outlines, length=length, min_visible=MIN_VISIBLE)
        if mask is not None:
            labels.append(label)
            masks.append(mask)

    boxes_xyxy_abs = np.array([_mask_to_box_xyxy(mask) for mask in masks], np.float32)  # [N, 4]
    return canvas.image(), boxes_xyxy_abs, np.array(labels, np.int64), np.stack(masks)


def _draw_layers(rng: np.random.Generator, clutter: bool) -> list[bool]:
    """Return the layers from front to back: True for an object, False for clutter.

    The first is an object, which nothing can occlude: every scene has at least one.
    """
    num_objects = int(rng.integers(OBJECTS_PER_SCENE[0], OBJECTS_PER_SCENE[1] + 1))
    least, most = CLUTTER_PER_SCENE if clutter else (0, 0)
    num_clutter = int(rng.integers(least, most + 1))
    rest = np.array([True] * (num_objects - 1) + [False] * num_clutter)
    rng.shuffle(rest)
    return [True, *rest.tolist()]


class _Canvas:
    """A scene composed from front to back: later shapes are behind earlier ones, so finished masks never change.

    Attributes:
        color: float32 [H, W, 3] in 0..255, what the shapes so far contribute.
        transmittance: float32 [H, W, 1] in 0..1, how much of what is behind still shows.
        free: bool [H, W], pixels that belong to no shape yet.
    """

    def __init__(
        self, rng: np.random.Generator, size: int, photos: tuple[Image.Image, ...]
    ) -> None:
        self.rng, self.size, self.photos = rng, size, photos
        self.background = _photo_crop(rng, photos, size, size, scale=(0.35, 1.0), tint=25)
        self.color = np.zeros((size, size, 3), np.float32)
        self.transmittance = np.ones((size, size, 1), np.float32)
        self.free = np.ones((size, size), bool)

    def add(
        self, outlines: list[np.ndarray], length: float, min_visible: float, tries: int = 8
    ) -> np.ndarray | None:
        """Put a shape behind all others at a random position.

        Args:
            outlines: of the shape, see tools.demo.shapes.
            length: longest side, as a fraction of the image side.
            min_visible: fraction of the shape that has to be visible.
            tries: number of positions to try.

        Returns:
            Its visible region, bool [H, W]; None if it fits nowhere, in which case nothing is drawn.
        """
        alpha = rasterize(random_affine(self.rng, outlines), length * self.size)  # [h, w]
        height, width = alpha.shape
        area = int((alpha >= 0.5).sum())
        for _ in range(tries):
            top, left = (self._draw_corner(side) for side in (height, width))
            on_canvas, on_shape = _overlapping_slices(self.size, top, left, height, width)
            visible = (alpha[on_shape] >= 0.5) & self.free[on_canvas]
            if visible.sum() >= max(min_visible * area, 1):
                self._paint(alpha[on_shape], on_canvas)
                self.free[on_canvas] &= ~visible
                mask = np.zeros((self.size, self.size), bool)
                mask[on_canvas] = visible
                return mask
        return None

    def _draw_corner(self, side: int) -> int:
        """Draw the first pixel of a shape of `side` pixels, at most a quarter of which leaves the image."""
        slack = side // 4
        return int(self.rng.integers(-slack, max(self.size - side + slack, -slack) + 1))

    def _paint(self, alpha: np.ndarray, on_canvas: Slices) -> None:
        """Blend a shape behind what is there (front-to-back alpha compositing)."""
        height, width = alpha.shape
        behind = self.background[on_canvas].mean((0, 1))  # [3]
        surfaces = [
            _photo_crop(self.rng, self.photos, height, width, scale=(0.1, 0.4), tint=60)
            for _ in range(3)
        ]
        # The one of three surfaces with the highest contrast: an invisible shape could not be learned.
        surface = max(surfaces, key=lambda s: float(np.abs(s.mean((0, 1)) - behind).sum()))
        opacity = alpha[..., None]  # [h, w, 1]
        self.color[on_canvas] += self.transmittance[on_canvas] * opacity * surface
        self.transmittance[on_canvas] *= 1 - opacity

    def image(self) -> np.ndarray:
        """Return the scene as uint8 [H, W, 3]."""
        pixels = self.color + self.transmittance * self.background
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@lru_cache(maxsize=2)  # the photos of "train" and of "val"
def _load_photos(group: str) -> tuple[Image.Image, ...]:
    photos = []
    for path in photo_paths(group):
        with Image.open(path) as file:
            photo = file.convert("RGB")
        photo.thumbnail((MAX_PHOTO_SIDE, MAX_PHOTO_SIDE), Image.Resampling.BILINEAR)
        photos.append(photo)
    return tuple(photos)


def photo_paths(group: str) -> list[Path]:
    """Return the photos of a group of `SOURCE_PHOTOS`.

    Raises:
        UserError: scikit-image is not installed, or too old.
    """
    # The files are read directly, because skimage.data downloads what it does not find.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "synthetic images need the photos in scikit-image's wheel: pip install scikit-image"
        )
    folder = Path(spec.submodule_search_locations[0], "data")
    paths = [folder / name for name in SOURCE_PHOTOS[group]]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing in this scikit-image: pip install 'scikit-image>=0.22'"
        )
    return paths


def _photo_crop(
    rng: np.random.Generator,
    photos: tuple[Image.Image, ...],
    height: int,
    width: int,
    scale: tuple[float, float],
    tint: float,
) -> np.ndarray:
    """Return a crop of a random photo with jittered contrast and color, float32 [height, width, 3] in 0..255.

    Args:
        scale: range of the crop's longer side, as a fraction of the photo's shorter side.
        tint: largest shift of each color channel.
    """
    photo = photos[int(rng.integers(len(photos)))]
    longer = rng.uniform(*scale) * min(photo.size)
    crop_width = longer * width / max(height, width)
    crop_height = longer * height / max(height, width)
    left = rng.uniform(0, photo.width - crop_width)
    top = rng.uniform(0, photo.height - crop_height)

    box = (left, top, left + crop_width, top + crop_height)
    resized = photo.resize((width, height), Image.Resampling.BILINEAR, box=box)
    crop = np.asarray(resized, np.float32)  # [height, width, 3]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.clip((crop - 128) * rng.uniform(0.6, 1.2) + 128 + rng.uniform(-tint, tint, 3), 0, 255)


def _overlapping_slices(
    size: int, top: int, left: int, height: int, width: int
) -> tuple[Slices, Slices]:
    """Return the parts of the canvas and of a shape at (top, left) that cover each other."""
    on_canvas, on_shape = [], []
    for first, side in ((top, height), (left, width)):
        begin, end = max(first, 0), min(first + side, size)
        on_canvas.append(slice(begin, end))
        on_shape.append(slice(begin - first, end - first))
    return tuple(on_canvas), tuple(on_shape)


def _mask_to_box_xyxy(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# --------------------------------------------------------------------------------------------------------- writing


def write_coco(
    output: str | Path,
    num_train: int,
    num_val: int,
    num_unlabelled: int = 0,
    size: int = 160,
    seed: int = 1,
    num_classes: int = DEFAULT_NUM_CLASSES,
    clutter: bool = True,
    one_class: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write scenes in COCO's layout, all or nothing, and return the folder.

    `clutter`: see `make_scene`. With `one_class` all shapes have the class "shape".

    A folder that has exactly these scenes is left alone. `overwrite` replaces scenes with other settings; a folder
    that this function did not write is never touched.

    Raises:
        UserError: the folder has other content, or scenes with other settings and `overwrite` is not given.
    """
    output = Path(output)
    counts = {"train2017": num_train, "val2017": num_val, "unlabelled": num_unlabelled}
    fingerprint = _fingerprint(counts, size, seed, num_classes)
    # Not in folders of earlier versions, which had neither.
    fingerprint |= {} if clutter else {"clutter": False}
    fingerprint |= {"one_class": True} if one_class else {}

    def draw(index: int, split: str) -> Scene:
        image, boxes_xyxy_abs, labels, masks = make_scene(
            seed, index, size, split, num_classes, clutter
        )
        return image, boxes_xyxy_abs, np.ones_like(labels) if one_class else labels, masks

    names = {1: "shape"} if one_class else class_names(num_classes)
    if _is_ready(output, fingerprint, overwrite):
        log.info("synthetic images: %s has them already", output)
        return output

    # Written to a hidden folder on the same disk first, which then gets the name: a rename is all or nothing.
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        building.chmod(0o755)  # mkdtemp makes it private
        splits = (("train2017", "train"), ("val2017", "val"), ("unlabelled", "unlabelled"))
        for folder, split in splits:
            _write_split(building, folder, split, counts[folder], draw, names)
        text = json.dumps(fingerprint, indent=1) + "\n"
        (building / FINGERPRINT_FILE).write_text(text, encoding="utf-8")
        _replace_folder(output, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)

    log.info(
        "synthetic images: %d for training, %d held out, %d unlabelled in %s",
        *counts.values(),
        output,
    )
    return output


def _fingerprint(counts: dict[str, int], size: int, seed: int, num_classes: int) -> dict:
    """Return everything that the pixels depend on, the files of the photos included."""
    digest = hashlib.sha256()
    for path in photo_paths("train") + photo_paths("val"):
        digest.update(path.read_bytes())
    return {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "size": size,
        "images": counts,
        "class_names": list(class_names(num_classes).values()),
        "photographs_sha256": digest.hexdigest(),
        "photographs": SOURCE_PHOTOS,
    }


def _is_ready(output: Path, fingerprint: dict, overwrite: bool) -> bool:
    """Return whether the folder has these scenes.

    Raises:
        UserError: it has something that must not be replaced.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"{output} is a file: give a folder for the synthetic images")
    if not any(output.iterdir()):
        return False

    try:
        found = json.loads((output / FINGERPRINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{output} is not empty and has no synthetic images: give another folder"
        ) from None

    expected = fingerprint["images"].items()
    complete = all(_count_images(output / folder) == count for folder, count in expected)
    if found == fingerprint and complete:
        return True
    if not overwrite:
        what = "images with other settings" if found != fingerprint else "only a part of its images"
        raise UserError(f"{output} has {what}: give another folder, or --overwrite to replace them")
    return False


def _count_images(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.jpg"))


def _replace_folder(output: Path, building: Path) -> None:
    """Put the finished folder in place of the old one, which is removed only after that."""
    if not output.exists():
        os.rename(building, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    os.rename(output, old / "content")
    try:
        os.rename(building, output)
    except OSError:
        os.rename(old / "content", output)
        raise
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(old)


def _write_split(
    root: Path,
    folder: str,
    split: str,
    count: int,
    draw: Callable[[int, str], Scene],
    names: dict[int, str],
) -> None:
    """Write the first `count` scenes of a split; `draw` returns one, `names` has the classes by id."""
    (root / folder).mkdir()
    images, annotations = [], []
    for index in progress(range(count), f"synthetic images, {split}"):
        image, boxes_xyxy_abs, labels, masks = draw(index, split)
        height, width = image.shape[:2]
        name = f"{index + 1:012d}.jpg"  # as COCO names its files
        # No chroma subsampling: it would blur the edges of shapes.
        Image.fromarray(image).save(root / folder / name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for box_xyxy, label, mask in zip(boxes_xyxy_abs, labels, masks, strict=True):
            annotations.append(_annotation(len(annotations) + 1, index + 1, box_xyxy, label, mask))
    if split == "unlabelled":
        return

    content = {
        "info": {"description": "PreDETR sample scenes", "version": str(GENERATOR_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label, "name": name, "supercategory": "shape"} for label, name in names.items()
        ],
    }
    path = root / "annotations" / f"instances_{folder}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _annotation(
    annotation_id: int, image_id: int, box_xyxy: np.ndarray, label: int, mask: np.ndarray
) -> dict:
    """Return an annotation in COCO's format, with the mask as RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))  # pycocotools reads column-major
    x1, y1, x2, y2 = (float(edge) for edge in box_xyxy)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": int(label),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m tools.demo.scenes`."""
    parser = argparse.ArgumentParser(
        "tools.demo.scenes", description="Write synthetic images in COCO's layout"
    )
    add = parser.add_argument
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write: new, empty or with such images (required)",
    )
    add(
        "--num_train",
        default=600,
        type=int,
        metavar="N",
        help="number of labelled training images (default: 600)",
    )
    add(
        "--num_val",
        default=100,
        type=int,
        metavar="N",
        help="number of held-out images, made from other photos (default: 100)",
    )
    add(
        "--num_unlabelled",
        default=600,
        type=int,
        metavar="N",
        help="number of additional images without labels (default: 600)",
    )
    add(
        "--size",
        default=160,
        type=int,
        metavar="PIXELS",
        help=f"side of the square images in pixels, at least {MIN_SIZE} (default: 160)",
    )
    add(
        "--seed",
        default=1,
        type=int,
        help="random seed; the same seed gives the same images (default: 1)",
    )
    add(
        "--num_classes",
        default=DEFAULT_NUM_CLASSES,
        type=int,
        metavar="N",
        help=f"number of classes, the first N of {', '.join(CLASS_NAMES)} (default: {DEFAULT_NUM_CLASSES})",
    )
    add(
        "--no_clutter",
        dest="clutter",
        action="store_false",
        help="draw no shapes that belong to no class (default: one or two per image)",
    )
    add(
        "--one_class",
        action="store_true",
        help="all shapes have the same class (default: off)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace synthetic images with other settings (default: off)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can fix is one line."""
    args = get_args_parser().parse_args(arguments)
    try:
        setup_logger()
        write_coco(**vars(args))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        path, reason = error.filename or args.output, error.strerror or error
        sys.exit(f"error: cannot write {path}: {reason}; make room or choose another --output")


if __name__ == "__main__":
    main()
