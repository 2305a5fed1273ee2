"""Draw what a pretext sees of images, and what a pre-trained model finds in them.

    python tools/visualize_pretext.py --pretext region_prior --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path IMAGES --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path cat.jpg --boxes 10 20 200 180 \\
        --output_dir pictures

Writes `samples.png`, training samples as the model gets them. With a checkpoint also one of

- `patches.png`: where each query patch was found (UP-DETR), or each region of one view in the other (Siamese DETR);
- `objects.png`: proposals next to the predicted boxes with the best scores (DETReg), and the ground truth with
  `--truth_path`; boxes of `--proposals file:PATH` are drawn on unlabelled images only.

It takes all flags of main.py. With a checkpoint, pretext, architecture and the flags of its run come from the file,
also from published ones. Pictures that this tool drew before are replaced, other files never.
"""

import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from datasets.sample import SampleDataset
from models import build_model
from models.trainable import TrainableModel
from predictor import Predictor
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.loading import load_strict
from util.errors import UserError
from util.files import make_folder, write_atomically
from util.logger import log
from util.plots.pages import COMPRESS_LEVEL
from util.random_state import SampleRNG
from util.runs.session import Session, run_script, start_session
from util.settings import FINETUNE, PRETRAIN, Parser, Settings, make_parser
from util.settings import settings as make_settings
from util.settings.value_types import positive
from visualization import NUM_IMAGES, draw_found_patches, draw_objects, draw_samples

PICTURES = ("samples.png", "patches.png", "objects.png")
DRAWN_BY = "tools/visualize_pretext.py"  # "Software" in the pictures, by which they are known as this tool's


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
    add_box_flag(parser)
    return parser.parse_args(argv)


def add_box_flag(parser: Parser) -> None:
    parser.add_argument(
        "--boxes",
        type=float,
        nargs="+",
        metavar="PIXEL",
        help="cut the query patches from these boxes, four values x0 y0 x1 y1 in pixels for each; use it with one "
        "image (default: the pretext's own boxes)",
    )


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
    check_boxes(args)


def check_boxes(args: Namespace) -> None:
    """
    Raises:
        UserError: a box of `--boxes` has not four values.
    """
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


def load_pretext(settings: Settings, checkpoint: Checkpoint | None) -> TrainableModel:
    """Build the pretext with the weights of the checkpoint, if there is one.

    Only losses read the frozen target encoder of DETReg, which published files lack: it is not needed.
    """
    model, _, _ = build_model(settings.replace(object_embedding_loss=False))
    if checkpoint:
        load_strict(model, without_embedding(checkpoint))
        model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
    return model


def without_embedding(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without DETReg's head for object embeddings."""
    model = {key: value for key, value in checkpoint.model.items() if "feature_embed." not in key}
    return replace(checkpoint, model=model)


def draw(folder: Path, args: Namespace, session: Session, dataset: SampleDataset) -> None:
    """Draw all pictures into a folder."""
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    model = load_pretext(settings, checkpoint)
    normalization = model.normalization
    draw_samples(folder, dataset, settings.batch_size, 0, normalization, args.count)
    if not checkpoint:
        return

    if hasattr(model, "patch_boxes"):
        model.to(device)
        draw_found_patches(folder, model, dataset, normalization, device, args.count)
        return
    predictor = Predictor.from_checkpoint(checkpoint, device=str(device), class_agnostic=True)
    labelled = None
    if args.truth_path:
        labelled = make_settings(FINETUNE, coco_path=args.truth_path)
    draw_objects(predictor, settings, folder / PICTURES[2], labelled=labelled, count=args.count)


def is_drawn_here(path: Path) -> bool:
    """Return True for a picture that this tool has written."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == DRAWN_BY
    except OSError:
        return False


def check_pictures(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: the folder has a picture of the same name that this tool did not draw.
    """
    for path in (folder / name for name in PICTURES):
        if path.exists() and not overwrite and not is_drawn_here(path):
            raise UserError(
                f"--output_dir {folder} already has {path.name}, which this tool did not draw: choose another folder, "
                "or add --overwrite"
            )


def publish(drawn: Path, folder: Path, overwrite: bool) -> list[str]:
    """Move the pictures to the output folder with this tool's mark, and remove those of its earlier runs.

    Returns:
        The names of the pictures.

    Raises:
        UserError: there is none, or the folder can't be written.
    """
    names = [name for name in PICTURES if (drawn / name).exists()]
    if not names:
        raise UserError("nothing could be drawn, see above; choose other images")
    make_folder(folder)
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", DRAWN_BY)
    for name in PICTURES:
        path = folder / name
        if name in names:
            with Image.open(drawn / name) as image:
                write_atomically(
                    path,
                    lambda file, page=image: page.save(
                        file, format="PNG", pnginfo=mark, compress_level=COMPRESS_LEVEL
                    ),
                )
        elif path.exists() and (overwrite or is_drawn_here(path)):
            path.unlink()
    return names


def main(args: Namespace) -> None:
    session = start_session({**vars(args), "resume": args.checkpoint})
    check_arguments(args, session.settings)
    folder = Path(session.settings.output_dir)
    check_pictures(folder, session.settings.overwrite)
    dataset = build_samples(args, session.settings)

    # Drawn elsewhere first, so that a failure leaves nothing behind.
    with tempfile.TemporaryDirectory() as drawn:
        draw(Path(drawn), args, session, dataset)
        names = publish(Path(drawn), folder, session.settings.overwrite)
    log.info("written to %s: %s", folder, ", ".join(names))


if __name__ == "__main__":
    run_script(main, parse)
