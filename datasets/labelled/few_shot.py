"""Few-shot detection: train on all objects of the base classes, then on K objects of each class, and report AP of both.

The novel classes decide everything else (`novel_class_names`). For COCO they are the 20 classes that VOC has, too. For
VOC they are one of the three splits of Wang et al., "Frustratingly Simple Few-Shot Object Detection" (ICML 2020,
section 4). For other datasets the user names them.

Shapes: I images, A objects, as in `datasets.labelled.annotations`; N objects of a few-shot file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.segmentations import SegmentationTexts
from util.coco import CLASS_METRICS
from util.errors import UserError
from util.logger import log
from util.settings import Settings

COCO_NOVEL = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "boat",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "bottle",
    "chair",
    "couch",
    "potted plant",
    "dining table",
    "tv",
)
VOC_NOVEL = {
    1: ("bird", "bus", "cow", "motorbike", "sofa"),
    2: ("aeroplane", "bottle", "cow", "horse", "sofa"),
    3: ("boat", "cat", "motorbike", "sheep", "sofa"),
}

# Name of a file in the folders that Wang et al. publish.
CLASS_FILE = "full_box_{shots}shot_{name}_trainval.json"


def novel_class_names(settings: Settings, class_names: Mapping[int, str]) -> tuple[str, ...]:
    """Return the novel classes of a dataset.

    The result is empty for `--few_shot all` on a dataset without a published split: no class needs to be novel.

    Args:
        class_names: label -> name of the dataset's classes.

    Raises:
        UserError: no novel classes are known or given, the dataset does not have one of them, or no base class is left.
    """
    voc = VOC_NOVEL[settings.novel_split]
    published = {"coco": COCO_NOVEL, "voc": voc, "voc_coco": voc}.get(settings.dataset_file, ())
    names = tuple(settings.novel_classes or published)
    if not names and settings.few_shot != "all":
        raise UserError(
            f"--few_shot {settings.few_shot}: no published novel classes for --dataset_file "
            f"{settings.dataset_file}: name them with --novel_classes"
        )

    unknown = [name for name in names if name not in class_names.values()]
    if unknown:
        more = ", ..." if len(class_names) > 8 else ""
        known = ", ".join(list(class_names.values())[:8]) + more
        raise UserError(
            f"the dataset has no novel class '{unknown[0]}', its classes are {known}: name novel classes with "
            "--novel_classes"
        )
    if names and not set(class_names.values()) - set(names):
        raise UserError(
            f"--novel_classes names all {len(class_names)} classes of the dataset: leave some as base classes"
        )
    return names


# ---------------------------------------------------------------------------------------------- objects to train on


def few_shot_subset(annotations: Annotations, settings: Settings) -> Annotations:
    """Return the training objects of `--few_shot`: all objects of the base classes, or K of each novel or each class.

    Images without such an object are dropped. Everything else in an image becomes background, as in the published
    files.

    Raises:
        UserError: see `novel_class_names` and `read_shots`; or no object is left.
    """
    kind = settings.few_shot
    if not kind:
        return annotations
    names = annotations.class_names
    novel = novel_class_names(settings, names)
    classes = {
        label: name
        for label, name in names.items()
        if kind == "all" or ((name in novel) == (kind == "novel"))
    }

    if kind == "base":
        subset = select_objects(annotations, np.isin(annotations.labels, list(classes)))
        what = "all objects"
    elif settings.few_shot_file:
        subset = read_shots(settings.few_shot_file, settings.shots, annotations, classes)
        what = f"{settings.few_shot_file}, objects"
    else:
        subset = sample_shots(annotations, classes, settings.shots, settings.seed)
        what = f"{settings.shots} objects each, drawn by seed {settings.seed},"

    group = "" if kind == "all" else f"{kind} "
    what = f"{what} of {len(classes)} {group}classes in {len(annotations)} images"
    if not len(subset):
        raise UserError(
            f"{annotations.source}: --few_shot {kind} leaves no object to train on ({what}): check the classes and "
            "the data"
        )
    # A file may have any number of objects per class, so only a missing class is worth a warning.
    _warn_too_few_objects(subset, classes, None if settings.few_shot_file else settings.shots)
    log.info(
        "%s: training on %d objects in %d images (%s)",
        annotations.source,
        len(subset.labels),
        len(subset),
        what,
    )
    # `--filter_pct` may have selected images before.
    return replace(subset, subset=", ".join(filter(None, (annotations.subset, what))))


def _warn_too_few_objects(
    annotations: Annotations, classes: Mapping[int, str], shots: int | None
) -> None:
    fewer = [
        name
        for label, name in classes.items()
        if (annotations.labels == label).sum() < (shots or 1)
    ]
    if fewer:
        log.warning(
            "%s: %d of %d classes have %s, the first is %s",
            annotations.source,
            len(fewer),
            len(classes),
            f"fewer than {shots} objects" if shots else "no object",
            fewer[0],
        )


def select_objects(annotations: Annotations, keep: np.ndarray) -> Annotations:
    """Return the objects where `keep` (bool [A]) is true, and the images that have at least one of them."""
    image_indices = annotations.image_indices  # [A]
    images = np.unique(image_indices[keep])  # [J]
    selected = annotations.select(images)
    counts = np.bincount(image_indices[keep], minlength=len(annotations))[images]  # [J]
    # `selected` has only the rows of the kept images, so `keep` shrinks to them.
    return _replace_objects(selected, counts, keep[np.isin(image_indices, images)])


def _replace_objects(annotations: Annotations, counts: np.ndarray, rows: np.ndarray) -> Annotations:
    """Return the annotations with only these rows of their objects.

    Args:
        counts: int [I], number of rows of each image.
        rows: indices or mask of the rows, grouped by image.
    """
    names = ("boxes_xyxy_abs", "labels", "areas", "difficult", "ids", "segmentations", "crowds")
    arrays = {name: getattr(annotations, name) for name in names}
    selected = {name: array[rows] for name, array in arrays.items() if array is not None}
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # [I + 1]
    return replace(annotations, offsets=offsets, **selected)


def sample_shots(
    annotations: Annotations, classes: Mapping[int, str], shots: int, seed: int
) -> Annotations:
    """Return exactly `shots` random objects of each class, or all of a class that has fewer.

    This draw is our own, not a published one. The objects of a class are shuffled with (seed, label), and the first
    ones are used. So 5 shots are a part of 10 shots, and the novel classes get the same objects whether base classes
    are drawn as well or not.

    Args:
        classes: label -> name.
    """
    keep = np.zeros(len(annotations.labels), bool)  # [A]
    for label in classes:
        rows = np.flatnonzero(annotations.labels == label)
        rng = np.random.default_rng([seed % 2**64, label])  # NumPy accepts no negative seed
        keep[rng.permutation(rows)[:shots]] = True
    return select_objects(annotations, keep)


# ---------------------------------------------------------------------------------------------------- few-shot files


@dataclass
class _Shots:
    """Objects of a few-shot file.

    Attributes:
        image: int64 [N], index of the training image.
        boxes_xyxy_abs: float32 [N, 4], (x0, y0, x1, y1) in pixels.
        labels, areas, ids: [N], as in `Annotations`.
        segmentations: [N], JSON of each object's segmentation or None; all None if masks are not read.
    """

    image: np.ndarray
    boxes_xyxy_abs: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    segmentations: np.ndarray


def read_shots(
    path: str, shots: int | None, annotations: Annotations, classes: Mapping[int, str]
) -> Annotations:
    """Return the objects in a COCO file, or in a folder with one file per class, as Wang et al. publish them.

    Classes are matched by name, images by id and name (see `_ImageMatcher`). Boxes are those of the file.

    Args:
        shots: which files of a folder to read; None for a single file.
        annotations: the training images.
        classes: label -> name; other classes in the files are ignored.

    Raises:
        UserError: files are missing or malformed, `shots` is missing for a folder or given for a file, or a file has
            classes or images that the training set does not have.
    """
    match_images = _ImageMatcher(annotations)
    if os.path.isdir(path):
        files = _class_files(path, shots, classes)
        parts = [
            _read_objects(file, annotations, match_images, name) for name, file in files.items()
        ]
    elif not os.path.exists(path):
        raise UserError(
            f"--few_shot_file {path} does not exist: give a COCO file of the objects to train on, or a folder with "
            f"such a file for each class, {CLASS_FILE.format(shots='10', name='CLASS')}"
        )
    elif shots:
        raise UserError(
            f"--shots {shots} selects files of a folder, --few_shot_file {path} is a single file: omit --shots"
        )
    else:
        parts = [_read_objects(path, annotations, match_images)]

    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])
    }
    # Group the rows by image, in the order of the training images.
    rows = np.flatnonzero(np.isin(columns["labels"], list(classes)))
    rows = rows[np.argsort(columns["image"][rows], kind="stable")]
    images, counts = np.unique(columns.pop("image")[rows], return_counts=True)  # [J], [J]

    # A COCO file does not mark difficult objects, and the array must have one entry per object of the file.
    difficult = None if annotations.difficult is None else np.zeros(len(columns["labels"]), bool)
    texts = columns.pop("segmentations")
    if annotations.segmentations is not None:
        columns.update(_number_segmentations(texts))
    crowds = None if annotations.crowds is None else np.zeros(len(columns["labels"]), bool)
    selected = replace(annotations.select(images), difficult=difficult, crowds=crowds, **columns)
    return _replace_objects(selected, counts, rows)


def _number_segmentations(texts: np.ndarray) -> dict[str, Any]:
    """Return the fields of `Annotations` for the JSON texts of segmentations, [N]."""
    present = np.array([text is not None for text in texts], dtype=bool)
    numbers = np.where(present, np.cumsum(present) - 1, -1)
    return {"segmentations": numbers, "segmentation_texts": PackedStrings(texts[present])}


def _class_files(folder: str, shots: int | None, classes: Mapping[int, str]) -> dict[str, str]:
    """Return class name -> file."""
    if not shots:
        raise UserError(
            f"--few_shot_file {folder} is a folder: add --shots K to select its files of K shots"
        )
    files = {
        name: os.path.join(folder, CLASS_FILE.format(shots=shots, name=name))
        for name in classes.values()
    }
    missing = [os.path.basename(file) for file in files.values() if not os.path.exists(file)]
    if missing:
        found = _shots_in_folder(folder)
        if found:
            remedy = f"it has files of {', '.join(map(str, found))} shots"
        else:
            remedy = "give the folder with such a file for each class"
        raise UserError(
            f"--few_shot_file {folder} lacks {len(missing)} of {len(files)} files, the first is {missing[0]}: {remedy}"
        )
    return files


def _shots_in_folder(folder: str) -> list[int]:
    """Return the numbers of shots for which a folder has files."""
    pattern = CLASS_FILE.replace("{shots}", r"(\d+)").replace("{name}", ".+")
    pattern = pattern.replace(".json", r"\.json")
    matches = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
    return sorted({int(match[1]) for match in matches if match})


def _read_objects(
    file: str, annotations: Annotations, match_images: "_ImageMatcher", only: str | None = None
) -> _Shots:
    """Return the objects of one file.

    Args:
        only: the class that all objects must have; None for any class.
    """
    segmentations = None if annotations.segmentations is None else SegmentationTexts()
    content = read_json(file, segmentations)
    if isinstance(content, dict) and "categories" not in content:
        # Without names, ids mean the same as in the training annotations.
        content["categories"] = [
            {"id": label, "name": name} for label, name in annotations.class_names.items()
        ]
    shots = parse_coco(content, file, segmentations)

    # In descending order, so that the lowest label wins if two classes have the same name.
    labels = {name: label for label, name in sorted(annotations.class_names.items(), reverse=True)}
    used = {int(label): shots.class_names[int(label)] for label in np.unique(shots.labels)}
    for name in used.values():
        if name not in labels:
            raise UserError(
                f"{file} has objects of the category '{name}', which {annotations.source} does not have: it was made "
                "for another dataset"
            )
        if only not in (None, name):
            raise UserError(
                f"{file} has objects of the category '{name}': in such a folder, each file has objects of its own "
                "class only"
            )
    remapped = np.array([labels[used[label]] for label in shots.labels.tolist()], dtype=np.int64)
    image = match_images(shots)[shots.image_indices]  # [N]
    texts = np.full(len(remapped), None)  # [N]
    if segmentations is not None:
        texts[:] = shots.texts_of(np.arange(len(remapped)))
    return _Shots(image, shots.boxes_xyxy_abs, remapped, shots.areas, shots.ids, texts)


class _ImageMatcher:
    """Finds the images of other annotations among the training images.

    Two images match if their ids and names agree, or if their names agree and no other training image has that name.
    Names are compared without folder, extension and the prefix of COCO 2014: COCO_val2014_000000000042.jpg is
    000000000042.jpg of COCO 2017.
    """

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.names = [_normalize_file_name(name) for name in annotations.file_names]
        self.index_of_name: dict[str, int] = {}
        for i, name in enumerate(self.names):
            self.index_of_name[name] = -1 if name in self.index_of_name else i  # -1: ambiguous

    def __call__(self, shots: Annotations) -> np.ndarray:
        """Return the training image of each image of `shots`, int64 [I]; -1 for unmatched images without objects.

        Raises:
            UserError: an image with objects has no match.
        """
        found = [
            self._find(image_id, shots.file_names[i])
            for i, image_id in enumerate(shots.image_ids.tolist())
        ]
        indices = np.array(found, dtype=np.int64)  # [I]
        unmatched = np.flatnonzero((indices < 0) & (np.diff(shots.offsets) > 0))
        if len(unmatched):
            first = unmatched[0]
            raise UserError(
                f"{shots.source}: {len(unmatched)} of {len(indices)} images are not among those of "
                f"{self.annotations.source}, the first is {shots.file_names[first]} (image "
                f"{shots.image_ids[first]}): it was made for another dataset"
            )
        return indices

    def _find(self, image_id: int, file_name: str) -> int:
        name, ids = _normalize_file_name(file_name), self.annotations.image_ids
        i = int(np.searchsorted(ids, image_id))
        if i < len(ids) and ids[i] == image_id and self.names[i] == name:
            return i
        return self.index_of_name.get(name, -1)


def _normalize_file_name(file_name: str) -> str:
    stem, _ = os.path.splitext(os.path.basename(file_name))
    return re.sub(r"^COCO_[a-z]+\d{4}_", "", stem)


def few_shot_record(
    annotations: Annotations, settings: Settings, category_ids: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """Return the content of `subset.json`: how the objects were selected, and the ids of their images.

    If objects were drawn or read from a file, the record is also a COCO file of them, which `--few_shot_file` reads.
    Its annotation ids are those of the source, if they are unique.

    Args:
        category_ids: label -> category id of the source; None if labels are these ids.
    """
    few = settings.shots or settings.few_shot_file
    record = {
        "source": annotations.source,
        "drawn": annotations.subset,
        "few_shot": settings.few_shot,
        "shots": settings.shots,
        "few_shot_file": settings.few_shot_file,
        "seed": settings.seed if (few and not settings.few_shot_file) else None,
        "novel_classes": list(novel_class_names(settings, annotations.class_names)),
        "ids": annotations.image_ids.tolist(),
    }
    if not few:
        return record

    content = annotations.to_coco()
    if _has_unique_ids(annotations):
        for annotation_id, entry in zip(
            annotations.ids.tolist(), content["annotations"], strict=True
        ):
            entry["id"] = annotation_id
    if category_ids:
        for entry in content["annotations"]:
            entry["category_id"] = category_ids.get(entry["category_id"], entry["category_id"])
        for category in content["categories"]:
            category["id"] = category_ids.get(category["id"], category["id"])
    return {**record, **content}


def _has_unique_ids(annotations: Annotations) -> bool:
    """Return whether each object has its own id. VOC numbers the objects of each image from 1."""
    ids = annotations.ids
    return ids is not None and len(np.unique(ids)) == len(ids) and ids.min() > 0


# ---------------------------------------------------------------------------------------------------- evaluation


def add_groups(rows: Sequence[Mapping[str, Any]], novel: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of an evaluator's "per_class" with a "group": "base" or "novel"."""
    return [{**row, "group": "novel" if row["name"] in novel else "base"} for row in rows]


def group_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return {"base", "novel", "all"} -> [AP, AP50, AP75], the mean over the classes of the group.

    Only classes with ground-truth objects count; a group without any has -1. A class that is never detected counts
    as 0.

    Args:
        rows: from `add_groups`.
    """
    means = {}
    for name in ("base", "novel", "all"):
        members = [row for row in rows if name in ("all", row["group"])]
        if members:
            means[name] = [
                float(np.mean([row[metric] for row in members])) for metric in CLASS_METRICS
            ]
        else:
            means[name] = [-1.0] * len(CLASS_METRICS)
    return means


def group_table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Sequence[float]]) -> str:
    """Return the means as text for the log, one line per group."""
    lines = ["base and novel classes:"]
    for name, values in means.items():
        count = sum(name in ("all", row["group"]) for row in rows)
        metrics = [
            f"{metric} {value:.3f}" for metric, value in zip(CLASS_METRICS, values, strict=True)
        ]
        lines.append(f"  {name:5}  {count:>3} classes  " + "  ".join(metrics))
    return "\n".join(lines)
