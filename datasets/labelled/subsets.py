"""A part of the training images, for learning from few labels. What was drawn is kept with the run, in
`subset.json`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets.labelled.annotations import Annotations
from util.errors import UserError
from util.logger import log
from util.settings import Settings

FILE = "subset.json"


def draw_ids(image_ids: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """As many of the sorted ids as DETReg draws by its `--filter_pct`, sorted (Bar et al., CVPR 2022, section 4.3).

    fraction: above 0, at most 1.
    """
    count = round(len(image_ids) * fraction)
    return np.sort(
        np.random.default_rng(seed % 2**64).choice(np.sort(image_ids), count, replace=False)
    )


def training_subset(annotations: Annotations, settings: Settings) -> Annotations:
    """The images of `--split_file`, or the fraction `--filter_pct` drawn by `--seed`, or all.

    Raises:
        UserError: no image would be left, or the file can't be used.
    """
    if settings.split_file:
        ids, what = read_split(settings.split_file, annotations), settings.split_file
    elif (settings.filter_pct or -1) > 0:
        ids, what = (
            draw_ids(annotations.image_ids, settings.filter_pct, settings.seed),
            f"{settings.filter_pct:g} by seed {settings.seed}",
        )
    else:
        return annotations
    if not len(ids):
        raise UserError(
            f"--filter_pct {settings.filter_pct:g} of {len(annotations)} images is none: give a larger one"
        )
    drawn = f"{what} of {len(annotations)} images"
    log.info("%s: training on %d images (%s)", annotations.source, len(ids), drawn)
    part = annotations.select(np.flatnonzero(np.isin(annotations.image_ids, ids)))
    return replace(part, drawn=drawn)


def read_split(path: str, annotations: Annotations) -> np.ndarray:
    """The image ids of a file of `tools/make_split.py`, of a run's `subset.json`, or of a plain JSON list.

    Raises:
        UserError: unreadable, no list of ids, or ids that the annotations do not have.
    """
    content = _read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        raise UserError(
            f"--split_file {path} holds objects of few shots, not whole images: give it as --few_shot_file with "
            f"--few_shot"
        )
    ids = content.get("ids") if isinstance(content, dict) else content
    if (
        not isinstance(ids, list)
        or not ids
        or not all(isinstance(i, int) and abs(i) < 2**63 for i in ids)
    ):
        raise UserError(
            f"--split_file {path} holds no list of image ids: give a file of tools/make_split.py"
        )
    unknown = np.setdiff1d(np.array(ids), annotations.image_ids)
    if len(unknown):
        raise UserError(
            f"--split_file {path}: {len(unknown)} of {len(ids)} images are not in {annotations.source}, the first has "
            f"id {unknown[0]}: it was made for other data"
        )
    return np.unique(ids)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--split_file {path} can't be read as JSON ({error}): give a file of tools/make_split.py"
        ) from error


def describe_subset(annotations: Annotations, settings: Settings) -> dict[str, Any]:
    """What `subset.json` holds: how the images were chosen, and their ids. Fraction and seed of a `--split_file` are
    those that it states.
    """
    fraction, seed = settings.filter_pct, settings.seed
    if settings.split_file:
        content = _read_json(settings.split_file)
        fraction, seed = (
            content.get(name) if isinstance(content, dict) else None
            for name in ("filter_pct", "seed")
        )
    return {
        "source": annotations.source,
        "drawn": annotations.drawn,
        "filter_pct": fraction,
        "seed": seed,
        "ids": annotations.image_ids.tolist(),
    }
