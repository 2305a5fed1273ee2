"""Labelled images made on the spot, so that the whole path runs without a file of the user's.

A scene is a crop of a photograph with one to four objects on it. What a class is, its shape says (disc, triangle, star,
ring, ...); its surface is a crop of a photograph, so that color and texture tell nothing. Sizes, aspect and rotation
vary, objects hide each other and leave the image, and clutter (bars and blobs with surfaces of the same kind) is no
object. Masks and boxes are exact: those of the pixels that remain visible. Everything is a function of
(seed, split, index).

The photographs lie in scikit-image's wheel (`skimage/data`), public domain or CC0 as its documentation says
(`PHOTOGRAPHS`). Held-out scenes are made from other photographs than those for training: backgrounds, surfaces and
clutter alike.

    python -m tools.demo.scenes --output DIR --num_train 600 --num_val 100 --num_unlabelled 600 --size 160 --seed 1

writes `train2017/`, `val2017/`, `annotations/instances_{train,val}2017.json` (the layout of COCO) and `unlabelled/`.
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
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from tools.demo.shapes import OUTLINES, clutter_outlines, rasterise, turn
from util.errors import UserError
from util.logger import log, progress, setup_logger

Scene = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# File in skimage/data -> its status there. Only photographs with an explicit statement are taken.
PHOTOGRAPHS = {
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
# Split -> (number in the seed, whose photographs). Unlabelled images are of the kind for training, never held-out ones.
SPLITS = {"train": (0, "train"), "val": (1, "val"), "unlabelled": (2, "train")}

CLASS_NAMES = ("disc", "triangle", "star", "ring", "cross", "crescent")
DEFAULT_NUM_CLASSES = 4
MIN_SIZE = 32  # pixels; below this the shapes can't be told apart

OBJECTS_PER_SCENE = (1, 3)
CLUTTER_PER_SCENE = (1, 2)
OBJECT_LENGTH = (0.32, 0.7)  # longest side of the whole object, as a part of the image's side
MIN_VISIBLE = 0.5  # an object of which less would remain is not drawn at all
GENERATOR_VERSION = 1  # raised whenever a scene changes for the same (seed, split, index)
FINGERPRINT_FILE = "sample_scenes.json"


def class_names(num_classes: int = DEFAULT_NUM_CLASSES) -> dict[int, str]:
    """Category id (from 1) -> name of the first `num_classes` classes; ValueError for a number that is not served."""
    if not 1 <= num_classes <= len(CLASS_NAMES):
        raise ValueError(f"num_classes is {num_classes}, it has to be 1 to {len(CLASS_NAMES)}")
    return dict(enumerate(CLASS_NAMES[:num_classes], start=1))


def make_scene(
    seed: int, index: int, size: int, split: str, num_classes: int = DEFAULT_NUM_CLASSES
) -> Scene:
    """Draws scene `index` of a split.

    Args:
        seed, index: not negative; with the split they determine every pixel.
        size: side of the square image in pixels, at least 32.
        split: "train", "val" (held out: other photographs) or "unlabelled".
        num_classes: how many of `CLASS_NAMES` occur.

    Returns:
        image uint8 [H, W, 3] RGB; boxes_xyxy_abs float32 [N, 4], the pixel edges of the visible region (x2 and y2 are
        exclusive); labels int64 [N], category ids from 1; masks bool [N, H, W], disjoint visible regions. N is 1 to 3.

    Raises:
        ValueError: an unknown split, a size or number of classes that is not served.
        UserError: scikit-image, whose wheel carries the photographs, is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, choose from {', '.join(SPLITS)}")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size} pixels, it has to be at least {MIN_SIZE}")
    classes = class_names(num_classes)
    number, photographs = SPLITS[split]
    rng = np.random.default_rng(np.random.SeedSequence([seed, number, index]))
    canvas = _Canvas(rng, size, _photographs(photographs))

    labels, masks = [], []
    for is_object in _layers(rng):
        if not is_object:
            canvas.add(clutter_outlines(rng), length=rng.uniform(0.15, 0.5), min_visible=0.0)
            continue
        label = int(rng.integers(1, num_classes + 1))
        mask = canvas.add(
            OUTLINES[classes[label]](rng),
            length=rng.uniform(*OBJECT_LENGTH),
            min_visible=MIN_VISIBLE,
        )
        if mask is not None:
            labels.append(label)
            masks.append(mask)
    boxes_xyxy_abs = np.array([_mask_to_box_xyxy(mask) for mask in masks], np.float32)
    return canvas.image(), boxes_xyxy_abs, np.array(labels, np.int64), np.stack(masks)


def _layers(rng: np.random.Generator) -> list[bool]:
    """Front to back, True for an object and False for clutter. An object is first, so that nothing can hide it."""
    objects = int(rng.integers(OBJECTS_PER_SCENE[0], OBJECTS_PER_SCENE[1] + 1))
    clutter = int(rng.integers(CLUTTER_PER_SCENE[0], CLUTTER_PER_SCENE[1] + 1))
    rest = np.array([True] * (objects - 1) + [False] * clutter)
    rng.shuffle(rest)
    return [True, *rest.tolist()]


class _Canvas:
    """A scene composed from front to back: what is added later lies behind, so that no earlier mask changes."""

    def __init__(
        self, rng: np.random.Generator, size: int, photographs: tuple[Image.Image, ...]
    ) -> None:
        self.rng, self.size, self.photographs = rng, size, photographs
        self.background = _photo_crop(rng, photographs, size, size, scale=(0.35, 1.0), tint=25)
        self.color = np.zeros((size, size, 3), np.float32)
        self.light = np.ones(
            (size, size, 1), np.float32
        )  # part of what lies behind that still shows
        self.free = np.ones((size, size), bool)

    def add(
        self, outlines: list[np.ndarray], length: float, min_visible: float, tries: int = 8
    ) -> np.ndarray | None:
        """Puts a shape behind all others where enough of it shows: its visible region [H, W], or None if nowhere."""
        alpha = rasterise(turn(self.rng, outlines), length * self.size)
        height, width = alpha.shape
        whole = int((alpha >= 0.5).sum())
        for _ in range(tries):
            top, left = (self._corner(side) for side in (height, width))
            canvas_part, shape_part = _overlap(self.size, top, left, height, width)
            visible = (alpha[shape_part] >= 0.5) & self.free[canvas_part]
            if visible.sum() >= max(min_visible * whole, 1):
                self._paint(alpha[shape_part], canvas_part)
                self.free[canvas_part] &= ~visible
                mask = np.zeros((self.size, self.size), bool)
                mask[canvas_part] = visible
                return mask
        return None

    def _corner(self, side: int) -> int:
        """A first pixel for a shape of `side` pixels, at most a quarter of which leaves the image."""
        slack = side // 4
        return int(self.rng.integers(-slack, max(self.size - side + slack, -slack) + 1))

    def _paint(self, alpha: np.ndarray, part: tuple[slice, slice]) -> None:
        height, width = alpha.shape
        behind = self.background[part].mean((0, 1))
        surfaces = [
            _photo_crop(self.rng, self.photographs, height, width, scale=(0.1, 0.4), tint=60)
            for _ in range(3)
        ]
        # Of three surfaces the one that stands out most: a shape that can't be seen could not be learnt.
        surface = max(surfaces, key=lambda s: float(np.abs(s.mean((0, 1)) - behind).sum()))
        self.color[part] += self.light[part] * alpha[..., None] * surface
        self.light[part] *= 1 - alpha[..., None]

    def image(self) -> np.ndarray:
        """The scene as uint8 [H, W, 3]."""
        return np.clip(np.rint(self.color + self.light * self.background), 0, 255).astype(np.uint8)


@lru_cache(maxsize=2)
def _photographs(group: str) -> tuple[Image.Image, ...]:
    photographs = []
    for path in _photograph_paths(group):
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        photograph.thumbnail((720, 720), Image.Resampling.BILINEAR)
        photographs.append(photograph)
    return tuple(photographs)


def _photograph_paths(group: str) -> list[Path]:
    # The files are read directly: skimage.data would download what it does not find.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "sample scenes are made from photographs in scikit-image's wheel: pip install scikit-image"
        )
    paths = [Path(spec.submodule_search_locations[0], "data", name) for name in PHOTOGRAPHS[group]]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing in this scikit-image: pip install 'scikit-image>=0.22'"
        )
    return paths


def _photo_crop(
    rng: np.random.Generator,
    photographs: tuple[Image.Image, ...],
    height: int,
    width: int,
    scale: tuple[float, float],
    tint: float,
) -> np.ndarray:
    """A crop of a random photograph with jittered light and color, float32 [height, width, 3] in 0..255.

    `scale` bounds the crop's longer side as a part of the photograph's shorter one, `tint` the shift of each color.
    """
    photograph = photographs[int(rng.integers(len(photographs)))]
    longer = rng.uniform(*scale) * min(photograph.size)
    crop_width, crop_height = (
        longer * width / max(height, width),
        longer * height / max(height, width),
    )
    left = rng.uniform(0, photograph.width - crop_width)
    top = rng.uniform(0, photograph.height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    crop = np.asarray(
        photograph.resize((width, height), Image.Resampling.BILINEAR, box=box), np.float32
    )
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.clip((crop - 128) * rng.uniform(0.6, 1.2) + 128 + rng.uniform(-tint, tint, 3), 0, 255)


Part = tuple[slice, slice]


def _overlap(size: int, top: int, left: int, height: int, width: int) -> tuple[Part, Part]:
    """The parts of the canvas and of a shape at (top, left) that lie upon each other."""
    on_canvas, on_shape = [], []
    for first, side in ((top, height), (left, width)):
        begin, end = max(first, 0), min(first + side, size)
        on_canvas.append(slice(begin, end))
        on_shape.append(slice(begin - first, end - first))
    return tuple(on_canvas), tuple(on_shape)


def _mask_to_box_xyxy(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# Writing


def write_coco(
    output: str | Path,
    num_train: int,
    num_val: int,
    num_unlabelled: int = 0,
    size: int = 160,
    seed: int = 1,
    num_classes: int = DEFAULT_NUM_CLASSES,
    overwrite: bool = False,
) -> Path:
    """Writes scenes in the layout of COCO, all or nothing, and returns the folder.

    A folder that holds exactly these scenes is left as it is. `overwrite` replaces scenes of other settings; a folder
    that was not written by this function is never touched.

    Raises:
        UserError: the folder has other content, or scenes of other settings and `overwrite` is not given.
    """
    output = Path(output)
    counts = {"train2017": num_train, "val2017": num_val, "unlabelled": num_unlabelled}
    fingerprint = _fingerprint(counts, size, seed, num_classes)
    if _is_ready(output, fingerprint, overwrite):
        log.info("sample scenes: %s has them already", output)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        building.chmod(0o755)  # mkdtemp makes a private one
        for folder, split in (
            ("train2017", "train"),
            ("val2017", "val"),
            ("unlabelled", "unlabelled"),
        ):
            _write_split(building, folder, split, counts[folder], size, seed, num_classes)
        (building / FINGERPRINT_FILE).write_text(
            json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8"
        )
        _replace_folder(output, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    log.info(
        "sample scenes: %d for training, %d held out, %d unlabelled in %s", *counts.values(), output
    )
    return output


def _fingerprint(counts: dict[str, int], size: int, seed: int, num_classes: int) -> dict:
    digest = hashlib.sha256()
    for path in _photograph_paths("train") + _photograph_paths("val"):
        digest.update(path.read_bytes())
    return {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "size": size,
        "images": counts,
        "class_names": list(class_names(num_classes).values()),
        "photographs_sha256": digest.hexdigest(),
        "photographs": PHOTOGRAPHS,
    }


def _is_ready(output: Path, fingerprint: dict, overwrite: bool) -> bool:
    """Whether the folder holds the scenes; UserError if it holds something that must not be replaced."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"{output} is a file: give a folder for the sample scenes")
    if not any(output.iterdir()):
        return False
    try:
        found = json.loads((output / FINGERPRINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{output} is not empty and holds no sample scenes: give another folder"
        ) from None
    complete = all(
        _count_images(output / folder) == count for folder, count in fingerprint["images"].items()
    )
    if found == fingerprint and complete:
        return True
    if not overwrite:
        why = (
            "scenes of other settings"
            if complete or found != fingerprint
            else "only a part of its scenes"
        )
        raise UserError(
            f"{output} holds {why}: give another folder, or --overwrite to replace them"
        )
    return False


def _count_images(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.jpg"))


def _replace_folder(output: Path, building: Path) -> None:
    """Puts the finished folder in place of the old one, which is removed only after that."""
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
    root: Path, folder: str, split: str, count: int, size: int, seed: int, num_classes: int
) -> None:
    (root / folder).mkdir()
    images, annotations = [], []
    for index in progress(range(count), f"scenes, {split}"):
        image, boxes_xyxy_abs, labels, masks = make_scene(seed, index, size, split, num_classes)
        name = f"{index + 1:012d}.jpg"
        Image.fromarray(image).save(root / folder / name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for box_xyxy, label, mask in zip(boxes_xyxy_abs, labels, masks, strict=True):
            annotations.append(_annotation(len(annotations) + 1, index + 1, box_xyxy, label, mask))
    if split == "unlabelled":
        return
    content = {
        "info": {"description": "PreDETR sample scenes", "version": str(GENERATOR_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label, "name": name, "supercategory": "shape"}
            for label, name in class_names(num_classes).items()
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{folder}.json").write_text(
        json.dumps(content), encoding="utf-8"
    )


def _annotation(
    annotation_id: int, image_id: int, box_xyxy: np.ndarray, label: int, mask: np.ndarray
) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
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
    """The flags of `python -m tools.demo.scenes`."""
    parser = argparse.ArgumentParser(
        "tools.demo.scenes", description="Write sample scenes in the layout of COCO"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder to write: new, empty or with such scenes"
    )
    parser.add_argument("--num_train", default=600, type=int, help="labelled images for training")
    parser.add_argument(
        "--num_val", default=100, type=int, help="held-out images, from other photographs"
    )
    parser.add_argument(
        "--num_unlabelled", default=600, type=int, help="further images without labels"
    )
    parser.add_argument(
        "--size", default=160, type=int, help=f"side of the images in pixels, at least {MIN_SIZE}"
    )
    parser.add_argument("--seed", default=1, type=int)
    names = ", ".join(CLASS_NAMES)
    parser.add_argument(
        "--num_classes",
        default=DEFAULT_NUM_CLASSES,
        type=int,
        help=f"the first so many of: {names}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace scenes of other settings")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; what the user can mend ends it with one line."""
    args = get_args_parser().parse_args(arguments)
    try:
        setup_logger()
        write_coco(**vars(args))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        reason = error.strerror or error
        sys.exit(
            f"error: cannot write {error.filename or args.output}: {reason}; make room or choose another --output"
        )


if __name__ == "__main__":
    main()
