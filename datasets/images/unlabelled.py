"""Images for pre-training: from a folder, a list, or a labelled dataset without its labels."""

import os

from datasets.images.image_folder import ImageFiles, ImageFolder
from datasets.images.packed_strings import PackedStrings
from util.errors import UserError
from util.logger import log
from util.settings import Settings
from util.settings.registry import DATASETS, import_object, lookup


class ListedImages(ImageFiles):
    """Images given by their paths relative to `base`, in this order.

    Args:
        source: where the names come from, for messages.

    Raises:
        UserError: there are none.
    """

    def __init__(self, base: str, names: PackedStrings, source: str) -> None:
        if not len(names):
            raise UserError(f"{source} lists no images; give --imagenet_path DIR (any folder tree)")
        super().__init__(base, names)
        log.info("%d images of %s, without their labels", len(names), source)


def build_unlabelled_images(image_set: str, settings: Settings) -> ImageFiles:
    """Return the images of `--imagenet_path` or `--train_images`, else the images of `--dataset_file`.

    Args:
        image_set: "train" or "val", which images of `--dataset_file`. A folder has no such split.

    Raises:
        UserError: no images.
    """
    images = _find_images(image_set, settings)
    images.exif, images.reduced_decode = settings.exif, settings.reduced_decode
    return images


def _find_images(image_set: str, settings: Settings) -> ImageFiles:
    folder = settings.imagenet_path or settings.train_images
    if folder:
        return ImageFolder(folder)

    entry = lookup(DATASETS, "--dataset_file", settings.dataset_file)
    if entry.images:
        return import_object(entry.images)(image_set, settings)

    # The registry has no builder for the images alone: build the labelled dataset and use its paths.
    labelled = import_object(entry.builder)(image_set, settings)
    labelled.validate(image_set)
    paths = [labelled.path(index) for index in range(len(labelled))]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = sorted(os.path.relpath(path, base) for path in paths)
    return ListedImages(base, PackedStrings(names), f"--dataset_file {settings.dataset_file}")
