"""What the rows of a class head mean: names, and the category ids of annotation files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util import coco as coco_names
from util.checkpoints.architecture import detector_kind


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


def classes_of(checkpoint: Mapping[str, Any]) -> Classes:
    """The classes of a trained detector. A file without names is taken for one of COCO where its head has 91 rows."""
    count = class_rows(checkpoint["model"], head_kind(checkpoint))
    names = stored_names(checkpoint) or (coco_names.NAMES if count == coco_names.NUM_CLASSES else {})
    ids = {int(row): number for row, number in (checkpoint.get("category_ids") or {}).items()}
    return Classes(names, ids or {row: row for row in names}, count, getattr(checkpoint, "source", "the checkpoint"))


def stored_names(checkpoint: Mapping[str, Any]) -> dict[int, str]:
    """Row -> class name as the checkpoint says (other programs keep a list); empty where it does not."""
    names = checkpoint.get("class_names") or {}
    return {int(row): name for row, name in (enumerate(names) if isinstance(names, list | tuple) else names.items())}


def head_kind(checkpoint: Mapping[str, Any]) -> str:
    """`softmax` or `focal`: what the file says, else as published, since shapes do not tell. Pre-training with query
    patches is softmax.
    """
    stored, model = (checkpoint.get("args") or {}).get("classification"), checkpoint["model"]
    softmax = detector_kind(model) == "detr" or any(key.startswith("patch2query.") for key in model)
    return stored or ("softmax" if softmax else "focal")


def class_rows(state: Mapping[str, Tensor], kind: str) -> int:
    """Rows of the class head without the "no object" of softmax; 0 where there is no head."""
    biases = [value for key, value in state.items() if "class_embed" in key and key.endswith("bias")]
    return len(biases[0]) - (kind == "softmax") if biases else 0
