"""What the rows of a class head mean: names, and the category ids of annotation files."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from util import coco as coco_names
from util.checkpoints.architecture import detector_kind
from util.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Classes:
    """names: row -> class name; ids: row -> category id in annotation files; a row may have neither (COCO's ids have
    gaps).

    count: rows of the head without "no object". source: the file that says so, for messages.
    """

    names: dict[int, str]
    ids: dict[int, int]
    count: int
    source: str


def classes_of(checkpoint: Checkpoint) -> Classes:
    """The classes of a trained detector. A file without names is taken for one of COCO where its head has 91 rows."""
    count = class_rows(checkpoint.model, head_kind(checkpoint))
    names = checkpoint.class_names or (coco_names.NAMES if count == coco_names.NUM_CLASSES else {})
    ids = checkpoint.category_ids or {row: row for row in names}
    return Classes(names, ids, count, checkpoint.source)


def head_kind(checkpoint: Checkpoint) -> str:
    """`softmax` or `focal`: what the file says, else as published, since shapes do not tell. Pre-training with query
    patches is softmax.
    """
    stored, model = checkpoint.args.get("classification"), checkpoint.model
    softmax = detector_kind(model) == "detr" or any(key.startswith("patch2query.") for key in model)
    return stored or ("softmax" if softmax else "focal")


def class_rows(state: Mapping[str, Tensor], kind: str) -> int:
    """Rows of the class head without the "no object" of softmax; 0 where there is no head."""
    biases = [
        value for key, value in state.items() if "class_embed" in key and key.endswith("bias")
    ]
    return len(biases[0]) - (kind == "softmax") if biases else 0
