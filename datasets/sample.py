"""Base class of all datasets: samples by (epoch, index), and the replacement of bad images."""

import functools
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from datasets.evaluators.coco import CocoEvaluator, GroundTruth, build_ground_truth
from datasets.labelled.coco_json import read_json
from util.errors import UserError
from util.packed_targets import TOO_FEW_PROPOSALS
from util.random_state import SampleRNG
from util.settings import Settings

Target = dict[str, Any]
Size = tuple[int, int]
SampleKey = int | tuple[int, int]

# A run of bad images this long is a broken folder, not a few broken files.
MAX_CONSECUTIVE_BAD_IMAGES = 100


class BadImageError(Exception):
    """An image that can't be used: unreadable, too small, or not what its annotation says. The text is the reason."""


class TooFewProposalsError(BadImageError):
    """A pretext needs more boxes than the proposal method has for this image, which is a good one otherwise."""

    def __init__(self, found: int, needed: int) -> None:
        super().__init__(f"{TOO_FEW_PROPOSALS} ({found}, the pretext needs {needed})")


class SampleDataset(Dataset):
    """Base class that serves `dataset[index]` and `dataset[(epoch, index)]` from a subclass's `load(index, rng)`.

    If `load` raises BadImageError, the next index takes its place, and the target gets `problems`: [(path, reason),
    ...]. In evaluation the replacement counts twice in the losses, but once in the metrics: these go by image id, and
    the objects of the bad image count as missed.

    A subclass implements `__len__`, `path(index)`, `load(index, rng)` and `fingerprint()`.
    """

    # Label -> category id in the annotation file. None: labels are these ids.
    category_ids: dict[int, int] | None = None

    # `--exif`. None: the sizes in the annotations decide, see `datasets.images.pixels.choose_rotation`.
    exif: str | None = None

    # Category id -> whether it is a thing, of panoptic data.
    things: dict[int, bool] | None = None

    # Labelled datasets only.
    num_classes: int
    class_names: dict[int, str]
    annotations: Any
    annotation_file: Any

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Return the path of the image file."""
        raise NotImplementedError

    def read(self, index: int) -> Tensor:
        """Read an image as uint8 [3, H, W], in the pixels of its boxes.

        Raises:
            BadImageError: it can't be read.
        """
        from datasets.images.image_folder import read_image  # which imports this module

        return read_image(self.path(index), self.exif)

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, Target]:
        """Load the sample of one index, without replacing a bad image.

        Raises:
            BadImageError: this image can't be used.
        """
        raise NotImplementedError

    def final_size(self, epoch: int, index: int) -> Size | None:
        """Return the (height, width) of `self[(epoch, index)]` without decoding it. None: it isn't known before.

        The sampler only orders images by it, so it may be wrong for a bad image.
        """
        return None

    def fingerprint(self) -> str:
        """Return a string that changes with the files or annotations. It is saved with each run."""
        raise NotImplementedError

    def validate(self, image_set: str) -> None:
        """Check that a labelled dataset can be used for training ("train") or evaluation ("val").

        Raises:
            UserError: for example images without a file in evaluation, which would falsify every metric.
        """

    @functools.cached_property
    def ground_truth(self) -> GroundTruth:
        """The ground truth of a labelled dataset, built once and shared by all COCO evaluators."""
        return build_ground_truth(read_json(self.annotation_file))

    def evaluator(self, settings: Settings) -> Any:
        """Build an evaluator of a labelled dataset: a `DetectionEvaluator`, or one with the same methods.

        Its `summarize` returns "stats", AP first, and "per_class", as `CocoEvaluator` does.
        """
        return CocoEvaluator(
            self.ground_truth, settings.coco_evaluator, self.category_ids, settings.masks
        )

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target]:
        """Return the sample of `index` (epoch 0) or `(epoch, index)`.

        Raises:
            UserError: MAX_CONSECUTIVE_BAD_IMAGES images in a row, or all images, can't be used.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        problems: list[tuple[str, str]] = []

        for step in range(min(MAX_CONSECUTIVE_BAD_IMAGES, len(self))):
            candidate = (index + step) % len(self)
            # Seeded by the index that was asked for: otherwise the replacement would repeat the augmentation, and the
            # random boxes, of its own sample in this epoch.
            rng = SampleRNG.from_key(self.seed, epoch, index)
            try:
                image, target = self.load(candidate, rng)
            except BadImageError as error:
                problems.append((self.path(candidate), str(error)))
                continue
            if problems:
                target["problems"] = problems
            return image, target

        path, reason = problems[0]
        are_boxless = all(reason.startswith(TOO_FEW_PROPOSALS) for _, reason in problems)
        remedy = "use other --proposals" if are_boxless else "check the image folder"
        raise UserError(
            f"{len(problems)} images in a row can't be used, the first is {path}: {reason}; {remedy}"
        )
