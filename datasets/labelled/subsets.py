"""A random part of the training images, for training with fewer labels. Each run saves its choice in `subset.json`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets.labelled.annotations import Annotations
from util.errors import UserError
from util.logger import log
from util.settings import Settings

SUBSET_FILE = "subset.json"


def sample_image_ids(image_ids: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a random fraction of the image ids, sorted, drawn as DETReg does for `--filter_pct`.

    Bar et al., CVPR 2022, section 4.3.

    Args:
        image_ids: int64 [I], in any order.
        fraction: above 0, at most 1.
    """
    count = round(len(image_ids) * fraction)
    # The ids are sorted first: the draw must not depend on their order in the file. NumPy accepts no negative seed.
    rng = np.random.default_rng(seed % 2**64)
    return np.sort(rng.choice(np.sort(image_ids), count, replace=False))


def training_subset(annotations: Annotations, settings: Settings) -> Annotations:
    """Return the training images of `--split_file`, or the fraction `--filter_pct` drawn with `--seed`, or all.

    Raises:
        UserError: no image would be left, or the file can't be used.
    """
    if settings.split_file:
        ids = read_split(settings.split_file, annotations)
        what = settings.split_file
    elif settings.filter_pct and settings.filter_pct > 0:  # -1, as published, means all images
        ids = sample_image_ids(annotations.image_ids, settings.filter_pct, settings.seed)
        what = f"{settings.filter_pct:g} by seed {settings.seed}"
    else:
        return annotations

    if not len(ids):
        raise UserError(
            f"--filter_pct {settings.filter_pct:g} of {len(annotations)} images is none: give a larger one"
        )
    subset = f"{what} of {len(annotations)} images"
    log.info("%s: training on %d images (%s)", annotations.source, len(ids), subset)
    selected = annotations.select(np.flatnonzero(np.isin(annotations.image_ids, ids)))
    return replace(selected, subset=subset)


def read_split(path: str, annotations: Annotations) -> np.ndarray:
    """Return the image ids of a split file, sorted, int64 [J].

    A split file is written by `tools/make_split.py`, or is the `subset.json` of a run, or a plain JSON list of ids.

    Raises:
        UserError: the file can't be read, has no list of ids, or has ids that the annotations do not have.
    """
    content = _read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        raise UserError(
            f"--split_file {path} has few-shot objects, not whole images: give it as --few_shot_file with --few_shot"
        )
    ids = content.get("ids") if isinstance(content, dict) else content
    if not _is_list_of_ids(ids):
        raise UserError(
            f"--split_file {path} has no list of image ids: give a file of tools/make_split.py"
        )

    unknown = np.setdiff1d(np.array(ids), annotations.image_ids)
    if len(unknown):
        raise UserError(
            f"--split_file {path}: {len(unknown)} of {len(ids)} images are not in {annotations.source}, the first has "
            f"id {unknown[0]}: it was made for another dataset"
        )
    return np.unique(ids)


def _is_list_of_ids(ids: Any) -> bool:
    if not isinstance(ids, list) or not ids:
        return False
    return all(isinstance(i, int) and abs(i) < 2**63 for i in ids)  # np.int64 stores them


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--split_file {path} can't be read as JSON ({error}): give a file of tools/make_split.py"
        ) from error


def subset_record(annotations: Annotations, settings: Settings) -> dict[str, Any]:
    """Return the content of `subset.json`: how the images were selected, and their ids.

    With `--split_file`, fraction and seed are those in the file: this run drew nothing.
    """
    fraction, seed = settings.filter_pct, settings.seed
    if settings.split_file:
        content = _read_json(settings.split_file)
        stated = content if isinstance(content, dict) else {}
        fraction, seed = stated.get("filter_pct"), stated.get("seed")
    return {
        "source": annotations.source,
        "drawn": annotations.subset,
        "filter_pct": fraction,
        "seed": seed,
        "ids": annotations.image_ids.tolist(),
    }
