"""Labelled images with COCO annotations, in the published layouts."""

import os
from argparse import Namespace
from typing import Any

import numpy as np
from torch import Tensor

from datasets.images.image_folder import ImageFolder, read_image
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations, read_coco
from datasets.labelled.few_shot import training_part
from datasets.labelled.subsets import training_subset
from datasets.sample import BadImageError, SampleDataset, Target
from datasets.transforms import Transform, detection_transforms
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRandom

PUBLISHED_NUM_CLASSES = 91
_FOLDERS = {"train": "train2017", "val": "val2017"}


def coco_root(args: Namespace) -> str:
    """`args.coco_path`, or `MSCoco` under `args.data_root`.

    Raises:
        UserError: neither is given, or the folder does not exist.
    """
    root = args.coco_path or (os.path.join(args.data_root, "MSCoco") if args.data_root else None)
    if not root:
        raise UserError("no data: give --coco_path DIR (with train2017, val2017 and annotations) or --data_root DIR")
    if not os.path.isdir(root):
        own = (
            "; a file of annotations goes with --dataset_file custom, see docs/own_data.md"
            if os.path.isfile(root)
            else ""
        )
        raise UserError(f"{root} is no folder: --coco_path takes one with train2017, val2017 and annotations{own}")
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

    `category_ids` is the annotation file's id of each label, None where labels are these ids. An image whose size
    differs from the annotation file's counts as bad: its boxes would be wrong.
    """

    def __init__(
        self,
        image_folder: str,
        annotations: Annotations,
        transforms: Transform,
        num_classes: int,
        seed: int = 0,
        category_ids: dict[int, int] | None = None,
    ) -> None:
        super().__init__(seed)
        self.image_folder, self.annotations, self.transforms = image_folder, annotations, transforms
        self.num_classes, self.category_ids = num_classes, category_ids
        self.class_names = annotations.class_names

    @property
    def annotation_file(self) -> str:
        return self.annotations.source

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, index: int) -> str:
        return os.path.join(self.image_folder, self.annotations.file_names[index])

    def fingerprint(self) -> str:
        return self.annotations.fingerprint()

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

    def truth(self) -> dict[str, Any]:
        return self.annotations.as_coco()


def build_coco(image_set: str, args: Namespace) -> CocoDetection:
    """The "train" or "val" images under `args.coco_path` or `args.data_root`.

    Raises:
        UserError: files are missing or hold what makes training or evaluation wrong.
    """
    classes = getattr(args, "classes", None)
    if classes is not None and any(row != number for row, number in classes.ids.items()):
        raise UserError(
            f"{classes.source} counts its classes without gaps, --dataset_file coco takes the ids as they are: give "
            "--dataset_file custom --val_images DIR --val_annotations FILE"
        )
    image_folder, annotation_file = coco_files(coco_root(args), image_set)
    annotations = usable(read_coco(annotation_file), image_folder, image_set, args)
    num_classes = _num_classes(annotations, args.num_classes)
    return CocoDetection(image_folder, annotations, labelled_transforms(image_set, args), num_classes, seed=args.seed)


def coco_images(image_set: str, args: Namespace) -> ImageFolder:
    """All images of the folder, without a look at the annotation file.

    Raises:
        UserError: no such folder.
    """
    try:
        root = coco_root(args)
    except UserError as error:
        raise UserError(
            f"no unlabelled images: give --imagenet_path DIR (any folder tree) or --coco_path DIR ({error})"
        ) from error
    return ImageFolder(coco_files(root, image_set)[0])


def labelled_transforms(image_set: str, args: Namespace) -> Transform:
    """Of labelled images, and of images on which objects are to be found ("val")."""
    return detection_transforms(image_set, args.image_size or 800, args.max_size)


def usable(annotations: Annotations, image_folder: str, image_set: str, args: Namespace) -> Annotations:
    """Of the images to train on those that were chosen; of all those with a file. Says how many.

    Raises:
        UserError: a file is missing for evaluation, or all are missing; no image was chosen.
    """
    if image_set == "train":
        annotations = training_subset(annotations, args)
    # A check of the data set lists what is absent and goes on.
    annotations = _with_files(annotations, image_folder, image_set, getattr(args, "check_only", False))
    if image_set == "train":  # after the files, so that as many objects as promised can be trained on
        annotations = training_part(annotations, args)
    log.info(
        "%s: %d images, %d without objects, %d boxes, %d classes",
        annotations.source,
        len(annotations),
        (np.diff(annotations.offsets) == 0).sum(),
        len(annotations.labels),
        len(annotations.class_names),
    )
    return annotations


def _num_classes(annotations: Annotations, given: int | None) -> int:
    """91 as published for COCO's ids, or more where ids go further; a given number must exceed every id."""
    needed = annotations.max_label + 1
    if given is None:
        return max(PUBLISHED_NUM_CLASSES, needed)
    if needed > given:
        raise UserError(
            f"{annotations.source} has category id {needed - 1}, but --num_classes is {given}: "
            f"ids are used as they are, so use --num_classes {needed} (or more)"
        )
    return given


def _with_files(annotations: Annotations, image_folder: str, image_set: str, check_only: bool = False) -> Annotations:
    """Leaves out images without a file, in training and with `check_only`; in evaluation they would falsify every
    number.

    Raises:
        UserError: a file is missing for evaluation, or all are missing.
    """
    if not len(annotations):
        raise UserError(f"{annotations.source} lists no image: give a file with images and their boxes")
    present = _present(annotations, image_folder)
    missing = np.flatnonzero(~present)
    if not len(missing):
        return annotations
    first = f"{annotations.file_names[missing[0]]} (image {annotations.image_ids[missing[0]]})"
    what = f"{len(missing)} of {len(annotations)} images of {annotations.source} are not in {image_folder}: {first}"
    if not present.any() or image_set != "train" and not check_only:
        raise UserError(f"{what}: add the files or take the images out of the annotations")
    log.warning("%s: they are left out", what)
    ids = np.column_stack([np.full(len(missing), -1), annotations.image_ids[missing]])
    annotations.findings["image absent"] = (ids, PackedStrings(annotations.file_names[i] for i in missing))
    return annotations.select(np.flatnonzero(present))


def _present(annotations: Annotations, image_folder: str) -> np.ndarray:
    """bool [I]: whether the file is there. Lists each folder once, where asking for every file could take minutes."""
    names = [annotations.file_names[i] for i in range(len(annotations))]
    listings: dict[str, set[str]] = {}
    for folder in {os.path.dirname(name) for name in names}:
        path = os.path.join(image_folder, folder)
        try:
            listings[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}): check the permissions") from error
    return np.array([os.path.basename(name) in listings[os.path.dirname(name)] for name in names])
