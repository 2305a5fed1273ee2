"""Proposals against the ground truth, with recall: of a proposal method, or the boxes of a model.

An object is found if a proposal has an IoU of at least 0.5 with it.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import build_dataset
from datasets.proposals import build_proposals
from datasets.sample import BadImageError, SampleDataset
from predictor import Predictor
from tools.evaluate_proposals import DATA_FLAGS, METHOD_FLAGS, RUN_FLAGS, select_flags
from tools.figures.common import add_checkpoint_flag, add_count_flag, add_output_flags, to_array
from util.box_ops import box_iou
from util.errors import UserError
from util.files import make_folder
from util.logger import Progress, log
from util.plots.attention import fit_image
from util.plots.boxes import Color, draw_boxes
from util.plots.pages import panel_page
from util.random_state import SampleRNG
from util.runs.session import start_session
from util.settings import FINETUNE, PRETRAIN, Parser, Settings
from util.settings import add_flags as add_script_flags
from util.settings import settings as make_settings

PAGE, COUNT, PAGE_SIDE = "proposals.png", 6, 320
IOU, DEFAULT_NUM = 0.5, 100
FOUND: Color = (0, 158, 115)
MISSED: Color = (220, 40, 40)
PROPOSED: Color = (150, 170, 190)
MATCHED: Color = (0, 114, 178)


def add_flags(parser: Parser) -> None:
    add_checkpoint_flag(
        parser,
        "draw the boxes of this pre-trained model or trained detector; not with --proposals (default: none)",
        required=False,
    )
    add_count_flag(parser, COUNT)
    add_output_flags(parser)
    add_script_flags(parser, FINETUNE, DATA_FLAGS + RUN_FLAGS)
    add_script_flags(parser, PRETRAIN, METHOD_FLAGS)
    for action in parser._actions:
        if action.dest == "max_prop":
            action.help = f"proposals of each image, the best ones (default: {DEFAULT_NUM})"


def method_settings(args: Namespace) -> Settings:
    """Return the settings of `--proposals`; they do not depend on a run."""
    return make_settings(PRETRAIN, pretext="region_prior", **select_flags(args, METHOD_FLAGS))


def run(args: Namespace) -> None:
    """Write proposals.png.

    Raises:
        UserError: neither a method nor a model is given, or both; the data can't be used.
    """
    if bool(args.checkpoint) == bool(args.proposals):
        both = ", not both" if args.proposals else ""
        raise UserError(
            f"give --checkpoint PATH for a model, or --proposals NAME for a method{both}"
        )
    limit = args.max_prop or DEFAULT_NUM
    session = start_session(select_flags(args, DATA_FLAGS + RUN_FLAGS), FINETUNE)
    dataset = build_dataset("val", session.settings, allow_any_num_classes=True)
    propose = _proposal_function(args, session.settings, str(session.device))
    folder = make_folder(args.output_dir, [PAGE], args.overwrite)
    rows, pairs = _rows(dataset, propose, limit, args.count)
    if not rows:
        raise UserError(f"no image of {dataset.annotation_file} can be read, see above")
    panel_page(rows, Path(folder) / PAGE, columns=2)
    log.info("written to %s: %s; recall %s", folder, PAGE, recall_text(pairs, limit))


def _proposal_function(
    args: Namespace, validation: Settings, device: str
) -> Callable[[Tensor, int, str], Tensor]:
    """Return (image, index, name) -> boxes_xyxy_abs [N, 4], best first."""
    if args.checkpoint:
        predictor = Predictor.from_checkpoint(args.checkpoint, device=device, class_agnostic=True)
        return lambda image, _index, _name: predictor(image, threshold=0.0).boxes
    method = build_proposals(method_settings(args))
    return lambda image, index, name: method(
        image, SampleRNG.from_key(validation.seed, 0, index), name
    )


def _rows(dataset: SampleDataset, propose: Callable, limit: int, count: int) -> tuple[list, list]:
    """Return the rows of the page, and (objects, proposals) of each image."""
    annotations, rows, pairs = dataset.annotations, [], []
    # Images without objects show nothing about recall.
    with_objects = np.flatnonzero(np.diff(annotations.offsets))[:count].tolist()
    bar = Progress(len(with_objects), "proposals", unit=" images")
    for index in with_objects:
        bar.step()
        try:
            image = dataset.read(index)
        except BadImageError as error:
            log.warning("skipped %s: %s", dataset.path(index), error)
            continue
        name = annotations.file_names[index]
        objects = torch.as_tensor(
            annotations.boxes_xyxy_abs[annotations.offsets[index] : annotations.offsets[index + 1]]
        )
        proposed = propose(image, index, name)[:limit]
        iou, best = best_proposals(objects, proposed)
        pairs.append((objects, proposed))
        rows.append(_panels(image, name, objects, proposed, iou, best))
    return rows, pairs


def best_proposals(objects: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest IoU of each object with a proposal, and which one it is: [N] each; 0 and -1 without any."""
    if not len(proposed):
        return torch.zeros(len(objects)), torch.full((len(objects),), -1)
    values, index = box_iou(objects, proposed)[0].max(1)
    return values, index


def recall_text(pairs: list[tuple[Tensor, Tensor]], limit: int) -> str:
    """Return recall at an IoU of 0.5 with 1, 10, 100, ... and all proposals of the drawn images."""
    total = sum(len(objects) for objects, _ in pairs)
    counts = [n for n in (1, 10, 100, 1000) if n < limit] + [limit]
    parts = []
    for n in counts:
        found = sum(int((best_proposals(o, p[:n])[0] >= IOU).sum()) for o, p in pairs)
        parts.append(f"@{n} {found / total:.2f}")
    return f"{'  '.join(parts)} of {total} objects in {len(pairs)} images"


def _panels(image, name, objects, proposed, iou, best) -> list:
    """Return the panels of one image: all proposals, and the ground truth with the best proposal of each object."""
    pixels, factor = fit_image(to_array(image), PAGE_SIDE)
    found = iou >= IOU
    matched = proposed[best[found]]
    thin = draw_boxes(pixels, proposed * factor, None, None, [PROPOSED] * len(proposed))
    faded = (0.45 * thin + 0.55 * pixels).round().astype(np.uint8)
    left = draw_boxes(faded, matched * factor, None, None, [MATCHED] * len(matched))

    right = draw_boxes(pixels, matched * factor, None, None, [MATCHED] * len(matched))
    colors = [FOUND if is_found else MISSED for is_found in found.tolist()]
    labels = [f"IoU {value:.2f}" for value in iou.tolist()]
    right = draw_boxes(right, objects * factor, labels, None, colors)
    nothing = {"boxes": np.zeros((0, 4)), "labels": None}
    return [
        (f"{len(proposed)} proposals, the best in blue", left, nothing),
        (f"ground truth: {int(found.sum())} of {len(objects)} found", right, nothing),
    ]
