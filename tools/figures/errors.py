"""Errors by type on a labelled dataset: how many, what each type costs in AP50, and pictures of the worst.

The types are those of TIDE (Bolya et al. 2020): classification, localisation, both, duplicate, background, missed.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

import engine
from datasets import build_labelled, build_loader
from datasets.evaluators.error_types import (
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    ERROR_TYPES,
    LOCALISATION,
    MISSED,
    Error,
    ErrorEvaluator,
    ErrorSummary,
)
from datasets.sample import BadImageError, SampleDataset
from predictor import Predictor
from tools.evaluate_proposals import DATA_FLAGS, RUN_FLAGS, select_flags
from tools.figures.common import (
    add_checkpoint_flag,
    add_output_flags,
    add_threshold_flag,
    to_array,
)
from util.checkpoints.classes import infer_classes
from util.errors import UserError
from util.files import make_folder, to_json, write_text
from util.logger import log
from util.plots.attention import fit_image
from util.plots.boxes import Color, draw_boxes
from util.plots.fonts import class_text
from util.plots.pages import panel_page
from util.runs.session import Session, start_session
from util.settings import FINETUNE, Parser
from util.settings import add_flags as add_script_flags
from util.settings.value_types import non_negative

PAGE, TABLE, DATA = "errors.png", "errors.md", "errors.json"
EXAMPLES, SIDE = 4, 300
CONFUSIONS = 10  # the most frequent ones, in the table
OBJECT: Color = (0, 158, 115)
DETECTION: Color = (220, 40, 40)
MEANINGS = {
    CLASSIFICATION: "right place (IoU >= 0.5), wrong class",
    LOCALISATION: "right class, 0.1 <= IoU < 0.5",
    BOTH: "wrong class, 0.1 <= IoU < 0.5",
    DUPLICATE: "right, but a better detection has the object",
    "background": "IoU < 0.1 with every object",
    MISSED: "object that no detection is near to",
}


def add_flags(parser: Parser) -> None:
    add_checkpoint_flag(parser)
    add_output_flags(parser)
    add_threshold_flag(parser, 0.3)
    parser.add_argument(
        "--examples",
        type=non_negative(),
        default=EXAMPLES,
        metavar="N",
        help=f"pictures of each type, those with the highest scores (default: {EXAMPLES})",
    )
    add_script_flags(parser, FINETUNE, DATA_FLAGS + RUN_FLAGS)


def run(args: Namespace) -> None:
    """Write errors.png, errors.md and errors.json.

    Raises:
        UserError: checkpoint or data can't be used, or the folder has such files.
    """
    flags = select_flags(args, DATA_FLAGS + RUN_FLAGS)
    session = start_session({**flags, "resume": args.checkpoint, "eval": True}, FINETUNE)
    assert session.checkpoint is not None
    _, dataset = build_labelled(session.settings, infer_classes(session.checkpoint))
    folder = make_folder(args.output_dir, [PAGE, TABLE, DATA], args.overwrite)
    summary = find_errors(session, dataset, args.threshold)

    names = {c["id"]: c["name"] for c in dataset.ground_truth["categories"]}
    text = table(summary, names, len(dataset))
    draw(summary, dataset, names, args.examples, folder / PAGE)
    write_text(folder / DATA, to_json(record(summary), indent=1) + "\n")
    write_text(folder / TABLE, text)
    log.info("%s\nwritten to %s: %s, %s, %s", text.strip(), folder, PAGE, TABLE, DATA)


def find_errors(session: Session, dataset: SampleDataset, threshold: float) -> ErrorSummary:
    """Run the detector on the validation images, as `finetune_main.py --eval` does."""
    settings, checkpoint = session.settings, session.checkpoint
    predictor = Predictor.from_checkpoint(checkpoint, device=str(session.device), amp=settings.amp)
    evaluator = ErrorEvaluator(dataset.ground_truth, settings.coco_evaluator, dataset.category_ids)
    engine.evaluate(
        predictor.model,
        None,
        {"bbox": predictor.postprocess},
        build_loader(dataset, settings, train=False),
        evaluator,
        device=session.device,
        normalization=predictor.model.normalization,
        amp=predictor.amp,
    )
    summary = evaluator.find_errors(threshold)
    if summary.ap50 < 0:
        raise UserError(f"{dataset.annotation_file} has no object: there are no errors to find")
    return summary


def table(summary: ErrorSummary, names: dict[int, str], num_images: int) -> str:
    """Return the errors as Markdown."""
    counts = summary.counts
    lines = [
        f"{num_images} images, {summary.num_objects} objects; {counts[CORRECT]} detections are correct, at a score of "
        f"at least {summary.threshold:g} and an IoU of 0.5; AP50 {summary.ap50:.3f}",
        "",
        "| error | number | AP50 without it | what it is |",
        "|---|---|---|---|",
    ]
    for kind in ERROR_TYPES:
        gain = summary.gains[kind]
        lines.append(
            f"| {kind} | {counts[kind]} | {summary.ap50 + gain:.3f} ({gain:+.3f}) | {MEANINGS[kind]} |"
        )
    confusions = summary.confusions()[:CONFUSIONS]
    if confusions:
        lines += ["", "| detected as | object | number |", "|---|---|---|"]
        lines += [f"| {names[a]} | {names[b]} | {count} |" for a, b, count in confusions]
    return "\n".join(lines) + "\n"


def record(summary: ErrorSummary) -> dict[str, Any]:
    """Return the content of errors.json; boxes are (x0, y0, x1, y1) in pixels."""
    return {
        "threshold": summary.threshold,
        "objects": summary.num_objects,
        "AP50": summary.ap50,
        "counts": summary.counts,
        "AP50_gain": summary.gains,
        "errors": [
            {
                "type": error.kind,
                "image_id": error.image_id,
                "category_id": error.category_id,
                "score": error.score,
                "box": error.box_xyxy,
                "iou": error.iou,
                "annotation_id": None if error.object is None else error.object["id"],
            }
            for error in summary.errors
            if error.kind in ERROR_TYPES
        ],
    }


def draw(
    summary: ErrorSummary, dataset: SampleDataset, names: dict[int, str], count: int, path: Path
) -> None:
    """Write the page: a line for each type that occurs, with its worst examples."""
    index_of = {int(image_id): i for i, image_id in enumerate(dataset.annotations.image_ids)}
    rows = []
    for kind in ERROR_TYPES:
        panels = [
            panel
            for error in summary.worst(kind, count)
            if (panel := _panel(error, dataset, index_of[error.image_id], names)) is not None
        ]
        if panels:
            title, picture, boxes = panels[0]
            panels[0] = (f"{kind} ({summary.counts[kind]}): {title}", picture, boxes)
            rows.append(panels)
    panel_page(rows, path)


def _panel(
    error: Error, dataset: SampleDataset, index: int, names: dict[int, str]
) -> tuple[str, np.ndarray, dict] | None:
    """Return (title, picture, no boxes): the detection in red, the object that it was compared with in green."""
    try:
        image = to_array(dataset.read(index))
    except BadImageError as problem:
        log.warning("not drawn, %s: %s", dataset.path(index), problem)
        return None
    pixels, factor = fit_image(image, SIDE)
    boxes, labels, colors = [], [], []
    if error.object is not None:
        x, y, width, height = error.object["bbox"]
        boxes.append((x, y, x + width, y + height))
        labels.append(_name(error.object["category_id"], names))
        colors.append(OBJECT)
    if error.kind != MISSED:
        boxes.append(error.box_xyxy)
        labels.append(f"{_name(error.category_id, names)} {error.score:.2f}")
        colors.append(DETECTION)
    drawn = draw_boxes(pixels, np.array(boxes) * factor, labels, None, colors)
    title = f"image {error.image_id}"
    if error.object is not None and error.kind != MISSED:
        title += f", IoU {error.iou:.2f}"
    return title, drawn, {"boxes": np.zeros((0, 4)), "labels": None}


def _name(category_id: int, names: dict[int, str]) -> str:
    return class_text(names.get(category_id, f"class {category_id}"), category_id)
