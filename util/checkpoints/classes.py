"""Classes of a detector's class head: their number, their names and the category ids of annotation files."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from util import coco as coco_names
from util.checkpoints.architecture import has_mask_head, infer_detector
from util.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Classes:
    """What the rows of a class head mean. A row may have neither name nor id: COCO's category ids have gaps.

    names: row -> class name. category_ids: row -> category id in annotation files. num_classes: rows of the head,
    without the "no object" row of softmax. source: the file that defines the classes, for messages. named: False if the
    checkpoint has no class names, so that `names` are COCO's by assumption, or empty. things: row -> whether it is a
    thing, of panoptic data.
    """

    names: dict[int, str]
    category_ids: dict[int, int]
    num_classes: int
    source: str
    named: bool = True
    things: Mapping[int, bool] | None = None


def compose_class_name(name: str) -> str:
    """Return what class names share that look the same: composed accents (NFC), single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def fold_class_name(name: str) -> str:
    """Return what class names share that look the same apart from case."""
    return compose_class_name(compose_class_name(name).casefold())


def infer_classes(checkpoint: Checkpoint) -> Classes:
    """Return the classes of a trained detector.

    A file without names is taken to be COCO's if it has the published number of rows: 91, or 250 with a mask head.
    """
    num_classes = count_classes(checkpoint.model, infer_classification(checkpoint))
    names = checkpoint.class_names
    category_ids = checkpoint.category_ids
    if len(names) == num_classes <= max(names, default=0):
        # Of COCO's categories, in the order of the rows: these are not the ids, since the largest has no row.
        category_ids = category_ids or dict(enumerate(names))
        names = dict(enumerate(names.values()))
    if not names and num_classes == coco_names.NUM_CLASSES:
        names = coco_names.CLASS_NAMES
    elif not names and _is_coco_panoptic(checkpoint, num_classes):
        names = coco_names.PANOPTIC_NAMES
    # Without stored ids the rows are the category ids themselves, as in all published detectors.
    category_ids = category_ids or {row: row for row in names}
    named = bool(checkpoint.class_names)
    return Classes(
        names,
        category_ids,
        num_classes,
        checkpoint.source,
        named,
        _infer_things(checkpoint, num_classes),
    )


def _infer_things(checkpoint: Checkpoint, num_classes: int) -> dict[int, bool] | None:
    """Return row -> whether it is a thing; COCO's for a mask model with the published number of rows."""
    if checkpoint.things or not _is_coco_panoptic(checkpoint, num_classes):
        return checkpoint.things
    return {row: row <= coco_names.MAX_THING_ID for row in range(num_classes)}


def _is_coco_panoptic(checkpoint: Checkpoint, num_classes: int) -> bool:
    """Return True for a mask model with as many rows as the published panoptic models."""
    return num_classes == coco_names.NUM_PANOPTIC_CLASSES and has_mask_head(checkpoint.model)


def infer_classification(checkpoint: Checkpoint) -> str:
    """Return `softmax` or `focal`: the stored setting, otherwise what the published codebase uses.

    Shapes can't tell: 91 focal classes and 90 softmax classes with "no object" both have 91 rows. Pre-training with
    query patches uses softmax on every detector.
    """
    stored = checkpoint.args.get("classification")
    if stored in ("softmax", "focal"):
        return stored
    has_patches = any(key.startswith("patch2query.") for key in checkpoint.model)
    is_softmax = has_patches or infer_detector(checkpoint.model) == "detr"
    return "softmax" if is_softmax else "focal"


def count_classes(state: Mapping[str, Tensor], classification: str) -> int:
    """Return the number of rows of the class head, without softmax's "no object"; 0 if there is no head."""
    biases = [
        value for key, value in state.items() if "class_embed" in key and key.endswith("bias")
    ]
    if not biases:
        return 0
    num_rows = biases[0].numel()
    return num_rows - 1 if classification == "softmax" else num_rows
