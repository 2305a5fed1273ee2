"""Draw random subsets of the training images once, for runs that train on the same few labels.

    python tools/make_split.py --coco_path COCO --filter_pct 0.01 0.1 --seeds 1 2 3 --output_dir splits

Writes splits/0.01_seed1.json and so on, for `finetune_main.py --split_file`. A file selects the same images as
`--filter_pct` with `--seed`, as long as no image file is missing: here, missing images are dropped before the draw;
there, after it.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from datasets.labelled.subsets import sample_image_ids
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags, resolve
from util.settings.value_types import fraction

DATA_FLAGS = (
    "coco_path",
    "data_root",
    "dataset_file",
    "dataset",
    "train_images",
    "train_annotations",
    "voc_path",
    "voc_train",
    "airbus_path",
)


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/make_split.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--filter_pct",
        dest="fractions",
        type=fraction,
        nargs="+",
        default=[0.01, 0.02, 0.05, 0.1],
        metavar="FRACTION",
        help="fractions of the images (0.01 0.02 0.05 0.1)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        metavar="SEED",
        help="random seeds; one file per fraction and seed (42)",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="folder for the split files"
    )
    add_flags(parser, FINETUNE, DATA_FLAGS)
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    paths = {
        (part, seed): args.output_dir / f"{part:g}_seed{seed}.json"
        for part in args.fractions
        for seed in args.seeds
    }
    # Checked before the dataset is read and any file is written.
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten: give another --output_dir")

    settings = resolve({name: getattr(args, name) for name in DATA_FLAGS})
    annotations = build_dataset("train", settings).annotations
    for (part, seed), path in paths.items():
        ids = sample_image_ids(annotations.image_ids, part, seed)
        if not len(ids):
            raise UserError(
                f"--filter_pct {part:g} of {len(annotations)} images is none: give a larger one"
            )
        content = {
            "source": annotations.source,
            "images": len(annotations),
            "filter_pct": part,
            "seed": seed,
            "ids": ids.tolist(),
        }
        write_text(path, json.dumps(content))
        log.info("wrote %s: %d of %d images", path, len(ids), len(annotations))


if __name__ == "__main__":
    run_script(main, parse)
