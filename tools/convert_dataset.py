"""Convert the export of a labelling tool to the folders and COCO files of `--dataset_file custom`.

    python tools/convert_dataset.py --format yolo --annotations export/data.yaml --output_dir my_data
    python tools/convert_dataset.py --format labelme --annotations export --output_dir my_data --val_fraction 0.2

Reads COCO JSON, VOC XML, YOLO text files and labelme JSON, and writes `train/`, `train.json`, `val/`, `val.json`,
`classes.txt`, `conversion.json` (numbers of images, objects and classes) and `dropped.csv` (everything that was left
out, with its reason). Polygons are kept as they are. Nothing of the export is changed.
"""

import argparse
import shlex
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.conversion.coco import read_coco
from tools.conversion.export import Dropped, Export
from tools.conversion.folder import read_folder
from tools.conversion.labelme import LABELME
from tools.conversion.voc import VOC
from tools.conversion.write import (
    DROPPED,
    check_images,
    number_classes,
    split_export,
    write_dataset,
    write_report,
)
from tools.conversion.yolo import read_yolo_folder, read_yolo_yaml
from util.errors import UserError
from util.files import check_outside_images, make_folder
from util.logger import log
from util.runs.session import run_script
from util.settings import Parser
from util.settings.value_types import non_negative
from util.settings.words import to_words

FORMATS = ("coco", "voc", "yolo", "labelme")
VAL_FRACTION, SEED = 0.2, 42


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("tools/convert_dataset.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="format of the export; see docs/custom_dataset.md",
    )
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="PATH",
        help="COCO file, folder of VOC's XML or labelme's JSON files, YOLO's data.yaml or folder of label files",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="folder of the images (default: the folder of the annotations)",
    )
    parser.add_argument(
        "--val_annotations",
        metavar="PATH",
        help="annotations of the validation images, if the export has a split (default: not set)",
    )
    parser.add_argument(
        "--val_images", metavar="DIR", help="folder of the validation images (default: as --images)"
    )
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        help="yolo: class names, one per line, or a data.yaml (default: searched next to the labels)",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="new folder for the dataset"
    )
    parser.add_argument(
        "--val_fraction",
        type=_val_fraction,
        metavar="FRACTION",
        help="fraction of the images to validate on, if the export has no split; 0 for none "
        f"(default: {VAL_FRACTION})",
    )
    parser.add_argument(
        "--split_by",
        choices=("image", "folder"),
        default="image",
        help="folder: images of one folder, such as the frames of a video, stay in one split",
    )
    parser.add_argument("--seed", type=int, default=SEED, help="random seed of the split")
    parser.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking them"
    )
    parser.add_argument(
        "--num_workers",
        type=non_negative(),
        default=2,
        metavar="N",
        help="number of processes that decode images",
    )
    return parser.parse_args(argv)


def _val_fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}: 20 % is 0.2")
    return value


def main(args: argparse.Namespace) -> None:
    folder = args.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} exists and is not empty: choose a new folder")
    for images in filter(None, (args.images, args.annotations, args.val_images)):
        check_outside_images(folder, images)

    dropped = Dropped()
    exports = read_export(args, dropped)
    for export in exports.values():
        export.images = check_images(export.images, args.num_workers, dropped)
    splits = choose_splits(args, exports)
    for name, export in splits.items():
        if not export.images:
            log_dropped(dropped)
            raise UserError(
                f"no image is left for {name}: see the lines above for what was dropped"
            )

    # Complete or not at all: another program must not take half a dataset for a whole one.
    part = make_folder(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}"))
    try:
        ids = number_classes(list(splits.values()))
        if not ids:
            log_dropped(dropped)
            raise UserError(f"{args.annotations} has no class: a detector needs one")
        statistics = write_dataset(part, splits, ids, copy=args.copy)
        source = {"format": args.format, "annotations": args.annotations}
        write_report(part, {**source, "seed": args.seed, "class_ids": ids, **statistics}, dropped)
        if folder.exists():
            folder.rmdir()  # empty, as was checked
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

    log_dropped(dropped)
    if dropped.rows:
        log.warning(
            "%d dropped in total, all of them are listed in %s", len(dropped.rows), folder / DROPPED
        )
    log_result(folder, statistics)


def read_export(args: argparse.Namespace, dropped: Dropped) -> dict[str, Export]:
    """Return the splits of the export: "train", and "val" if it has one."""
    for path in filter(
        None, (args.annotations, args.images, args.val_annotations, args.val_images)
    ):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist: give the path of the export")
    if args.format == "yolo" and Path(args.annotations).suffix in (".yaml", ".yml"):
        if args.images or args.val_images or args.val_annotations:
            raise UserError(
                f"{args.annotations} names the image folders: omit --images, --val_images and --val_annotations, or "
                "give the folder of labels as --annotations"
            )
        return read_yolo_yaml(args.annotations, dropped)
    exports = {"train": _read_one(args, args.annotations, args.images, dropped)}
    if args.val_annotations:
        images = args.val_images or args.images
        exports["val"] = _read_one(args, args.val_annotations, images, dropped)
    return exports


def _read_one(
    args: argparse.Namespace, annotations: str, images: str | None, dropped: Dropped
) -> Export:
    needs_folder = args.format != "coco"
    if Path(annotations).is_dir() != needs_folder:
        what = "a folder" if needs_folder else "a JSON file"
        raise UserError(f"--format {args.format} needs {what} of annotations, got {annotations}")
    images = images or (annotations if needs_folder else str(Path(annotations).parent))
    if args.format == "coco":
        return read_coco(images, annotations, dropped)
    if args.format == "voc":
        return read_folder(VOC, images, annotations, dropped)
    if args.format == "yolo":
        return read_yolo_folder(images, annotations, args.class_names, dropped)
    return read_folder(LABELME, images, annotations, dropped)


def choose_splits(args: argparse.Namespace, exports: dict[str, Export]) -> dict[str, Export]:
    """Return the splits of the export, or draw validation images if it has none.

    Raises:
        UserError: `--val_fraction` is given for an export that has validation images.
    """
    if "val" not in exports:
        fraction = VAL_FRACTION if args.val_fraction is None else args.val_fraction
        return split_export(exports["train"], fraction, args.seed, args.split_by == "folder")
    if args.val_fraction is not None:
        raise UserError(
            f"--val_fraction {args.val_fraction:g}: {args.annotations} has its own validation images, omit the flag"
        )
    return exports


def log_dropped(dropped: Dropped) -> None:
    """Log each kind of dropped things with its number and the first one."""
    for kind, count in dropped.counts().most_common():
        first = next(row for row in dropped.rows if row.kind == kind)
        text = ", ".join(part for part in first[1:] if part)
        log.warning("dropped: %s: %d, first: %s", kind, count, text)


def log_result(folder: Path, statistics: dict[str, Any]) -> None:
    """Log what was written, classes that a split lacks, and the commands that come next."""
    for name, split in statistics.items():
        counts = {key: value for key, value in split.items() if isinstance(value, int) and value}
        log.info(
            "%s: %s", folder / f"{name}.json", ", ".join(f"{v} {k}" for k, v in counts.items())
        )
        absent = [label for label, count in split["classes"].items() if not count]
        if absent:
            log.warning("%s has no object of: %s", name, ", ".join(absent))
    files = {}
    for name in statistics:
        files[f"{name}_images"] = folder / name
        files[f"{name}_annotations"] = folder / f"{name}.json"
    paths = to_words(files)
    undecided = "images whose EXIF orientation no size tells"
    if any(split[undecided] for split in statistics.values()):
        # Labelling tools show images as their orientation says.
        paths += ["--exif", "apply"]
    log.info(
        "check it with: python tools/check_dataset.py --dataset_file custom %s", shlex.join(paths)
    )


if __name__ == "__main__":
    run_script(main, parse)
