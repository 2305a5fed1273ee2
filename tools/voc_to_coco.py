"""Writes COCO-style annotation files of PASCAL VOC, as Siamese DETR's code base reads them.

    python tools/voc_to_coco.py data/pascal/VOCdevkit --output_dir data/pascal/meta

One file a list, such as voc_trainval2012.cocostyle.json. Boxes are [xmin, ymin, xmax - xmin, ymax - ymin] of the XML files, nothing added
or taken away, image ids the digits of the names, category ids 0 to 19; `difficult` objects are ordinary ones with a mark. Here such a file
is read by `--dataset_file custom`; `--dataset_file voc` reads VOCdevkit as it is.
"""
import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from datasets.annotations import Annotations
from datasets.voc import CLASSES, read_voc, voc_root
from util.files import write_text
from util.flags import voc_set
from util.logger import UserError, log
from util.session import run_script

SETS = ("2007_trainval", "2007_test", "2012_trainval")


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser("tools/voc_to_coco.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("voc_path", metavar="VOCDEVKIT", help="folder with VOC2007 and VOC2012")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="where the files are written")
    parser.add_argument("--sets", type=voc_set, nargs="+", default=SETS, metavar="SET", help=f"year and list ({' '.join(SETS)})")
    return parser.parse_args(argv)


def coco_style(annotations: Annotations) -> dict[str, Any]:
    """The published fields; dates and addresses of images are not known."""
    content = annotations.as_coco()
    images = {image["id"]: _image(image) for image in content["images"]}
    rows = zip(content["annotations"], annotations.difficult.tolist(), strict=True)
    return {
        "info": {"description": "PASCAL VOC in COCO's format"}, "licenses": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
        "images": list(images.values()),
        "annotations": [_annotation(item, images[item["image_id"]], difficult) for item, difficult in rows],
    }


def _image(image: dict[str, Any]) -> dict[str, Any]:
    name = Path(image["file_name"]).name
    return {**image, "id": int(Path(name).stem.replace("_", "")), "file_name": name}


def _annotation(item: dict[str, Any], image: dict[str, Any], difficult: bool) -> dict[str, Any]:
    x, y, width, height = item["bbox"]
    bbox = [x + 1, y + 1, width - 1, height - 1]
    return {
        "id": item["id"], "image_id": image["id"], "category_id": item["category_id"], "iscrowd": 0,
        "area": bbox[2] * bbox[3], "bbox": bbox, "segmentation": [], "width": image["width"], "height": image["height"],
        "difficult": difficult,
    }


def main(args: Namespace) -> None:
    places = {name: args.output_dir / "voc_{1}{0}.cocostyle.json".format(*name.split("_", 1)) for name in args.sets}
    for path in places.values():
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten: give another --output_dir, or other --sets")
    root = voc_root(Namespace(voc_path=args.voc_path, data_root=None))
    for name, path in places.items():
        annotations = read_voc(root, [name])
        write_text(path, json.dumps(coco_style(annotations)))
        log.info("wrote %s: %d images, %d boxes, %d of them difficult", path, len(annotations), len(annotations.labels),
                 annotations.difficult.sum())


if __name__ == "__main__":
    run_script(main, parse)
