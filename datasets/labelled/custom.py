"""A custom labelled dataset, for training and evaluation: a folder of images, and a COCO file or a folder of XML files.
Labels count from 0.

Classes are matched by name. The training file says which there are, in the order of their ids; a checkpoint that is
resumed or evaluated brings its own (`classes`). Files keep the ids of their user: labels are mapped back where results
are written.
"""

import os
from collections import Counter
from dataclasses import replace

import numpy as np

from datasets.images.image_folder import ImageFolder
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import (
    CocoDetection,
    ConvertedDetection,
    filter_annotations,
    labelled_transforms,
    read_annotations,
)
from datasets.labelled.voc import read_xml_folder
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.logger import log
from util.settings import Settings


class CustomDetection(CocoDetection):
    """Images of a COCO file whose classes are matched by name."""

    def validate(self, image_set: str) -> None:
        _refuse_unlisted(self.annotations)
        super().validate(image_set)


def build_custom(
    image_set: str, settings: Settings, classes: Classes | None = None
) -> CocoDetection:
    """The images of `--train_images` or `--val_images` with their annotations.

    classes: those of the class head; None: the file's own classes are the labels.

    Raises:
        UserError: a flag or a file is missing, or the file holds what makes training or evaluation wrong: classes of
            one name, categories that are used and not listed, or classes that `classes` does not have.
    """
    training = image_set == "train"
    folder, file = (
        (settings.train_images, settings.train_annotations)
        if training
        else (settings.val_images, settings.val_annotations)
    )
    if not folder or not file:
        missing = f"--{image_set}_annotations FILE" if folder else f"--{image_set}_images DIR"
        raise UserError(
            f"--dataset_file custom needs --{image_set}_images and --{image_set}_annotations: add {missing}"
        )
    if not os.path.isdir(folder):
        raise UserError(
            f"--{image_set}_images {folder} is no folder: give the one that the file names of {file} count from"
        )
    from_xml = os.path.isdir(file)  # which has no category ids
    annotations, ground_truth = (
        (read_xml_folder(file), None) if from_xml else read_annotations(file, image_set)
    )
    annotations = filter_annotations(annotations, folder, image_set, settings)
    _check_names(annotations)
    if classes is not None:
        _refuse_unlisted(annotations)
    classes = classes or _own_classes(annotations)
    _check_count(settings, classes)
    ids = _ids_by_name(annotations, classes)
    annotations, transforms = (
        _with_rows(annotations, ids, classes),
        labelled_transforms(image_set, settings),
    )
    if from_xml:
        return ConvertedDetection(
            folder, annotations, transforms, num_classes=classes.count, seed=settings.seed
        )
    return CustomDetection(
        folder,
        annotations,
        transforms,
        num_classes=classes.count,
        seed=settings.seed,
        category_ids=_with_absent(ids, classes),
        ground_truth=ground_truth,
    )


def custom_images(image_set: str, settings: Settings) -> ImageFolder:
    """Without labels a custom dataset is a folder, which `--train_images` or `--imagenet_path` would have named.

    Raises:
        UserError: always.
    """
    raise UserError(
        "no unlabelled images: --dataset_file custom needs --train_images DIR (any folder tree)"
    )


def _refuse_unlisted(annotations: Annotations) -> None:
    if "category not listed" in annotations.findings:
        (annotation, image), *_ = annotations.findings["category not listed"][0].tolist()
        raise UserError(
            f"{annotations.source}: annotation {annotation} of image {image} has a category id that 'categories' does "
            "not list: add the category with its name, or correct the id"
        )


def _check_names(annotations: Annotations) -> None:
    source, names = annotations.source, annotations.class_names
    if not names:
        raise UserError(f"{source} lists no categories: add an id and a name for each class")
    name, count = Counter(names.values()).most_common(1)[0]
    if count > 1:
        same = [number for number, other in names.items() if other == name]
        raise UserError(
            f"{source}: the categories {same} are all named '{name}': classes are matched by name, so rename or join "
            "them"
        )


def _own_classes(annotations: Annotations) -> Classes:
    """Rows 0 ... K - 1 in the order of the ids."""
    ids = dict(enumerate(sorted(annotations.class_names)))
    names = {row: annotations.class_names[number] for row, number in ids.items()}
    return Classes(names, ids, len(names), annotations.source)


def _check_count(settings: Settings, classes: Classes) -> None:
    if settings.was_given("num_classes") and settings.num_classes != classes.count:
        raise UserError(
            f"--num_classes {settings.num_classes}, but {classes.source} has {classes.count} classes: omit the flag"
        )


def _ids_by_name(annotations: Annotations, classes: Classes) -> dict[int, int]:
    """{row: the file's category id} of the classes in the file.

    Raises:
        UserError: a class that `classes` does not have.
    """
    if not classes.names:
        raise UserError(
            f"{classes.source} holds no class names to match classes by: use it as --pretrain, or --dataset_file coco, "
            "whose category ids are the rows of its class head"
        )
    rows = {name: row for row, name in sorted(classes.names.items(), reverse=True)}
    for number, name in annotations.class_names.items():
        if name not in rows:
            known = ", ".join(list(classes.names.values())[:8]) + (
                ", ..." if len(classes.names) > 8 else ""
            )
            raise UserError(
                f"{annotations.source} has the category '{name}' (id {number}), {classes.source} has not ({known}): "
                "give it the same name, or take it out"
            )
    absent = [name for name in rows if name not in annotations.class_names.values()]
    if absent:
        log.info(
            "%s does not have %d of the %d classes: %s",
            annotations.source,
            len(absent),
            len(rows),
            ", ".join(absent[:8]),
        )
    return {rows[name]: number for number, name in annotations.class_names.items()}


def _with_rows(annotations: Annotations, ids: dict[int, int], classes: Classes) -> Annotations:
    """The annotations with rows of the class head for labels."""
    numbers, rows = np.array(sorted((number, row) for row, number in ids.items()), dtype=np.int64).T
    labels = rows[np.searchsorted(numbers, annotations.labels)]
    return replace(annotations, labels=labels, class_names=dict(classes.names))


def _with_absent(ids: dict[int, int], classes: Classes) -> dict[int, int]:
    """Classes that the file lacks have the id that they had in training, unless it means another class here."""
    free = {
        row: number
        for row, number in classes.ids.items()
        if row not in ids and number not in ids.values()
    }
    return dict(sorted({**ids, **free}.items()))
