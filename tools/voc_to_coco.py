"""Convert PASCAL VOC annotations to COCO format, as Siamese DETR's codebase reads them.

    python tools/voc_to_coco.py data/pascal/VOCdevkit --output_dir data/pascal/meta

Writes one file per image set, such as voc_trainval2012.cocostyle.json, for other programs. In this project,
`--dataset_file voc_coco` trains and evaluates on the same boxes without these files: it reads VOCdevkit directly.
XML files of a labelling tool: `tools/convert_dataset.py --format voc`, which subtracts 1 as VOC counts, and splits.
"""

import argparse
import json
import sys
from pathlib import Path

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.labelled.voc import read_voc, voc_root
from datasets.labelled.voc_coco import to_coco_style
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.runs.session import run_script
from util.settings.value_types import voc_image_set

IMAGE_SETS = ("2007_trainval", "2007_test", "2012_trainval")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/voc_to_coco.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("voc_path", metavar="VOCDEVKIT", help="folder with VOC2007 and VOC2012")
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the annotation files",
    )
    parser.add_argument(
        "--sets",
        type=voc_image_set,
        nargs="+",
        default=IMAGE_SETS,
        metavar="SET",
        help=f"image sets, as YEAR_NAME (default: {' '.join(IMAGE_SETS)})",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    paths = {name: args.output_dir / _file_name(name) for name in args.sets}
    for path in paths.values():
        if path.exists():
            raise UserError(
                f"{path} exists and is not overwritten: give another --output_dir, or other --sets"
            )

    root = voc_root(args.voc_path, None)
    for name, path in paths.items():
        annotations = read_voc(root, [name])
        write_text(path, json.dumps(to_coco_style(annotations)))
        log.info(
            "wrote %s: %d images, %d boxes, %d of them difficult",
            path,
            len(annotations),
            len(annotations.labels),
            annotations.difficult.sum(),
        )


def _file_name(image_set: str) -> str:
    """Return Siamese DETR's file name: 2012_trainval -> voc_trainval2012.cocostyle.json."""
    year, _, part = image_set.partition("_")
    return f"voc_{part}{year}.cocostyle.json"


if __name__ == "__main__":
    run_script(main, parse)
