"""Which images a pretext sees: a folder, a list, or the images of a labelled dataset without their labels."""

import os

from datasets.images.image_folder import ImageFiles, ImageFolder
from datasets.images.packed_strings import PackedStrings
from util.errors import UserError
from util.logger import log
from util.settings import Settings
from util.settings.registry import DATASETS, load, lookup


class ListedImages(ImageFiles):
    """Images by their names below a folder, in the order of the names.

    what: where the names come from, for messages.

    Raises:
        UserError: there are none.
    """

    def __init__(self, base: str, names: PackedStrings, what: str) -> None:
        if not len(names):
            raise UserError(f"{what} lists no image: give --imagenet_path DIR (any folder tree)")
        super().__init__(base, names)
        log.info("%d images of %s, without their labels", len(names), what)


def unlabelled_images(image_set: str, settings: Settings) -> ImageFiles:
    """The images of `--imagenet_path` or `--train_images` where given, else the "train" or "val" images of
    `--dataset_file`.

    The dataset's line in the registry says where its images are; one that does not is asked for its labelled images.

    Raises:
        UserError: no images.
    """
    folder = settings.imagenet_path or settings.train_images
    if folder:
        return ImageFolder(folder)
    entry = lookup(DATASETS, "--dataset_file", settings.dataset_file)
    if entry.images:
        return load(entry.images)(image_set, settings)
    labelled = load(entry.builder)(image_set, settings)
    labelled.validate(image_set)
    paths = [labelled.path(index) for index in range(len(labelled))]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    return ListedImages(
        base,
        PackedStrings(sorted(os.path.relpath(path, base) for path in paths)),
        f"--dataset_file {settings.dataset_file}",
    )
