"""Writes COCO-style annotation files of PASCAL VOC, as Siamese DETR's code base reads them.

    python tools/voc_to_coco.py data/pascal/VOCdevkit --output_dir data/pascal/meta

One file a list, such as voc_trainval2012.cocostyle.json, for other programs. Here `--dataset_file voc_coco` trains and
evaluates on the same boxes from VOCdevkit itself.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from datasets.labelled.voc import read_voc, voc_root
from datasets.labelled.voc_coco import to_coco_style
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.runs.session import run_script
from util.settings.value_types import voc_image_set

SETS = ("2007_trainval", "2007_test", "2012_trainval")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/voc_to_coco.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("voc_path", metavar="VOCDEVKIT", help="folder with VOC2007 and VOC2012")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="where the files are written"
    )
    parser.add_argument(
        "--sets",
        type=voc_image_set,
        nargs="+",
        default=SETS,
        metavar="SET",
        help=f"year and list ({' '.join(SETS)})",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    places = {
        name: args.output_dir / "voc_{1}{0}.cocostyle.json".format(*name.split("_", 1))
        for name in args.sets
    }
    for path in places.values():
        if path.exists():
            raise UserError(
                f"{path} exists and is not overwritten: give another --output_dir, or other --sets"
            )
    root = voc_root(args.voc_path, None)
    for name, path in places.items():
        annotations = read_voc(root, [name])
        write_text(path, json.dumps(to_coco_style(annotations)))
        log.info(
            "wrote %s: %d images, %d boxes, %d of them difficult",
            path,
            len(annotations),
            len(annotations.labels),
            annotations.difficult.sum(),
        )


if __name__ == "__main__":
    run_script(main, parse)
