"""The best class-agnostic boxes of a pre-trained model or a detector, next to those of a proposal method.

As figure 1 of DETReg (Bar et al. 2022).
"""

from argparse import Namespace

import torch

from datasets.proposals import build_proposals
from tools.figures.common import (
    add_checkpoint_flag,
    add_image_flags,
    load_predictor,
    open_images,
    read_pictures,
)
from tools.figures.proposals import METHOD_FLAGS, PAGE_SIDE, method_settings
from util.files import make_folder
from util.logger import log
from util.plots.attention import fit_image
from util.plots.boxes import cycle_colors, draw_boxes
from util.plots.pages import panel_page
from util.random_state import SampleRNG
from util.settings import PRETRAIN, Parser
from util.settings import add_flags as add_script_flags
from util.settings.value_types import positive

PAGE, COUNT, TOP = "class_agnostic.png", 6, 10


def add_flags(parser: Parser) -> None:
    add_checkpoint_flag(
        parser, "a pre-trained model or a trained detector, ours or a published one"
    )
    add_image_flags(parser, COUNT)
    parser.add_argument(
        "--top",
        type=positive(),
        default=TOP,
        metavar="N",
        help=f"number of boxes in each image, the best ones (default: {TOP})",
    )
    add_script_flags(parser, PRETRAIN, METHOD_FLAGS)


def run(args: Namespace) -> None:
    """Write class_agnostic.png."""
    images = open_images(args)
    method = build_proposals(method_settings(args)) if args.proposals else None
    predictor = load_predictor(args, class_agnostic=True)
    folder = make_folder(args.output_dir, [PAGE], args.overwrite)
    paths = [folder / PAGE] * min(args.count, len(images))

    rows = []
    for i, picture in enumerate(read_pictures(images, paths, args)):
        image, factor = fit_image(picture.pixels, PAGE_SIDE)
        found = predictor(picture.image, threshold=0.0)
        boxes, scores = found.boxes[: args.top], found.scores[: args.top]
        panels = [(f"best {len(boxes)} boxes", _draw(image, boxes * factor, scores.tolist()))]
        if method is not None:
            proposed = method(picture.image, SampleRNG.from_key(0, 0, i), picture.name)[: args.top]
            panels.append(
                (f"{args.proposals}, first {len(proposed)}", _draw(image, proposed * factor))
            )
        nothing = {"boxes": torch.zeros(0, 4), "labels": None}
        rows.append([(title, drawn, nothing) for title, drawn in panels])
    panel_page(rows, folder / PAGE, columns=2 if method is not None else 3)
    log.info("written to %s: %s", folder, PAGE)


def _draw(image, boxes_xyxy_abs, scores=None):
    """Draw boxes in colors that tell neighbors in the ranking apart."""
    return draw_boxes(image, boxes_xyxy_abs, None, scores, cycle_colors(len(boxes_xyxy_abs)))
