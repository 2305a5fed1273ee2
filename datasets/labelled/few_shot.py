"""Base and novel classes: training on all objects of the ones, then on K objects of each class, and what both kinds
reach.

Which classes are novel decides everything else: `novel_names`. For COCO they are the 20 classes that VOC has too, for
VOC one of the three splits of Wang et al., "Frustratingly Simple Few-Shot Object Detection" (ICML 2020, section 4), for
other data the user's own.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datasets.labelled.annotations import Annotations, parse_coco, read_json
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
FILE_OF_CLASS = (
    "full_box_{shots}shot_{name}_trainval.json"  # in the folders that Wang et al. publish
)


def novel_names(settings: Settings, class_names: Mapping[int, str]) -> tuple[str, ...]:
    """The novel classes of data with these classes (label -> name); none where `--few_shot all` needs none and the data
    have no split.

    Raises:
        UserError: none are known or given, the data do not have one of them, or they leave no base class.
    """
    voc = VOC_NOVEL[settings.novel_split]
    published = {"coco": COCO_NOVEL, "voc": voc, "voc_coco": voc}.get(settings.dataset_file, ())
    names = tuple(settings.novel_classes or published)
    if not names and settings.few_shot != "all":
        raise UserError(
            f"--few_shot {settings.few_shot}: which classes are novel is not published for --dataset_file "
            f"{settings.dataset_file}: name them by --novel_classes"
        )
    unknown = [name for name in names if name not in class_names.values()]
    if unknown:
        known = ", ".join(list(class_names.values())[:8]) + (
            ", ..." if len(class_names) > 8 else ""
        )
        raise UserError(
            f"the data have no class '{unknown[0]}' to be novel, they have {known}: name novel classes by "
            f"--novel_classes"
        )
    if names and not set(class_names.values()) - set(names):
        raise UserError(
            f"--novel_classes names all {len(class_names)} classes of the data: leave some as base classes"
        )
    return names


# ---------------------------------------------------------------------------------------------------- what is trained
# on


def training_part(annotations: Annotations, settings: Settings) -> Annotations:
    """What `--few_shot` leaves of the training images: objects of base classes, or those drawn of novel or all classes.

    Only these objects are left, and images without one of them are left out: what else an image shows counts as
    background, as in the published files.

    Raises:
        UserError: see `novel_names` and `read_shots`; no object is left.
    """
    kind = settings.few_shot
    if not kind:
        return annotations
    novel, names = novel_names(settings, annotations.class_names), annotations.class_names
    classes = {
        label: name
        for label, name in names.items()
        if kind == "all" or (name in novel) == (kind == "novel")
    }
    if kind == "base":
        part, what = (
            with_objects(annotations, np.isin(annotations.labels, list(classes))),
            "all objects",
        )
    elif settings.few_shot_file:
        part, what = (
            read_shots(settings.few_shot_file, settings.shots, annotations, classes),
            f"{settings.few_shot_file}, objects",
        )
    else:
        part, what = (
            draw_shots(annotations, classes, settings.shots, settings.seed),
            f"{settings.shots} objects each, drawn by seed {settings.seed},",
        )
    what = f"{what} of {len(classes)} {'' if kind == 'all' else f'{kind} '}classes in {len(annotations)} images"
    if not len(part):
        raise UserError(
            f"{annotations.source}: --few_shot {kind} leaves no object to train on ({what})"
        )
    _report_counts(part, classes, None if settings.few_shot_file else settings.shots)
    log.info(
        "%s: training on %d objects in %d images (%s)",
        annotations.source,
        len(part.labels),
        len(part),
        what,
    )
    return replace(part, drawn=", ".join(filter(None, (annotations.drawn, what))))


def _report_counts(part: Annotations, classes: Mapping[int, str], shots: int | None) -> None:
    fewer = [name for label, name in classes.items() if (part.labels == label).sum() < (shots or 1)]
    if fewer:
        log.warning(
            "%s: %d of %d classes have %s, the first is %s",
            part.source,
            len(fewer),
            len(classes),
            f"fewer than {shots} objects" if shots else "no object",
            fewer[0],
        )


def with_objects(annotations: Annotations, kept: np.ndarray) -> Annotations:
    """Only these objects (bool [A]) and the images that have one of them."""
    image_of = annotations.image_of
    images = np.unique(image_of[kept])
    part = annotations.select(images)
    counts = np.bincount(image_of[kept], minlength=len(annotations))[images]
    return _with_rows(part, counts, kept[np.isin(image_of, images)])


def _with_rows(part: Annotations, counts: np.ndarray, rows: np.ndarray) -> Annotations:
    """These rows of its objects, as many of each image as `counts` [I] says."""
    arrays = {
        name: getattr(part, name)
        for name in ("boxes_xyxy_abs", "labels", "areas", "difficult", "ids")
    }
    chosen = {name: array[rows] for name, array in arrays.items() if array is not None}
    return replace(
        part, offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), **chosen
    )


def draw_shots(
    annotations: Annotations, classes: Mapping[int, str], shots: int, seed: int
) -> Annotations:
    """Exactly `shots` objects of each class (a label), or all where it has fewer; nothing published, this drawing is
    ours.

    Each class is shuffled by (seed, label) and its first objects are taken. So a draw of 5 lies within that of 10, and
    the novel classes have the same objects whether base classes are drawn too or not.
    """
    kept = np.zeros(len(annotations.labels), bool)
    for label in classes:
        rows = np.flatnonzero(annotations.labels == label)
        kept[np.random.default_rng([seed % 2**64, label]).permutation(rows)[:shots]] = True
    return with_objects(annotations, kept)


# ---------------------------------------------------------------------------------------------------- drawn by others


@dataclass
class _Drawn:
    """Objects of a file: int64 [N] indices of training images, their boxes float32 [N, 4] (x0, y0, x1, y1), labels,
    areas and ids.
    """

    image: np.ndarray
    boxes_xyxy_abs: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ids: np.ndarray


def read_shots(
    path: str, shots: int | None, annotations: Annotations, classes: Mapping[int, str]
) -> Annotations:
    """The objects of these classes (label -> name) in a COCO file, or in the files of a folder, one a class, as Wang et
    al. publish them.

    Classes are told by name, images by their number or name (see `_Finder`). Boxes are the file's.

    Raises:
        UserError: files are missing or can't be used, `shots` is missing for a folder or given for a file, or a file
            has classes or images that the training data do not have.
    """
    find = _Finder(annotations)
    if os.path.isdir(path):
        parts = [
            _read_objects(file, annotations, find, name)
            for name, file in _files_of_classes(path, shots, classes).items()
        ]
    elif not os.path.exists(path):
        raise UserError(
            f"--few_shot_file {path} does not exist: give a COCO file of the objects to train on, or a folder with "
            f"such a file for each class, {FILE_OF_CLASS.format(shots='10', name='CLASS')}"
        )
    elif shots:
        raise UserError(
            f"--shots {shots} chooses files of a folder, --few_shot_file {path} is one file: leave --shots out"
        )
    else:
        parts = [_read_objects(path, annotations, find)]
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])
    }
    rows = np.flatnonzero(np.isin(columns["labels"], list(classes)))
    rows = rows[np.argsort(columns["image"][rows], kind="stable")]
    images, counts = np.unique(columns.pop("image")[rows], return_counts=True)
    difficult = None if annotations.difficult is None else np.zeros(len(columns["labels"]), bool)
    return _with_rows(
        replace(annotations.select(images), difficult=difficult, **columns), counts, rows
    )


def _files_of_classes(folder: str, shots: int | None, classes: Mapping[int, str]) -> dict[str, str]:
    """Class name -> file."""
    if not shots:
        raise UserError(
            f"--few_shot_file {folder} is a folder: add --shots K, which of its files to read"
        )
    files = {
        name: os.path.join(folder, FILE_OF_CLASS.format(shots=shots, name=name))
        for name in classes.values()
    }
    missing = [os.path.basename(file) for file in files.values() if not os.path.exists(file)]
    if missing:
        pattern = re.compile(
            FILE_OF_CLASS.replace("{shots}", r"(\d+)")
            .replace("{name}", ".+")
            .replace(".json", r"\.json")
        )
        there = sorted(
            {int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match}
        )
        remedy = (
            f"it has files of {', '.join(map(str, there))} shots"
            if there
            else "give the folder with such a file for each class"
        )
        raise UserError(
            f"--few_shot_file {folder} lacks {len(missing)} of {len(files)} files, the first is {missing[0]}: {remedy}"
        )
    return files


def _read_objects(
    file: str, annotations: Annotations, find: "_Finder", only: str | None = None
) -> _Drawn:
    """only: the class of all objects in the file."""
    content = read_json(file)
    if (
        isinstance(content, dict) and "categories" not in content
    ):  # ids that count as in the training annotations
        content["categories"] = [
            {"id": label, "name": name} for label, name in annotations.class_names.items()
        ]
    shots = parse_coco(content, file)
    labels = {name: label for label, name in sorted(annotations.class_names.items(), reverse=True)}
    used = {int(label): shots.class_names[int(label)] for label in np.unique(shots.labels)}
    for name in used.values():
        if name not in labels:
            raise UserError(
                f"{file} has objects of the category '{name}', which {annotations.source} does not have: it is of "
                f"other data"
            )
        if only not in (None, name):
            raise UserError(
                f"{file} has objects of the category '{name}': in such a folder a file holds those of its class alone"
            )
    numbers = np.array([labels[used[label]] for label in shots.labels.tolist()], dtype=np.int64)
    return _Drawn(
        find(shots)[shots.image_of], shots.boxes_xyxy_abs, numbers, shots.areas, shots.ids
    )


class _Finder:
    """Finds the images of other annotations among the training images.

    They are the same where id and name agree, or the name alone, if only one training image has it. A name counts
    without folder, extension and COCO's prefix, so that COCO_val2014_000000000042.jpg is 000000000042.jpg of 2017.
    """

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.names = [_bare(annotations.file_names[i]) for i in range(len(annotations))]
        self.places: dict[str, int] = {}
        for i, name in enumerate(self.names):
            self.places[name] = -1 if name in self.places else i

    def __call__(self, shots: Annotations) -> np.ndarray:
        """Indices of training images int64 [I]; -1 for an image without objects that is not among them."""
        found = np.array(
            [
                self._find(int(number), shots.file_names[i])
                for i, number in enumerate(shots.image_ids)
            ],
            dtype=np.int64,
        )
        lost = np.flatnonzero((found < 0) & (np.diff(shots.offsets) > 0))
        if len(lost):
            raise UserError(
                f"{shots.source}: {len(lost)} of {len(found)} images are not among those of "
                f"{self.annotations.source}, the first is {shots.file_names[lost[0]]} (image "
                f"{shots.image_ids[lost[0]]}): it was made for other data"
            )
        return found

    def _find(self, number: int, file_name: str) -> int:
        name, ids = _bare(file_name), self.annotations.image_ids
        i = int(np.searchsorted(ids, number))
        return (
            i
            if i < len(ids) and ids[i] == number and self.names[i] == name
            else self.places.get(name, -1)
        )


def _bare(file_name: str) -> str:
    return re.sub(r"^COCO_[a-z]+\d{4}_", "", os.path.splitext(os.path.basename(file_name))[0])


def describe_part(
    annotations: Annotations, settings: Settings, category_ids: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """What `subset.json` holds: how objects were chosen, and the ids of their images. Where few were drawn it is a COCO
    file of them too, which `--few_shot_file` reads; the annotation ids are the source's, if each has its own.

    category_ids: the source's category id of each label, None where labels are these ids.
    """
    drawn = settings.shots or settings.few_shot_file
    record = {
        "source": annotations.source,
        "drawn": annotations.drawn,
        "few_shot": settings.few_shot,
        "shots": settings.shots,
        "few_shot_file": settings.few_shot_file,
        "seed": settings.seed if drawn and not settings.few_shot_file else None,
        "novel_classes": list(novel_names(settings, annotations.class_names)),
        "ids": annotations.image_ids.tolist(),
    }
    if not drawn:
        return record
    content = annotations.as_coco()
    own = (
        annotations.ids is not None
        and len(np.unique(annotations.ids)) == len(annotations.ids)
        and annotations.ids.min() > 0
    )
    for row, entry in enumerate(content["annotations"]):
        entry["id"] = int(annotations.ids[row]) if own else entry["id"]
        entry["category_id"] = (category_ids or {}).get(entry["category_id"], entry["category_id"])
    for category in content["categories"]:
        category["id"] = (category_ids or {}).get(category["id"], category["id"])
    return {**record, **content}


# ---------------------------------------------------------------------------------------------------- evaluation


def with_groups(rows: Sequence[Mapping[str, Any]], novel: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an evaluator's "per_class" with "group": base or novel."""
    return [{**row, "group": "novel" if row["name"] in novel else "base"} for row in rows]


def group_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """{"base", "novel", "all"} -> AP, AP50, AP75: means over the classes of the group that have objects, -1 where none
    has.

    rows: of `with_groups`. A class that is never found counts with 0.
    """
    groups = {
        name: [row for row in rows if name in ("all", row["group"])]
        for name in ("base", "novel", "all")
    }
    return {
        name: [
            float(np.mean([row[metric] for row in members])) if members else -1.0
            for metric in CLASS_METRICS
        ]
        for name, members in groups.items()
    }


def group_table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Sequence[float]]) -> str:
    """A line of the log for each group."""
    counts = {name: sum(name in ("all", row["group"]) for row in rows) for name in means}
    lines = [
        f"  {name:5}  {counts[name]:>3} classes  "
        + "  ".join(
            f"{metric} {value:.3f}" for metric, value in zip(CLASS_METRICS, values, strict=True)
        )
        for name, values in means.items()
    ]
    return "\n".join(["base and novel classes:", *lines])
