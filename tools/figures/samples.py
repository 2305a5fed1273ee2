"""Augmented training samples as the model gets them, with their boxes, masks, patches and padding."""

from argparse import Namespace

from datasets import build_dataset
from models import build_backbone
from tools.figures.common import add_count_flag
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.runs.session import start_session
from util.settings import FINETUNE, PRETRAIN, Parser
from util.settings import make_parser as script_parser
from util.settings.value_types import non_negative
from visualization import NUM_IMAGES, write_samples

PAGE = "samples.png"
PRETRAINING_FLAGS = ("--pretext", "--imagenet_path")


def make_parser(title: str, headline: str, words: list[str]) -> Parser:
    """Return a parser with all flags of the script that would train on the samples."""
    pretrains = any(word.split("=")[0] in PRETRAINING_FLAGS for word in words)
    parser = Parser(
        title,
        parents=[script_parser(PRETRAIN if pretrains else FINETUNE)],
        description=headline,
        usage="%(prog)s --output_dir DIR [--checkpoint PATH] [--epoch N] [--count N] [flags of finetune_main.py; "
        "with --pretext or --imagenet_path those of main.py]",
    )
    add_count_flag(parser, NUM_IMAGES)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH|URL",
        help="take the flags that are not given from the run of this checkpoint (default: the scripts' defaults)",
    )
    parser.add_argument(
        "--epoch",
        type=non_negative(),
        default=0,
        metavar="N",
        help="epoch whose augmentation is drawn, from 0 (default: 0)",
    )
    return parser


def run(args: Namespace) -> None:
    """Write samples.png.

    Raises:
        UserError: there is no output folder, or it has such a page, or the data can't be used.
    """
    settings = start_session({**vars(args), "resume": args.checkpoint}).settings
    if not settings.output_dir:
        raise UserError("the pictures have no folder to go to: add --output_dir DIR")
    dataset = build_dataset("train", settings)
    # Weights are not needed, only the mean and standard deviation that belong to the backbone.
    backbone = build_backbone(settings.replace(backbone_weights="none"))[0]
    normalization = {"mean": list(backbone.mean), "std": list(backbone.std)}
    folder = make_folder(settings.output_dir, [PAGE], settings.overwrite)
    path = folder / PAGE
    write_samples(path, dataset, settings.batch_size, args.epoch, normalization, args.count)
    log.info("written to %s: %s", folder, PAGE)
