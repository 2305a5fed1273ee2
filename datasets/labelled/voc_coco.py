"""PASCAL VOC as Siamese DETR's code base reads it: boxes as COCO's format would have them, and COCO's metric.

Boxes are [xmin, ymin, xmax - xmin, ymax - ymin] of the XML files, nothing added or taken away; image ids are the digits
of the names, category ids 0 to 19; `difficult` objects are ordinary ones, in training and in evaluation. VOCdevkit is
read as it is.
"""

from pathlib import Path
from typing import Any

from datasets.labelled.annotations import Annotations, parse_coco
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from datasets.labelled.voc import CLASSES, read_voc, voc_root
from util.checkpoints.classes import Classes
from util.settings import Settings


def build_voc_coco(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> ConvertedDetection:
    """The images of `--voc_train` or `--voc_val` below `--voc_path`.

    Raises:
        UserError: as `datasets.labelled.voc.build_voc`.
    """
    root = voc_root(settings.voc_path, settings.data_root)
    image_sets = settings.voc_train if image_set == "train" else settings.voc_val
    content = coco_style(read_voc(root, image_sets), whole_names=True)
    annotations = parse_coco(content, f"{root} ({' '.join(image_sets)}, COCO's boxes)")
    return ConvertedDetection(
        root,
        filter_annotations(annotations, root, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(CLASSES),
        seed=settings.seed,
    )


def coco_style(annotations: Annotations, whole_names: bool = False) -> dict[str, Any]:
    """What the published annotation files hold of images that `datasets.labelled.voc.read_voc` read; dates and
    addresses of images are not known.

    whole_names: file names from VOCdevkit on; the published files have the last part alone.
    """
    content = annotations.as_coco()
    images = {image["id"]: _image(image, whole_names) for image in content["images"]}
    rows = zip(content["annotations"], annotations.difficult.tolist(), strict=True)
    return {
        "info": {"description": "PASCAL VOC in COCO's format"},
        "licenses": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
        "images": list(images.values()),
        "annotations": [
            _annotation(item, images[item["image_id"]], difficult) for item, difficult in rows
        ],
    }


def _image(image: dict[str, Any], whole_names: bool) -> dict[str, Any]:
    path = Path(image["file_name"])
    return {
        **image,
        "id": int(path.stem.replace("_", "")),
        "file_name": image["file_name"] if whole_names else path.name,
    }


def _annotation(item: dict[str, Any], image: dict[str, Any], difficult: bool) -> dict[str, Any]:
    x, y, width, height = item["bbox"]
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
