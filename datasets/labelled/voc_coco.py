"""PASCAL VOC as Siamese DETR's codebase reads it: annotations in COCO format, evaluated with COCO metrics.

Boxes are [xmin, ymin, xmax - xmin, ymax - ymin] with the numbers of the XML files, without adding or subtracting 1.
Image ids are the digits of the names, category ids are 0 to 19. Objects marked `difficult` are ordinary ones, in
training and in evaluation. VOCdevkit is read directly; no converted file is needed.
"""

from pathlib import Path
from typing import Any

from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.voc import CLASSES, read_voc, refuse_masks, voc_root
from util.checkpoints.classes import Classes
from util.settings import Settings


def build_voc_coco(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> ConvertedDetection:
    """Build the dataset of `--voc_train` or `--voc_val` in `--voc_path`.

    Raises:
        UserError: see `datasets.labelled.voc.build_voc`.
    """
    refuse_masks(settings, "VOC's XML files")
    root = voc_root(settings.voc_path, settings.data_root)
    image_sets = settings.voc_train if image_set == "train" else settings.voc_val
    content = to_coco_style(read_voc(root, image_sets), full_paths=True)
    annotations = parse_coco(content, f"{root} ({' '.join(image_sets)}, COCO boxes)")
    return ConvertedDetection(
        root,
        filter_annotations(annotations, root, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(CLASSES),
        seed=settings.seed,
    )


def to_coco_style(annotations: Annotations, full_paths: bool = False) -> dict[str, Any]:
    """Return the content of a COCO file as Siamese DETR publishes it for VOC. Dates and URLs of images are not known.

    Args:
        annotations: from `datasets.labelled.voc.read_voc`.
        full_paths: write file names relative to VOCdevkit. The published files have the name without folders.
    """
    content = annotations.to_coco()
    images = {image["id"]: _convert_image(image, full_paths) for image in content["images"]}
    rows = zip(content["annotations"], annotations.difficult.tolist(), strict=True)
    return {
        "info": {"description": "PASCAL VOC in COCO format"},
        "licenses": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
        "images": list(images.values()),
        "annotations": [
            _convert_annotation(item, images[item["image_id"]], difficult)
            for item, difficult in rows
        ],
    }


def _convert_image(image: dict[str, Any], full_paths: bool) -> dict[str, Any]:
    path = Path(image["file_name"])
    return {
        **image,
        "id": int(path.stem.replace("_", "")),  # the digits alone, without DETReg's 2021 in front
        "file_name": image["file_name"] if full_paths else path.name,
    }


def _convert_annotation(
    item: dict[str, Any], image: dict[str, Any], difficult: bool
) -> dict[str, Any]:
    x, y, width, height = item["bbox"]
    # `read_xml` subtracted 1 from xmin and ymin. Undo it: the published files have the raw corners.
    bbox = [x + 1, y + 1, width - 1, height - 1]
    return {
        "id": item["id"],
        "image_id": image["id"],
        "category_id": item["category_id"],
        "iscrowd": 0,
        "area": bbox[2] * bbox[3],
        "bbox": bbox,
        "segmentation": [],
        "width": image["width"],
        "height": image["height"],
        "difficult": difficult,
    }
