"""Labelled images with COCO annotations, in the published folder layouts.

Shapes: I images.
"""

import functools
import json
import os
from dataclasses import replace

import numpy as np
from torch import Tensor

from datasets.evaluators.coco import GroundTruth, build_ground_truth
from datasets.images.image_folder import ImageFolder, read_header, read_image
from datasets.images.image_info import inspect_header
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.few_shot import few_shot_subset
from datasets.labelled.file_names import match_files, remedy
from datasets.labelled.segmentations import SegmentationError, SegmentationTexts
from datasets.labelled.subsets import training_subset
from datasets.sample import BadImageError, SampleDataset, Target
from datasets.transforms import Transform, detection_transforms
from util.checkpoints.classes import Classes
from util.coco import NUM_CLASSES
from util.errors import UserError
from util.gc_paused import gc_paused
from util.logger import log
from util.random_state import SampleRNG
from util.settings import Settings

_FOLDERS = {"train": "train2017", "val": "val2017"}


def coco_root(settings: Settings) -> str:
    """Return the COCO folder: `settings.coco_path`, or `MSCoco` in `settings.data_root`.

    Raises:
        UserError: neither is given, or the folder does not exist.
    """
    root = settings.coco_path
    if not root and settings.data_root:
        root = os.path.join(settings.data_root, "MSCoco")
    if not root:
        raise UserError(
            "no data: give --coco_path DIR (with train2017, val2017 and annotations) or --data_root DIR"
        )
    if os.path.isfile(root):
        raise UserError(
            f"{root} is not a folder: --coco_path takes one with train2017, val2017 and annotations; use an "
            "annotation file with --dataset_file custom, see docs/custom_dataset.md"
        )
    if not os.path.isdir(root):
        raise UserError(
            f"{root} is not a folder: --coco_path takes one with train2017, val2017 and annotations"
        )
    return root


def coco_files(root: str, image_set: str) -> tuple[str, str]:
    """Return (image folder, annotation file) of "train" or "val".

    The images are in `train2017` or `images/train2017`, the annotations in `annotations`: DETR and UP-DETR use the
    first layout, Conditional DETR the second.

    Raises:
        UserError: the image folder does not exist. The annotation file is not checked here.
    """
    folder = _FOLDERS[image_set]
    candidates = [os.path.join(root, folder), os.path.join(root, "images", folder)]
    for candidate in candidates:
        if os.path.isdir(candidate):
            return candidate, os.path.join(root, "annotations", f"instances_{folder}.json")
    raise UserError(
        f"{root} has neither {folder} nor images/{folder}: put the {image_set} images into one of them, or name "
        "your own folders and files with --dataset_file custom"
    )


class CocoDetection(SampleDataset):
    """Images with boxes; images without objects are kept.

    An image whose size differs from the annotation file counts as bad, since its boxes would be wrong.

    Args:
        num_classes: size of the class head, without "no object".
        category_ids: label -> category id of the annotation file; None if labels are these ids.
        ground_truth: what COCO evaluators compare with, if it was read with the annotations.
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
        self.image_folder = image_folder
        self.annotations = annotations
        self.transforms = transforms
        self.num_classes = num_classes
        self.category_ids = category_ids
        self.class_names = annotations.class_names
        if ground_truth is not None:
            # Fills the cached property of the base class, which would read the file a second time.
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
        """Log a warning if images have no file: they are skipped in training.

        Raises:
            UserError: the same in evaluation, where it would make every metric wrong.
        """
        absent = self.annotations.findings.get("image absent")
        if absent is None:
            return
        ids, names = absent  # [K, 2], annotation id and image id; [K]
        what = (
            f"{len(names)} of {len(self) + len(names)} images of {self.annotation_file} are not in "
            f"{self.image_folder}: {names[0]} (image {ids[0, 1]})"
        )
        hints = self.annotations.image_notes.get("image absent", {})
        # Not every missing image has a file with a similar name.
        image_id, hint = next(iter(hints.items()), (0, ""))
        hint = f"; image {image_id}: {hint}" if hint else ""
        if image_set != "train":
            raise UserError(
                f"{what}: add the files or remove the images from the annotations{hint}"
            )
        log.warning("%s: they are skipped%s", what, hint)

    def read(self, index: int) -> Tensor:
        """Read an image as uint8 [3, H, W], rotated by its EXIF orientation if its boxes are; see `read_image`."""
        return read_image(self.path(index), self.exif, self.annotations.sizes_hw[index].tolist())

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        """Return (image uint8 [3, H, W], target), after transforms.

        Raises:
            BadImageError: the file can't be decoded, its size differs from the annotation file, or a mask can't be
                decoded.
        """
        image = self.read_checked(index)  # [3, H, W]
        target = self.target(index, tuple(image.shape[-2:]))
        annotated = self.annotations.offsets[index + 1] - self.annotations.offsets[index]
        dropped = int(annotated) - len(target["boxes"])
        image, target = self.transforms(image, target, rng)
        if dropped:
            target["dropped_boxes"] = [(self.path(index), dropped)]
        return image, target

    def final_size(self, epoch: int, index: int) -> tuple[int, int] | None:
        """Repeat the draws of `load` for the size in the annotations, or in the header of a file that they lack."""
        height, width = self.annotations.sizes_hw[index].tolist()
        if not height or not width:
            height, width = read_header(self.path(index)).size_hw
        rng = SampleRNG.from_key(self.seed, epoch, index)
        size = (height, width)
        return self.transforms.output_size(size, self.transforms.draw(rng, size))

    def read_checked(self, index: int) -> Tensor:
        """Read an image as uint8 [3, H, W].

        Raises:
            BadImageError: the file can't be decoded, or its size differs from the annotation file.
        """
        image = self.read(index)
        height, width = image.shape[-2:]
        listed_height, listed_width = self.annotations.sizes_hw[index]
        if listed_height and listed_width and (listed_height, listed_width) != (height, width):
            is_swapped = (listed_height, listed_width) == (width, height)
            cause = (
                "rotated, or are width and height swapped?" if is_swapped else "rotated or resized?"
            )
            forced = f"; or omit --exif {self.exif}" if self.exif and is_swapped else ""
            raise BadImageError(
                f"{width} x {height} pixels, but image {self.annotations.image_ids[index]} is {listed_width} x "
                f"{listed_height} in {self.annotation_file} ({cause}{forced})"
            )
        return image

    def target(self, index: int, size_hw: tuple[int, int]) -> Target:
        """Return the target of an image of (H, W) pixels before transforms, see `Annotations.target`.

        Raises:
            BadImageError: a mask can't be decoded.
        """
        try:
            return self.annotations.target(index, size_hw)
        except SegmentationError as error:
            raise BadImageError(
                f"{error} (image {self.annotations.image_ids[index]} in {self.annotation_file})"
            ) from error


class ConvertedDetection(CocoDetection):
    """Images with annotations that were converted from another format. Labels are the category ids."""

    @functools.cached_property
    def ground_truth(self) -> GroundTruth:
        # There is no COCO file to read, so the ground truth comes from the arrays.
        content = self.annotations.to_coco()
        if self.annotations.segmentations is None:
            return build_ground_truth(content)
        texts = self.annotations.texts_of(np.arange(len(self.annotations.labels)))
        for annotation, text in zip(content["annotations"], texts, strict=True):
            annotation["segmentation"] = None if text is None else json.loads(text)
        return build_ground_truth(content, SegmentationTexts())


def build_coco(image_set: str, settings: Settings, classes: Classes | None = None) -> CocoDetection:
    """Build the dataset of the "train" or "val" images in `settings.coco_path` or `settings.data_root`.

    Args:
        classes: meaning of the class head in a checkpoint, None for a new head.

    Raises:
        UserError: files are missing, or contain something that makes training or evaluation wrong.
    """
    if classes is not None and not has_raw_ids(classes):
        raise UserError(
            f"{classes.source} numbers its classes without gaps, --dataset_file coco uses the ids unchanged: give "
            "--dataset_file custom --val_images DIR --val_annotations FILE"
        )
    image_folder, annotation_file = coco_files(coco_root(settings), image_set)
    annotations, ground_truth = read_annotations(annotation_file, image_set, settings, image_folder)
    return CocoDetection(
        image_folder,
        filter_annotations(annotations, image_folder, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=NUM_CLASSES,
        seed=settings.seed,
        ground_truth=ground_truth,
    )


def has_raw_ids(classes: Classes) -> bool:
    """Return whether the rows of a class head are category ids."""
    return all(row == category for row, category in classes.category_ids.items())


def read_annotations(
    path: str, image_set: str, settings: Settings, image_folder: str
) -> tuple[Annotations, GroundTruth | None]:
    """Read a COCO file and return (annotations, ground truth for evaluators), with masks if `settings.masks`.

    The ground truth is None for "train". For "val", both come from a single read of the file.

    With `settings.eval`, a file may only list images, such as COCO's image_info_test-dev2017.json: its annotations are
    kept by an evaluation server.

    Raises:
        UserError: see `read_coco`; or masks are needed, and no object has a segmentation.
    """
    segmentations = SegmentationTexts() if settings.masks else None
    with gc_paused():
        content = read_json(path, segmentations)
        if settings.eval and isinstance(content, dict) and "annotations" not in content:
            content = {"categories": [], **content, "annotations": []}
        annotations = parse_coco(content, path, segmentations)
        _check_has_segmentations(annotations)
        if image_set != "val":
            return annotations, None
        if segmentations is None:
            return annotations, build_ground_truth(content)
        sizes_hw = _sizes_of_files(annotations, image_folder, settings.exif)
        return annotations, build_ground_truth(content, segmentations, sizes_hw)


def _check_has_segmentations(annotations: Annotations) -> None:
    """Raise a UserError if masks are read, and no object has one."""
    numbers = annotations.segmentations
    if numbers is not None and len(numbers) and (numbers < 0).all():
        raise UserError(
            f"--masks: none of the {len(numbers)} objects of {annotations.source} has a segmentation: give annotations "
            "with polygons or RLE, or omit --masks"
        )


def _sizes_of_files(
    annotations: Annotations, image_folder: str, exif: str | None
) -> dict[int, tuple[int, int]]:
    """Return image id -> (height, width) of the images whose size the annotations do not list, from their files."""
    sizes = {}
    for index in np.flatnonzero(~annotations.sizes_hw.all(1)):
        path = os.path.join(image_folder, annotations.file_names[index])
        sizes[int(annotations.image_ids[index])] = inspect_header(path, exif).size_hw
    return sizes


def coco_images(image_set: str, settings: Settings) -> ImageFolder:
    """Return all images of the folder for pre-training. The annotation file is not read.

    Raises:
        UserError: the folder does not exist.
    """
    try:
        root = coco_root(settings)
    except UserError as error:
        raise UserError(
            f"no unlabelled images: give --imagenet_path DIR (any folder tree) or --coco_path DIR ({error})"
        ) from error
    image_folder, _ = coco_files(root, image_set)
    return ImageFolder(image_folder)


def labelled_transforms(image_set: str, settings: Settings) -> Transform:
    """Return the transforms of labelled images ("train"), and of evaluation and inference ("val")."""
    return detection_transforms(image_set, settings.image_size or 800, settings.max_size)


def filter_annotations(
    annotations: Annotations, image_folder: str, image_set: str, settings: Settings
) -> Annotations:
    """Return the selected images for "train", all images for "val". Log how many are left.

    Images without a file are skipped, and listed in `findings`.

    Raises:
        UserError: all files are missing, or no image is selected.
    """
    listed = annotations.file_names
    if image_set == "train":
        annotations = training_subset(annotations, settings)
    annotations = _drop_missing_files(annotations, image_folder, listed)
    if image_set == "train":
        # After missing files are dropped: all K sampled objects of a class must be in images that exist.
        annotations = few_shot_subset(annotations, settings)

    log.info(
        "%s: %d images, %d without objects, %d boxes, %d classes%s",
        annotations.source,
        len(annotations),
        (np.diff(annotations.offsets) == 0).sum(),
        len(annotations.labels),
        len(annotations.class_names),
        _unused_classes(annotations),
    )
    return annotations


def _unused_classes(annotations: Annotations) -> str:
    """Return which classes have no box, as text for the log: some programs list a parent category such as "objects"."""
    used = set(np.unique(annotations.labels).tolist())
    unused = [name for label, name in annotations.class_names.items() if label not in used]
    if not unused:
        return ""
    more = ", ..." if unused[3:] else ""
    return f", {len(unused)} of them without boxes ({', '.join(unused[:3])}{more})"


def _drop_missing_files(
    annotations: Annotations, image_folder: str, listed: PackedStrings
) -> Annotations:
    """Return the annotations of the images that exist, under the names of their files (see `match_files`).

    Args:
        listed: file names of all images, of which `annotations` may be a part.

    Raises:
        UserError: no image exists, or none is listed.
    """
    if not len(annotations):
        raise UserError(
            f"{annotations.source} lists no images: give a file with images and their boxes"
        )
    present = _files_exist(annotations, image_folder)  # [I]
    if present.all():
        return annotations

    names, ids = list(annotations.file_names), annotations.image_ids.tolist()
    matches = match_files(names, np.flatnonzero(~present).tolist(), image_folder, listed)
    renamed = {ids[i]: f"listed as {names[i]!r}" for i in matches.files}
    hints = {ids[i]: f"did you mean {name}?" for i, name in matches.suggestions.items()}
    present[list(matches.files)] = True
    missing = np.flatnonzero(~present)
    if not present.any():
        first = int(missing[0])
        raise UserError(
            f"{len(missing)} of {len(annotations)} images of {annotations.source} are not in {image_folder}: "
            f"{names[first]} (image {ids[first]}): "
            + remedy(
                matches.suggestions.get(first),
                matches.example,
                "add the files or remove the images from the annotations",
            )
        )

    findings, notes = dict(annotations.findings), dict(annotations.image_notes)
    if renamed:
        notes["file name differs"] = renamed
    if len(missing):
        missing_ids = np.column_stack([np.full(len(missing), -1), annotations.image_ids[missing]])
        findings["image absent"] = (missing_ids, PackedStrings(names[i] for i in missing))  # [K, 2]
        notes["image absent"] = hints
    files = PackedStrings(matches.files.get(i, name) for i, name in enumerate(names))
    annotations = replace(annotations, file_names=files, findings=findings, image_notes=notes)
    return annotations.select(np.flatnonzero(present)) if len(missing) else annotations


def _files_exist(annotations: Annotations, image_folder: str) -> np.ndarray:
    """Return which image files exist, bool [I].

    Each folder is listed once. Checking every file on its own could take minutes.
    """
    names = list(annotations.file_names)
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
