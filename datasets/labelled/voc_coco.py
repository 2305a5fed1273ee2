"""PASCAL VOC as Siamese DETR's code base reads it: boxes as COCO's format would have them, and COCO's metric.

Boxes are [xmin, ymin, xmax - xmin, ymax - ymin] of the XML files, nothing added or taken away; image ids are the digits
of the names, category ids 0 to 19; `difficult` objects are ordinary ones, in training and in evaluation. VOCdevkit is
read as it is.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from datasets.labelled.annotations import Annotations, parse_coco
from datasets.labelled.coco import ConvertedDetection, labelled_transforms, usable
from datasets.labelled.voc import CLASSES, class_count, read_voc, voc_root


def build_voc_coco(image_set: str, args: Namespace) -> ConvertedDetection:
    """The images of `--voc_train` or `--voc_val` below `--voc_path`.

    Raises:
        UserError: as `datasets.labelled.voc.build_voc`.
    """
    root, image_sets = voc_root(args), args.voc_train if image_set == "train" else args.voc_val
    source = f"{root} ({' '.join(image_sets)}, COCO's boxes)"
    annotations = usable(
        parse_coco(coco_style(read_voc(root, image_sets), whole_names=True), source), root, image_set, args
    )
    return ConvertedDetection(
        root, annotations, labelled_transforms(image_set, args), class_count(args, len(CLASSES)), seed=args.seed
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
        "annotations": [_annotation(item, images[item["image_id"]], difficult) for item, difficult in rows],
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
