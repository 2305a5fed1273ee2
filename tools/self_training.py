"""One round of self-training: a detector trained on few labels proposes the boxes of the next pre-training.

    python tools/self_training.py --checkpoint outputs/few/checkpoint_best.pth --images photos \
        --output_dir outputs/round1 -- --epochs 20 --batch_size 8 --lr_backbone 1e-5

1. The detector finds objects in the unlabelled images, regardless of their class: `proposals.json`.
2. The same architecture is pre-trained by region prior on these boxes, from its backbone's first weights: `pretrain/`.

Everything after `--` are flags of main.py for the second step; architecture, backbone and image size are those of the
checkpoint unless they are given. Labels of the unlabelled images are not used, but those of the detector's own training
images are: compare the result with the detector itself and not with pre-training without labels.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchvision.ops import nms

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as pretrain_main
from datasets.evaluators.proposals import OBJECT_ID
from datasets.images.image_folder import ImageFolder
from predictor import Predictor
from tools.predict import score_value
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.errors import UserError
from util.files import make_folder, to_json, write_text
from util.logger import Progress, log
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, Parser, add_flags
from util.settings.table import MODEL, flags_of
from util.settings.words import to_words

PROPOSALS, RUN = "proposals.json", "pretrain"
DUPLICATE_IOU = 0.5  # of two boxes above this IoU only the better one is kept
OF_THIS_TOOL = ("pretext", "proposals", "imagenet_path", "output_dir", "cache_path")


def parse(argv: list[str]) -> Namespace:
    own, flags = _split(argv)
    parser = Parser("tools/self_training.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH|URL", help="a detector trained with labels"
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="unlabelled images: a folder (with subfolders), a text file with a list, or tar files",
    )
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", help="folder for the boxes and the run"
    )
    parser.add_argument(
        "--threshold",
        type=score_value,
        default=0.25,
        metavar="SCORE",
        help="lowest score of a box, from 0 to 1 (default: 0.25)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier round in --output_dir (default: off)",
    )
    add_flags(parser, FINETUNE, ("device", "num_workers"))
    return Namespace(**vars(parser.parse_args(own)), pretrain_flags=flags)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split at `--` into the flags of this tool and those of main.py."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def find_boxes(predictor: Predictor, images: ImageFolder, args: Namespace) -> dict[str, Any]:
    """Return the boxes of all images in COCO's format, with scores; images without a box are listed too."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": OBJECT_ID, "name": "object"}],
    }
    bar = Progress(len(images), "boxes")
    for result in predictor.predict_files(
        images, threshold=args.threshold, num_workers=args.num_workers
    ):
        bar.step()
        name, prediction = images.names[result.index], result.prediction
        if prediction is None:
            log.warning("skipped %s: %s", images.path(result.index), result.error)
            continue
        height, width = prediction.size_hw
        image_id = len(content["images"]) + 1
        content["images"].append(
            {"id": image_id, "file_name": name, "height": height, "width": width}
        )
        kept = nms(prediction.boxes, prediction.scores, DUPLICATE_IOU)
        for box, score in zip(
            prediction.boxes[kept].tolist(), prediction.scores[kept].tolist(), strict=True
        ):
            x0, y0, x1, y1 = box
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": OBJECT_ID,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return content


def pretrain_command(args: Namespace, checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Return the flags of main.py: the checkpoint's architecture, the boxes, and what the user gave."""
    given = {word.lstrip("-").split("=")[0] for word in args.pretrain_flags if word[:2] == "--"}
    for name in OF_THIS_TOOL:
        if name in given:
            raise UserError(f"--{name} after --: tools/self_training.py sets it; omit it")

    chosen: dict[str, Any] = {
        "pretext": "region_prior",
        "proposals": f"file:{folder / PROPOSALS}",
        "imagenet_path": args.images,
        "output_dir": folder / RUN,
        "num_classes": 1,
        **_architecture(checkpoint.args),
    }
    return [
        *to_words({name: value for name, value in chosen.items() if name not in given}),
        *args.pretrain_flags,
    ]


def _architecture(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of model and image size that main.py has too."""
    flags = flags_of(PRETRAIN)
    names = {name for name, flag in flags.items() if flag.group == MODEL}
    names |= {"image_size", "max_size"}
    names -= {"masks", "num_classes", "classification"}
    return {
        name: stored[name]
        for name in flags
        if name in names and stored.get(name) not in (None, False, "")
    }


def main(args: Namespace) -> None:
    checkpoint = load_checkpoint(args.checkpoint)
    if "script" not in checkpoint.args:
        raise UserError(
            f"{args.checkpoint} was not trained by this project, so its settings are not known: "
            "write the boxes with tools/predict.py and give them to main.py --proposals file:PATH"
        )
    images = ImageFolder(args.images)
    folder = make_folder(args.output_dir, (PROPOSALS, RUN), args.overwrite)
    words = pretrain_command(args, checkpoint, folder)
    pretrain_args = pretrain_main.parse(words)  # a wrong flag is reported before the search

    predictor = Predictor.from_checkpoint(checkpoint, device=args.device, class_agnostic=True)
    content = find_boxes(predictor, images, args)
    count = len(content["annotations"])
    if not count:
        raise UserError(f"no box has a score of {args.threshold} or more: lower --threshold")
    log.info("%d boxes in %d images (threshold %g)", count, len(content["images"]), args.threshold)
    write_text(folder / PROPOSALS, to_json(content) + "\n")
    log.info("python main.py %s", " ".join(words))
    pretrain_main.main(pretrain_args)


if __name__ == "__main__":
    run_script(main, parse)
