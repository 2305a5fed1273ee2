"""Query patches and where they were found: UP-DETR's patches, or Siamese DETR's regions of one view in the other."""

from argparse import Namespace

from tools.figures.common import add_checkpoint_flag, add_count_flag
from tools.visualize_pretext import add_box_flag, build_samples, check_boxes, load_pretext
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.runs.session import start_session
from util.settings import PRETRAIN, Parser
from util.settings import make_parser as script_parser
from visualization import write_patches

PAGE, COUNT = "patches.png", 4


def make_parser(title: str, headline: str, words: list[str]) -> Parser:
    """Return a parser with all flags of main.py."""
    parser = Parser(
        title,
        parents=[script_parser(PRETRAIN)],
        description=headline,
        usage="%(prog)s --checkpoint PATH --output_dir DIR [--boxes PIXEL ...] [--count N] [flags of main.py]",
    )
    add_checkpoint_flag(
        parser, "a model that was pre-trained with query patches, ours or a published one"
    )
    add_count_flag(parser, COUNT)
    add_box_flag(parser)
    return parser


def run(args: Namespace) -> None:
    """Write patches.png.

    Raises:
        UserError: the model has no query patches, there is no output folder, or it has such a page.
    """
    session = start_session({**vars(args), "resume": args.checkpoint})
    settings, device = session.settings, session.device
    if not settings.output_dir:
        raise UserError("the pictures have no folder to go to: add --output_dir DIR")
    check_boxes(args)
    model = load_pretext(settings, session.checkpoint).to(device)
    if not hasattr(model, "patch_boxes"):
        raise UserError(
            f"{args.checkpoint} was pre-trained without query patches (--pretext {settings.pretext}): use "
            "tools/visualize.py class_agnostic"
        )
    dataset = build_samples(args, settings)
    folder = make_folder(settings.output_dir, [PAGE], settings.overwrite)
    write_patches(folder / PAGE, model, dataset, model.normalization, device, args.count)
    log.info("written to %s: %s", folder, PAGE)
