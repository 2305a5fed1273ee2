"""One round of self-training: a detector trained on few labels proposes the boxes of the next pre-training.

    python tools/self_training.py --checkpoint outputs/few/checkpoint_best.pth --images photos \
        --output_dir outputs/round1 -- --epochs 20 --batch_size 8 --lr_backbone 1e-5

1. The detector finds objects in the unlabelled images, regardless of their class: `proposals.json`.
2. The same architecture is pre-trained by region prior on these boxes, from its backbone's first weights: `pretrain/`.

Everything after `--` are flags of main.py for the second step; architecture, backbone and image size are those of the
checkpoint unless they are given. `--boxes_only` stops after the first step and prints the command of the second one, so
that several GPUs can run it (torchrun, SLURM).

The checkpoint may come from pre-training: then no label is used at all. Otherwise those of the detector's own training
images are, so compare the result with the detector itself and not with pre-training without labels.

A detector that learned from noisy boxes knows better than they which of them are objects, but draws them less exactly.
`--snap_to CACHE` replaces each of its boxes by a box of a proposal cache, such as the one of the first pre-training.
"""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as pretrain_main
from datasets.evaluators.proposals import OBJECT_ID
from datasets.images.image_folder import ImageFolder
from datasets.proposals.base import to_pixels
from datasets.proposals.cache import CachedProposals, ProposalCache
from predictor import Predictor
from tools.predict import score_value, set_num_workers_default
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.errors import UserError
from util.files import make_folder, to_json, write_text
from util.logger import Progress, log
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, Parser, add_flags
from util.settings.table import MODEL, flags_of
from util.settings.value_types import positive
from util.settings.words import to_words

PROPOSALS, RUN = "proposals.json", "pretrain"
THRESHOLD = 0.25
MAX_SHARE = 3  # boxes of one image, as a multiple of --boxes_per_image
DUPLICATE_IOU = 0.5  # of two boxes above this IoU only the better one is kept
OF_THIS_TOOL = ("pretext", "proposals", "imagenet_path", "output_dir", "cache_path")


def parse(argv: list[str]) -> Namespace:
    own, flags = _split(argv)
    parser = Parser("tools/self_training.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH|URL",
        help="a detector trained with labels, or a pre-trained one",
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
        metavar="SCORE",
        help=f"lowest score of a box, from 0 to 1 (default: {THRESHOLD})",
    )
    parser.add_argument(
        "--boxes_per_image",
        type=positive(float),
        metavar="N",
        help=f"instead of --threshold: the best boxes of all images together, N per image on average and at most "
        f"{MAX_SHARE} times as many in one (default: not set)",
    )
    parser.add_argument(
        "--snap_to",
        metavar="CACHE",
        help="proposal cache of the same images: each box becomes the cached one with the highest product of score and "
        "squared IoU with it (default: boxes stay as they are)",
    )
    parser.add_argument(
        "--boxes_only",
        action="store_true",
        help="write the boxes and print the command that pre-trains on them, for several GPUs (default: off)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier round in --output_dir (default: off)",
    )
    parser.add_argument(
        "--batch_size",
        type=positive(),
        default=8,
        metavar="N",
        help="images in which boxes are found at once (default: 8)",
    )
    add_flags(parser, FINETUNE, ("device", "num_workers"))
    set_num_workers_default(parser)
    args = parser.parse_args(own)
    if args.threshold is not None and args.boxes_per_image:
        raise UserError("--threshold and --boxes_per_image both choose the boxes: give one of them")
    threshold = args.threshold
    if threshold is None:
        threshold = 0.0 if args.boxes_per_image else THRESHOLD
    return Namespace(**{**vars(args), "threshold": threshold, "pretrain_flags": flags})


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split at `--` into the flags of this tool and those of main.py."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


class Snapping:
    """Replaces boxes of images by those of a proposal cache.

    Raises:
        UserError: the folder is no proposal cache, or lacks some of the images.
    """

    def __init__(self, folder: str, images: ImageFolder) -> None:
        self.cache = ProposalCache(folder)
        CachedProposals(self.cache).check(images)

    def __call__(
        self, boxes_xyxy_abs: Tensor, scores: Tensor, name: str, size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return boxes [K, 4] and scores [K] of the image `name`: K <= N."""
        index = self.cache.names.find(name)
        assert index is not None, name  # `check` has compared the names
        proposals, of_proposals = self.cache.get_boxes(index)
        weights = (
            torch.ones(len(proposals)) if of_proposals is None else torch.from_numpy(of_proposals)
        )
        proposals_xyxy_abs = to_pixels(proposals, self.cache.header["grid"], size_hw)
        return snap(boxes_xyxy_abs, scores, proposals_xyxy_abs, weights)


def snap(
    boxes: Tensor, scores: Tensor, proposals: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace each box by the proposal with the highest product of its weight and the squared IoU.

    Args:
        boxes: [N, 4], (x0, y0, x1, y1); scores: [N].
        proposals: [M, 4] in the same unit; weights: [M], not negative.

    Returns:
        Boxes [K, 4] and scores [K], best first. A proposal that several boxes choose comes once, with the highest of
        their scores. A box that overlaps no proposal stays as it is.
    """
    if not len(boxes) or not len(proposals):
        return boxes, scores
    best, chosen = (box_iou(boxes, proposals) ** 2 * weights).max(1)  # [N]
    by_score = scores.argsort(descending=True)
    # A box without a proposal counts as a choice of its own, beyond the proposals.
    own = len(proposals) + torch.arange(len(boxes))
    chosen = torch.where(best > 0, chosen, own)[by_score]
    is_first = (chosen[:, None] == chosen).int().argmax(1) == torch.arange(len(chosen))
    return torch.cat([proposals, boxes])[chosen[is_first]], scores[by_score][is_first]


def find_boxes(
    predictor: Predictor, images: ImageFolder, args: Namespace, snapping: Snapping | None
) -> dict[str, Any]:
    """Return the boxes of all images in COCO's format, with scores; images without a box are listed too."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": OBJECT_ID, "name": "object"}],
    }
    bar = Progress(len(images), "boxes")
    limit = math.ceil(MAX_SHARE * args.boxes_per_image) if args.boxes_per_image else None
    for result in predictor.predict_files(
        images, threshold=args.threshold, batch_size=args.batch_size, num_workers=args.num_workers
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
        boxes, scores = prediction.boxes[kept], prediction.scores[kept]
        if snapping:
            boxes, scores = snapping(boxes, scores, name, prediction.size_hw)
        for box, score in zip(boxes[:limit].tolist(), scores[:limit].tolist(), strict=True):
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
    if args.boxes_per_image:
        count = math.ceil(args.boxes_per_image * len(content["images"]))
        content["annotations"] = best_boxes(content["annotations"], count)
    return content


def best_boxes(annotations: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the `count` annotations with the highest scores, in their order."""
    by_score = sorted(range(len(annotations)), key=lambda i: -annotations[i]["score"])
    return [annotations[i] for i in sorted(by_score[:count])]


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
        # Not in a command to run later: it would delete a run that was stopped and starts again.
        "overwrite": args.overwrite and not args.boxes_only,
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
    snapping = Snapping(args.snap_to, images) if args.snap_to else None
    folder = make_folder(args.output_dir, (PROPOSALS, RUN), args.overwrite)
    words = pretrain_command(args, checkpoint, folder)
    pretrain_args = pretrain_main.parse(words)  # a wrong flag is reported before the search

    predictor = Predictor.from_checkpoint(checkpoint, device=args.device, class_agnostic=True)
    content = find_boxes(predictor, images, args, snapping)
    count = len(content["annotations"])
    if not count:
        raise UserError(f"no box has a score of {args.threshold} or more: lower --threshold")
    lowest = min(box["score"] for box in content["annotations"])
    log.info("%d boxes in %d images, scores from %.2f", count, len(content["images"]), lowest)
    write_text(folder / PROPOSALS, to_json(content) + "\n")
    log.info("pre-train on them with: python main.py %s", shlex.join(words))
    if not args.boxes_only:
        pretrain_main.main(pretrain_args)


if __name__ == "__main__":
    run_script(main, parse)
