"""Labelled images with COCO annotations, in the published layouts."""

import functools
import os
from dataclasses import replace

import numpy as np
from torch import Tensor

from datasets.evaluators.coco import GroundTruth, ground_truth_of
from datasets.images.image_folder import ImageFolder, read_image
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations, collector_paused, parse_coco, read_json
from datasets.labelled.few_shot import training_part
from datasets.labelled.subsets import training_subset
from datasets.sample import BadImageError, SampleDataset, Target
from datasets.transforms import Transform, detection_transforms
from util.checkpoints.classes import Classes
from util.coco import NUM_CLASSES
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRandom
from util.settings import Settings

_FOLDERS = {"train": "train2017", "val": "val2017"}


def coco_root(settings: Settings) -> str:
    """`settings.coco_path`, or `MSCoco` under `settings.data_root`.

    Raises:
        UserError: neither is given, or the folder does not exist.
    """
    root = settings.coco_path or (
        os.path.join(settings.data_root, "MSCoco") if settings.data_root else None
    )
    if not root:
        raise UserError(
            "no data: give --coco_path DIR (with train2017, val2017 and annotations) or --data_root DIR"
        )
    if not os.path.isdir(root):
        own = (
            "; a file of annotations goes with --dataset_file custom, see docs/own_data.md"
            if os.path.isfile(root)
            else ""
        )
        raise UserError(
            f"{root} is no folder: --coco_path takes one with train2017, val2017 and annotations{own}"
        )
    return root


def coco_files(root: str, image_set: str) -> tuple[str, str]:
    """(image folder, annotation file) of "train" or "val": `train2017` or `images/train2017`, and `annotations`.

    Raises:
        UserError: no image folder. The annotation file is not looked at.
    """
    folder = _FOLDERS[image_set]
    candidates = [os.path.join(root, folder), os.path.join(root, "images", folder)]
    for candidate in candidates:
        if os.path.isdir(candidate):
            return candidate, os.path.join(root, "annotations", f"instances_{folder}.json")
    raise UserError(
        f"{root} has neither {folder} nor images/{folder}: put the {image_set} images into one of them, or name "
        "folders and files of your own with --dataset_file custom"
    )


class CocoDetection(SampleDataset):
    """Images with boxes; images without objects are kept.

    num_classes: rows of the class head. category_ids: the annotation file's id of each label, None where labels are
    these ids. ground_truth: what evaluators compare with, where it was read along with the annotations. An image whose
    size differs from the annotation file's counts as bad: its boxes would be wrong.
    """

    def __init__(
        self,
        image_folder: str,
        annotations: Annotations,
        transforms: Transform,
        *,
        num_classes: int,
        seed: int = 0,
        category_ids: dict[int, int] | None = None,
        ground_truth: GroundTruth | None = None,
    ) -> None:
        super().__init__(seed)
        self.image_folder, self.annotations, self.transforms = image_folder, annotations, transforms
        self.num_classes, self.category_ids = num_classes, category_ids
        self.class_names = annotations.class_names
        if ground_truth is not None:
            self.ground_truth = ground_truth

    @property
    def annotation_file(self) -> str:
        return self.annotations.source

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, index: int) -> str:
        return os.path.join(self.image_folder, self.annotations.file_names[index])

    def fingerprint(self) -> str:
        return self.annotations.fingerprint()

    def validate(self, image_set: str) -> None:
        """Images without a file are skipped in training; in evaluation they would falsify every metric."""
        absent = self.annotations.findings.get("image absent")
        if absent is None:
            return
        (_, image), names = absent[0][0], absent[1]
        what = (
            f"{len(names)} of {len(self) + len(names)} images of {self.annotation_file} are not in "
            f"{self.image_folder}: {names[0]} (image {image})"
        )
        if image_set != "train":
            raise UserError(f"{what}: add the files or take the images out of the annotations")
        log.warning("%s: they are skipped", what)

    def load(self, index: int, rng: SampleRandom) -> tuple[Tensor, Target]:
        image = read_image(self.path(index))
        height, width = image.shape[-2:]
        listed_height, listed_width = self.annotations.sizes_hw[index]
        if listed_height and listed_width and (listed_height, listed_width) != (height, width):
            raise BadImageError(
                f"{width} x {height} pixels, but image {self.annotations.image_ids[index]} is {listed_width} x "
                f"{listed_height} in {self.annotation_file} (rotated or resized?)"
            )
        return self.transforms(image, self.annotations.target(index, (height, width)), rng)


class ConvertedDetection(CocoDetection):
    """Images whose annotations were of another format; their labels are the category ids."""

    @functools.cached_property
    def ground_truth(self) -> GroundTruth:
        return ground_truth_of(self.annotations.as_coco())


def build_coco(image_set: str, settings: Settings, classes: Classes | None = None) -> CocoDetection:
    """The "train" or "val" images under `settings.coco_path` or `settings.data_root`.

    Raises:
        UserError: files are missing or hold what makes training or evaluation wrong.
    """
    if classes is not None and any(row != number for row, number in classes.ids.items()):
        raise UserError(
            f"{classes.source} counts its classes without gaps, --dataset_file coco takes the ids as they are: give "
            "--dataset_file custom --val_images DIR --val_annotations FILE"
        )
    image_folder, annotation_file = coco_files(coco_root(settings), image_set)
    annotations, ground_truth = read_annotations(annotation_file, image_set)
    return CocoDetection(
        image_folder,
        filter_annotations(annotations, image_folder, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=NUM_CLASSES,
        seed=settings.seed,
        ground_truth=ground_truth,
    )


def read_annotations(path: str, image_set: str) -> tuple[Annotations, GroundTruth | None]:
    """(annotations; of "val" the ground truth for evaluators, so that the file is read once) of a COCO file.

    Raises:
        UserError: as `read_coco`.
    """
    with collector_paused():
        content = read_json(path)
        return parse_coco(content, path), ground_truth_of(content) if image_set == "val" else None


def coco_images(image_set: str, settings: Settings) -> ImageFolder:
    """All images of the folder, without a look at the annotation file.

    Raises:
        UserError: no such folder.
    """
    try:
        root = coco_root(settings)
    except UserError as error:
        raise UserError(
            f"no unlabelled images: give --imagenet_path DIR (any folder tree) or --coco_path DIR ({error})"
        ) from error
    return ImageFolder(coco_files(root, image_set)[0])


def labelled_transforms(image_set: str, settings: Settings) -> Transform:
    """Of labelled images, and of images on which objects are to be found ("val")."""
    return detection_transforms(image_set, settings.image_size or 800, settings.max_size)


def filter_annotations(
    annotations: Annotations, image_folder: str, image_set: str, settings: Settings
) -> Annotations:
    """The chosen images in training, all in evaluation; those without a file are skipped, and `findings` lists them.
    Logs how many are left.

    Raises:
        UserError: all files are missing; no image was chosen.
    """
    if image_set == "train":
        annotations = training_subset(annotations, settings)
    annotations = _with_files(annotations, image_folder)
    if (
        image_set == "train"
    ):  # after the files, so that as many objects as promised can be trained on
        annotations = training_part(annotations, settings)
    log.info(
        "%s: %d images, %d without objects, %d boxes, %d classes",
        annotations.source,
        len(annotations),
        (np.diff(annotations.offsets) == 0).sum(),
        len(annotations.labels),
        len(annotations.class_names),
    )
    return annotations


def _with_files(annotations: Annotations, image_folder: str) -> Annotations:
    if not len(annotations):
        raise UserError(
            f"{annotations.source} lists no image: give a file with images and their boxes"
        )
    present = _present(annotations, image_folder)
    missing = np.flatnonzero(~present)
    if not len(missing):
        return annotations
    if not present.any():
        raise UserError(
            f"{len(missing)} of {len(annotations)} images of {annotations.source} are not in {image_folder}: "
            f"{annotations.file_names[missing[0]]} (image {annotations.image_ids[missing[0]]}): add the files or take "
            "the images out of the annotations"
        )
    ids = np.column_stack([np.full(len(missing), -1), annotations.image_ids[missing]])
    absent = {"image absent": (ids, PackedStrings(annotations.file_names[i] for i in missing))}
    return replace(
        annotations.select(np.flatnonzero(present)), findings={**annotations.findings, **absent}
    )


def _present(annotations: Annotations, image_folder: str) -> np.ndarray:
    """bool [I]: whether the file is there. Lists each folder once, where asking for every file could take minutes."""
    names = [annotations.file_names[i] for i in range(len(annotations))]
    listings: dict[str, set[str]] = {}
    for folder in {os.path.dirname(name) for name in names}:
        path = os.path.join(image_folder, folder)
        try:
            listings[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error.strerror}): check the permissions"
            ) from error
    return np.array([os.path.basename(name) in listings[os.path.dirname(name)] for name in names])
