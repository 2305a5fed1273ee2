"""Pictures of a pretext: what it sees of images, and what a pre-trained model makes of them.

    python tools/visualize_pretext.py --pretext region_prior --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path cat.jpg --boxes 10 20 200 180 \\
        --output_dir pictures

`samples.png`: training samples as the model gets them. With a checkpoint also `patches.png`, where each query patch was
found (UP-DETR) or each region of one view in the other (Siamese DETR), or `objects.png`, proposals and the model's most
object-like boxes beside them (DETReg), and the ground truth where `--truth_path` gives labels. It
takes all flags of main.py; those of a checkpoint's run are known from it.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

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
        help="of pre-training; without one only samples are drawn",
    )
    parser.add_argument(
        "--truth_path",
        metavar="DIR",
        help="COCO folder: its validation images with their objects, for objects.png",
    )
    parser.add_argument(
        "--count", type=positive(), default=NUM_IMAGES, help=f"images ({NUM_IMAGES})"
    )
    parser.add_argument(
        "--boxes",
        type=float,
        nargs="+",
        metavar="PIXEL",
        help="x0 y0 x1 y1 of patches, chosen by hand for one image",
    )
    return parser.parse_args(argv)


class FixedBoxes:
    """The same boxes for every image, as a proposal method."""

    def __init__(self, boxes_xyxy_abs: list[float]) -> None:
        self.boxes = torch.tensor(boxes_xyxy_abs).view(-1, 4)

    def __call__(self, image: Tensor, rng: SampleRNG, name: str = "") -> Tensor:
        """Raises UserError for a box that does not lie in the image."""
        height, width = image.shape[-2:]
        inside = (self.boxes[:, :2] >= 0).all(1) & (
            self.boxes[:, 2:] <= torch.tensor([width, height])
        ).all(1)
        if not (inside & (self.boxes[:, 2:] - self.boxes[:, :2] >= 1).all(1)).all():
            raise UserError(
                f"--boxes: each box needs x0 < x1 <= {width} and y0 < y1 <= {height}, the size of {name}, in pixels"
            )
        return self.boxes


def build_dataset_and_folder(args: Namespace, settings: Settings) -> tuple[SampleDataset, Path]:
    """The pretext's images, without augmentation where boxes are chosen by hand, and the folder for the pictures."""
    if not settings.output_dir:
        raise UserError("give --output_dir DIR for the pictures")
    if args.boxes and len(args.boxes) % 4:
        raise UserError(f"--boxes has {len(args.boxes)} numbers: each box is x0 y0 x1 y1")
    dataset = build_dataset("val" if args.boxes else "train", settings)
    if args.boxes:
        if not hasattr(dataset, "proposals"):
            raise UserError(f"--boxes: --pretext {settings.pretext} takes no boxes from outside")
        dataset.proposals = FixedBoxes(args.boxes)
        dataset[0]  # says what is wrong with the boxes
    return dataset, make_folder(settings.output_dir, PICTURES, settings.overwrite)


def main(args: Namespace) -> None:
    session = start_session({**vars(args), "resume": args.checkpoint})
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    dataset, folder = build_dataset_and_folder(args, settings)
    model, _, _ = build_model(settings)
    draw_samples(folder, dataset, settings.batch_size, 0, model.normalization, args.count)
    if checkpoint:
        load_strict(model, checkpoint)
        model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
        draw_found_patches(
            folder, model.to(device), dataset, model.normalization, device, args.count
        )
        if not hasattr(model, "patch_boxes"):
            predictor = Predictor.from_checkpoint(
                checkpoint, device=str(device), class_agnostic=True
            )
            labelled = (
                make_settings(FINETUNE, coco_path=args.truth_path) if args.truth_path else None
            )
            draw_objects(
                predictor, settings, folder / "objects.png", labelled=labelled, count=args.count
            )
    log.info("in %s: %s", folder, ", ".join(name for name in PICTURES if (folder / name).exists()))


if __name__ == "__main__":
    run_script(main, parse)
