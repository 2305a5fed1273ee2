"""Check the images and objects of an export, split it, and write the folders that `--dataset_file custom` reads."""

import csv
import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from datasets.images.image_folder import NO_SIZE
from datasets.images.image_info import ImageInfo, inspect_image
from datasets.images.pixels import UNDECIDED
from datasets.labelled.segmentations import SegmentationError, to_rle
from datasets.labelled.subsets import sample_image_ids
from tools.check_dataset import map_images
from tools.conversion.export import Drop, Dropped, Export, LabelledImage, LabelledObject
from util.errors import UserError
from util.files import link_or_copy, to_json, write_text

CLASSES, DROPPED, SUMMARY = "classes.txt", "dropped.csv", "conversion.json"


# ---------------------------------------------------------------------------------------------------------- checking


def check_images(
    images: Sequence[LabelledImage], num_workers: int, dropped: Dropped
) -> list[LabelledImage]:
    """Decode all images. Return those that training can use, with their size and the objects that it can use.

    Returns:
        Images whose `size_hw` is known, and whose objects have a box with area inside of the image.
    """
    infos = map_images(
        inspect_image,
        [os.path.join(image.folder, image.file) for image in images],
        [None] * len(images),
        [image.size_hw for image in images],
        num_workers=num_workers,
        what="images",
    )
    return [
        image
        for image, info in zip(images, infos, strict=True)
        if _check_image(image, info, dropped)
    ]


def _check_image(image: LabelledImage, info: ImageInfo, dropped: Dropped) -> bool:
    if info.error:
        dropped.add("image unreadable", image.file, detail=info.error)
        return False
    if image.size_hw == NO_SIZE:
        image.size_hw = info.size_hw
    if image.size_hw != info.size_hw:
        listed, actual = (f"{width} x {height}" for height, width in (image.size_hw, info.size_hw))
        dropped.add(
            "image of another size", image.file, detail=f"labelled as {listed}, is {actual}"
        )
        return False
    image.undecided = info.rotation == UNDECIDED
    image.objects = [found for found in image.objects if _check_object(found, image, dropped)]
    return True


def _check_object(found: LabelledObject, image: LabelledImage, dropped: Dropped) -> bool:
    height, width = image.size_hw
    x0, y0, x1, y1 = found.box_xyxy_abs
    if not all(map(math.isfinite, found.box_xyxy_abs)):
        reason = "box not finite"
    elif x1 <= x0 or y1 <= y0:
        reason = "box without area"
    elif min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0):
        reason = "box outside image"
    else:
        _check_segmentation(found, image, dropped)
        return True
    detail = f"{found.class_name} {[round(value, 1) for value in found.box_xyxy_abs]}"
    dropped.add(reason, image.file, found.place, detail)
    return False


def _check_segmentation(found: LabelledObject, image: LabelledImage, dropped: Dropped) -> None:
    """Drop a segmentation that can't be decoded; the object keeps its box. Complete `area` from one that can."""
    rle = None
    if found.segmentation is not None:
        try:
            rle = to_rle(to_json(found.segmentation), image.size_hw)
        except SegmentationError as error:
            dropped.add("segmentation broken", image.file, found.place, str(error))
            found.segmentation = None
    x0, y0, x1, y1 = found.box_xyxy_abs
    area = float(coco_mask.area(rle)) if rle else (x1 - x0) * (y1 - y0)
    found.record.setdefault("area", area)


# --------------------------------------------------------------------------------------------------------- splitting


def split_export(
    export: Export, val_fraction: float, seed: int, by_folder: bool
) -> dict[str, Export]:
    """Draw the validation images, as `tools/make_split.py` draws training images.

    Args:
        val_fraction: fraction of the images, or with `by_folder` of the folders. 0: no validation images.
        by_folder: images of one folder stay together.

    Raises:
        UserError: a split would be empty.
    """
    if not val_fraction:
        return {"train": export}
    keys = [os.path.dirname(image.file) if by_folder else image.file for image in export.images]
    units = sorted(set(keys))  # the draw must not depend on the order in the export
    drawn = sample_image_ids(np.arange(len(units)), val_fraction, seed)
    if not 0 < len(drawn) < len(units):
        what = "folders" if by_folder else "images"
        raise UserError(
            f"--val_fraction {val_fraction:g} of {len(units)} {what} leaves a split empty: choose another one, or 0 "
            "for no validation images"
        )
    chosen = {units[i] for i in drawn}
    parts = {
        "train": [
            image for image, key in zip(export.images, keys, strict=True) if key not in chosen
        ],
        "val": [image for image, key in zip(export.images, keys, strict=True) if key in chosen],
    }
    return {name: Export(images, export.class_ids) for name, images in parts.items()}


def number_classes(exports: Sequence[Export]) -> dict[str, int]:
    """Return class name -> category id: the ids of the first export that numbers them, else from 1 by name."""
    ids: dict[str, int] = {}
    for export in exports:
        for name, class_id in export.class_ids.items():
            taken = class_id in ids.values()
            ids.setdefault(name, max(ids.values()) + 1 if taken else class_id)
    names = {
        found.class_name for export in exports for image in export.images for found in image.objects
    }
    for name in sorted(names - set(ids)):
        ids[name] = max(ids.values(), default=0) + 1
    return ids


# ----------------------------------------------------------------------------------------------------------- writing


def write_dataset(
    folder: Path, splits: dict[str, Export], ids: dict[str, int], *, copy: bool
) -> dict[str, Any]:
    """Write TRAIN/, TRAIN.json and so on. Returns statistics of each split."""
    first_image = first_object = 1
    summary: dict[str, Any] = {}
    for name, export in splits.items():
        content = to_coco(export.images, ids, first_image, first_object)
        first_image += len(content["images"])
        first_object += len(content["annotations"])
        for image in export.images:
            target = folder / name / image.file
            target.parent.mkdir(parents=True, exist_ok=True)
            source = Path(
                image.folder, image.file
            ).resolve()  # a hard link to a link would break with it
            if copy:
                shutil.copyfile(source, target)
            else:
                link_or_copy(source, target)
        write_text(folder / f"{name}.json", to_json(content))
        summary[name] = summarize(export.images, ids)
    by_id = sorted(ids, key=lambda name: ids[name])
    write_text(folder / CLASSES, "".join(f"{name}\n" for name in by_id))
    return summary


def to_coco(
    images: Sequence[LabelledImage], ids: dict[str, int], first_image: int, first_object: int
) -> dict[str, Any]:
    """Return the content of a COCO file. Ids that a COCO export has are kept; others count from the given ones."""
    rows, annotations = [], []
    for number, image in enumerate(images, start=first_image):
        height, width = image.size_hw
        size = {"width": width, "height": height}
        row = {"id": number, **image.record, "file_name": image.file, **size}
        rows.append(row)
        for found in image.objects:
            annotations.append(
                _annotation(
                    found, first_object + len(annotations), row["id"], ids[found.class_name]
                )
            )
    categories = [
        {"id": class_id, "name": name}
        for name, class_id in sorted(ids.items(), key=lambda item: item[1])
    ]
    return {"images": rows, "annotations": annotations, "categories": categories}


def _annotation(
    found: LabelledObject, number: int, image_id: int, category_id: int
) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box_xyxy_abs
    # A COCO export keeps its own numbers: x + width - x is not always width.
    own = {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0, **found.record}
    row = {"id": number, **own, "image_id": image_id, "category_id": category_id}
    if found.segmentation is not None:
        row["segmentation"] = found.segmentation
    return row


def summarize(images: Sequence[LabelledImage], ids: dict[str, int]) -> dict[str, Any]:
    """Return numbers of images and objects of a split."""
    objects = [found for image in images for found in image.objects]
    counts = Counter(found.class_name for found in objects)
    return {
        "images": len(images),
        "images without objects": sum(not image.objects for image in images),
        "images whose EXIF orientation no size tells": sum(image.undecided for image in images),
        "objects": len(objects),
        "objects with polygons or masks": sum(found.segmentation is not None for found in objects),
        "classes": {name: counts[name] for name in ids},
    }


def write_report(folder: Path, summary: dict[str, Any], dropped: Dropped) -> None:
    """Write conversion.json and dropped.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Drop._fields)
    writer.writerows(dropped.rows)
    write_text(folder / DROPPED, text.getvalue())
    content = {**summary, "dropped": dict(dropped.counts())}
    write_text(folder / SUMMARY, to_json(content, indent=1, ensure_ascii=False) + "\n")
