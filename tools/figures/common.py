"""What the sub-commands of `tools/visualize.py` share: their flags, the images they read and the files they write."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.images.image_folder import ImageFolder, read_image
from datasets.sample import BadImageError
from predictor import Predictor
from tools.predict import picture_path, score_value
from util.errors import UserError
from util.files import check_outside_images, make_folder
from util.logger import Progress, log
from util.settings import FINETUNE, Parser, add_flags
from util.settings.value_types import positive

INFERENCE_FLAGS = ("device", "amp", "image_size", "max_size", "exif")
CHECKPOINT_HELP = (
    "a trained detector, ours or a published one, or the name of a published model such as detr_resnet50 "
    "(hubconf.py lists them)"
)


def add_output_flags(parser: Parser) -> None:
    """Add `--output_dir` and `--overwrite`."""
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="DIR", help="folder for the pictures"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace earlier pictures of the same names (default: off)",
    )


def add_checkpoint_flag(parser: Parser, text: str = CHECKPOINT_HELP, required: bool = True) -> None:
    parser.add_argument("--checkpoint", required=required, metavar="PATH|URL|NAME", help=text)


def add_count_flag(parser: Parser, default: int) -> None:
    parser.add_argument(
        "--count",
        type=positive(),
        default=default,
        metavar="N",
        help=f"number of images, the first ones (default: {default})",
    )


def add_threshold_flag(parser: Parser, default: float = 0.5) -> None:
    parser.add_argument(
        "--threshold",
        type=score_value,
        default=default,
        metavar="SCORE",
        help=f"lowest score of an object, from 0 to 1 (default: {default})",
    )


def add_image_flags(parser: Parser, count: int) -> None:
    """Add the flags of a command that reads images without annotations and runs a detector on them."""
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|FILE|LIST",
        help="folder of images (with subfolders), one image, or a text file with one path per line",
    )
    add_count_flag(parser, count)
    add_output_flags(parser)
    add_flags(parser, FINETUNE, INFERENCE_FLAGS)


def load_predictor(args: Namespace, class_agnostic: bool = False) -> Predictor:
    options = {name: getattr(args, name) for name in INFERENCE_FLAGS}
    return Predictor.from_checkpoint(args.checkpoint, class_agnostic=class_agnostic, **options)


@dataclass
class Picture:
    """An image to draw: its name, its pixels uint8 [3, H, W], and the file to write."""

    name: str
    image: Tensor
    path: Path

    @property
    def pixels(self) -> np.ndarray:
        return to_array(self.image)


def to_array(image: Tensor) -> np.ndarray:
    """Return a contiguous array: uint8 [3, H, W] -> [H, W, 3]."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def open_images(args: Namespace) -> ImageFolder:
    """Return the images of `--images`.

    Raises:
        UserError: there are none, or `--output_dir` is among them.
    """
    check_outside_images(args.output_dir, args.images)
    return ImageFolder(args.images)


def picture_files(images: ImageFolder, args: Namespace, prefix: str) -> list[Path]:
    """Return the file of each of the first `--count` images, PREFIX_000001_NAME.png.

    Raises:
        UserError: one of them exists and `--overwrite` is not given, or the folder can't be written.
    """
    paths = [
        picture_path(args.output_dir, i + 1, images.name(i), ".png", prefix)
        for i in range(min(args.count, len(images)))
    ]
    make_folder(args.output_dir, [path.name for path in paths], args.overwrite)
    return paths


def read_pictures(images: ImageFolder, paths: list[Path], args: Namespace) -> Iterator[Picture]:
    """Yield the images that can be read; the others are logged.

    Raises:
        UserError: none can be read.
    """
    bar, problems = Progress(len(paths), "draw", unit=" images"), []
    for i, path in enumerate(paths):
        try:
            image = read_image(images.file(i), args.exif)
        except BadImageError as error:
            log.warning("skipped %s: %s", images.path(i), error)
            problems.append(f"{images.path(i)}: {error}")
        else:
            yield Picture(images.name(i), image, path)
        bar.step()
    if len(problems) == len(paths):
        raise UserError(f"no image can be read, the first is {problems[0]}; give other --images")


def pixel_points(values: list[float] | None) -> list[tuple[float, float]] | None:
    """Return `--points` as (x, y) pairs, None without.

    Raises:
        UserError: an odd number of values.
    """
    if values is None:
        return None
    if len(values) % 2:
        raise UserError(f"--points has {len(values)} numbers: give two, x y, for each point")
    return list(zip(values[::2], values[1::2], strict=True))
