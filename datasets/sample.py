"""The base of all datasets: samples by (epoch, index), and what happens when an image is bad."""

import functools
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from datasets.evaluators.coco import CocoEvaluator, GroundTruth, ground_truth_of
from datasets.evaluators.detections import Detections
from datasets.labelled.annotations import read_json
from util.errors import UserError
from util.random_state import SampleRandom
from util.settings import Settings

Target = dict[str, Any]
Key = int | tuple[int, int]
MAX_BAD_IN_A_ROW = 100


class BadImageError(Exception):
    """An image that can't be used (unreadable, too small, not what its annotation says); the text is the reason."""


class SampleDataset(Dataset):
    """Turns `load(index, rng)` of a subclass into `dataset[index]` and `dataset[(epoch, index)]`.

    Where `load` raises BadImageError the next index is used, with the random state of the one that was asked for, and
    the target gets `problems`: [(path, reason), ...]. The same happens in evaluation: the next image then counts twice
    in the losses, and once in the metrics, which go by image ids and take the objects of the bad image for missed.
    A subclass has `__len__`, `path(index)`, `load(index, rng)` and `fingerprint()`.
    """

    category_ids: dict[int, int] | None = (
        None  # of labels in the annotation file, where labels are not these ids
    )

    # Of labelled datasets alone.
    num_classes: int
    class_names: dict[int, str]
    annotations: Any
    annotation_file: Any

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Path of the image file."""
        raise NotImplementedError

    def load(self, index: int, rng: SampleRandom) -> tuple[Tensor, Target]:
        """The sample of one index, without fall-back.

        Raises:
            BadImageError: this image can't be used.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes whenever the files or the annotations do: kept with each run."""
        raise NotImplementedError

    def validate(self, image_set: str) -> None:
        """Of a labelled dataset: refuses for training ("train") or evaluation ("val") what reading only noted down.

        Raises:
            UserError: such as images without a file in evaluation, which would falsify every metric.
        """

    @functools.cached_property
    def ground_truth(self) -> GroundTruth:
        """What COCO evaluators compare detections on a labelled dataset with; made once, shared by all of them."""
        return ground_truth_of(read_json(self.annotation_file))

    def evaluator(self, settings: Settings) -> Detections:
        """A new evaluator of a labelled dataset. Its `summarize` gives "stats", AP first, and "per_class" as
        `CocoEvaluator` has it.
        """
        return CocoEvaluator(self.ground_truth, settings.coco_evaluator, self.category_ids)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        """
        Raises:
            UserError: MAX_BAD_IN_A_ROW consecutive images, or all there are, can't be used.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        problems: list[tuple[str, str]] = []
        for step in range(min(MAX_BAD_IN_A_ROW, len(self))):
            candidate = (index + step) % len(self)
            try:
                image, target = self.load(candidate, SampleRandom.of(self.seed, epoch, index))
            except BadImageError as error:
                problems.append((self.path(candidate), str(error)))
                continue
            if problems:
                target["problems"] = problems
            return image, target
        path, reason = problems[0]
        raise UserError(
            f"{len(problems)} images in a row can't be used, the first is {path}: {reason}; check the image folder"
        )
