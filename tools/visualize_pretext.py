"""Draw what a pretext sees of images, and what a pre-trained model finds in them.

    python tools/visualize_pretext.py --pretext region_prior --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path cat.jpg --boxes 10 20 200 180 \\
        --output_dir pictures

Writes `samples.png`, training samples as the model gets them. With a checkpoint also one of

- `patches.png`: where each query patch was found (UP-DETR), or each region of one view in the other (Siamese DETR);
- `objects.png`: proposals next to the predicted boxes with the best scores (DETReg), and the ground truth with
  `--truth_path`.

It takes all flags of main.py; with a checkpoint, those of its run are known.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from datasets.sample import SampleDataset
from models import build_model
from predictor import Predictor
from util.checkpoints.loading import load_strict
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.random_state import SampleRNG
from util.runs.session import run_script, start_session
from util.settings import FINETUNE, PRETRAIN, Parser, Settings, make_parser
from util.settings import settings as make_settings
from util.settings.value_types import positive
from visualization import NUM_IMAGES, draw_found_patches, draw_objects, draw_samples

PICTURES = ("samples.png", "patches.png", "objects.png")


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "tools/visualize_pretext.py",
        parents=[make_parser(PRETRAIN)],
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH|URL",
        help="pre-trained model to visualize (default: none, only samples are drawn)",
    )
    parser.add_argument(
        "--truth_path",
        metavar="DIR",
        help="COCO folder: draw objects.png on its validation images, with their ground-truth boxes "
        "(default: on the pretext's own images)",
    )
    parser.add_argument(
        "--count",
        type=positive(),
        default=NUM_IMAGES,
        metavar="N",
        help=f"number of images to draw (default: {NUM_IMAGES})",
    )
    parser.add_argument(
        "--boxes",
        type=float,
        nargs="+",
        metavar="PIXEL",
        help="cut the query patches from these boxes, four values x0 y0 x1 y1 in pixels for each; use it with one "
        "image (default: the pretext's own boxes)",
    )
    return parser.parse_args(argv)


class FixedBoxes:
    """A proposal method that returns the same boxes for every image."""

    def __init__(self, boxes_xyxy_abs: list[float]) -> None:
        self.boxes = torch.tensor(boxes_xyxy_abs).view(-1, 4)  # [N, 4]

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        """Return the boxes [N, 4] of an image [3, H, W].

        Raises:
            UserError: a box is not inside the image, or smaller than a pixel.
        """
        height, width = image.shape[-2:]
        top_left, bottom_right = self.boxes[:, :2], self.boxes[:, 2:]
        inside = (top_left >= 0).all() and (bottom_right <= torch.tensor([width, height])).all()
        if not inside or not (bottom_right - top_left >= 1).all():
            raise UserError(
                f"--boxes: each box needs x0 < x1 <= {width} and y0 < y1 <= {height}, the size of {name}, in pixels"
            )
        return self.boxes


def check_arguments(args: Namespace, settings: Settings) -> None:
    """
    Raises:
        UserError: there is no output folder, or a box has not four values.
    """
    if not settings.output_dir:
        raise UserError("the pictures have no folder to go to: add --output_dir DIR")
    if args.boxes and len(args.boxes) % 4:
        raise UserError(
            f"--boxes has {len(args.boxes)} numbers: give four, x0 y0 x1 y1, for each box"
        )


def build_samples(args: Namespace, settings: Settings) -> SampleDataset:
    """Return the pretext's dataset; with `--boxes` without augmentation, and with these boxes as proposals."""
    if not args.boxes:
        return build_dataset("train", settings)

    dataset = build_dataset("val", settings)
    if not hasattr(dataset, "proposals"):
        raise UserError(
            f"--boxes: --pretext {settings.pretext} uses no proposals; omit it or choose another pretext"
        )
    dataset.proposals = FixedBoxes(args.boxes)
    dataset[0]  # reports wrong boxes before a folder is created
    return dataset


def main(args: Namespace) -> None:
    session = start_session({**vars(args), "resume": args.checkpoint})
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    check_arguments(args, settings)
    dataset = build_samples(args, settings)
    folder = make_folder(settings.output_dir, PICTURES, settings.overwrite)

    model, _, _ = build_model(settings)
    normalization = model.normalization
    draw_samples(folder, dataset, settings.batch_size, 0, normalization, args.count)

    if checkpoint:
        load_strict(model, checkpoint)
        model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
        if hasattr(model, "patch_boxes"):
            model.to(device)
            draw_found_patches(folder, model, dataset, normalization, device, args.count)
        else:
            predictor = Predictor.from_checkpoint(
                checkpoint, device=str(device), class_agnostic=True
            )
            labelled = None
            if args.truth_path:
                labelled = make_settings(FINETUNE, coco_path=args.truth_path)
            path = folder / "objects.png"
            draw_objects(predictor, settings, path, labelled=labelled, count=args.count)

    written = [name for name in PICTURES if (folder / name).exists()]
    log.info("written to %s: %s", folder, ", ".join(written))


if __name__ == "__main__":
    run_script(main, parse)
