"""The one inference path: a trained detector from a checkpoint, called with images.

predictor = Predictor.from_checkpoint("outputs/coco/checkpoint.pth")
prediction = predictor("image.jpg")
print(prediction.names, prediction.scores, prediction.boxes)
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import engine
from datasets import init_worker
from datasets.collate import collate, normalize
from datasets.evaluators.proposals import OBJECT
from datasets.images.image_folder import ImageFile, ImageFiles, read_image, to_tensor
from datasets.labelled.coco import labelled_transforms
from datasets.sample import BadImageError, Target
from datasets.transforms import Transform
from models import build_model
from models.postprocess import ClassAgnosticPostProcess
from models.trainable import TrainableModel
from util.checkpoints.adoption import adopt, is_pretext, without_pretext
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.classes import Classes, class_rows, classes_of, head_kind
from util.checkpoints.hub_models import HUB_MODELS, published_file
from util.checkpoints.loading import load_exactly
from util.distributed import use_device
from util.errors import UserError
from util.logger import log
from util.nested_tensor import NestedTensor
from util.random_state import SampleRandom
from util.settings import FINETUNE, Settings, checked_flags, resolve
from util.settings.resolving import default_device

Input = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class Prediction:
    """The objects found in one image, best first.

    scores: float32 [K] in 0..1. labels: int64 [K], rows of the class head. boxes: float32 [K, 4], (x0, y0, x1, y1) in
    pixels of the image, inside it. names: of the classes. category_ids: in annotation files. size_hw: of the image.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    size_hw: tuple[int, int]
    names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Prediction":
        """The objects with a score of at least `threshold`."""
        keep = (self.scores >= threshold).nonzero().flatten().tolist()
        return replace(
            self,
            scores=self.scores[keep],
            labels=self.labels[keep],
            boxes=self.boxes[keep],
            names=[self.names[i] for i in keep],
            category_ids=[self.category_ids[i] for i in keep],
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """In COCO's results format (`bbox` as x, y, width, height), with `category_name` besides."""
        boxes = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], dim=1)
        rows = zip(self.category_ids, self.names, boxes.tolist(), self.scores.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": number,
                "category_name": name,
                "bbox": box,
                "score": score,
            }
            for number, name, box, score in rows
        ]


class Predictor:
    """A detector with all that inference needs: image sizes, normalization, post-processing, class names.

    Attributes:
        model: the detector, in evaluation mode on `device`. postprocess: outputs and sizes -> results. classes: what
        the rows of the class head mean. settings: of the checkpoint's run. device. amp: whether the network runs in
        bfloat16.
    """

    def __init__(
        self,
        model: TrainableModel,
        postprocess: nn.Module,
        classes: Classes,
        settings: Settings,
        *,
        device: torch.device,
    ) -> None:
        self.model = model.base_detector().to(device).to(memory_format=torch.channels_last).eval()
        self.postprocess: Any = postprocess
        self.classes, self.settings, self.device = classes, settings, device
        self.amp, self.transforms = settings.amp == "bf16", labelled_transforms("val", settings)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Checkpoint,
        *,
        device: str | None = None,
        amp: str | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
        class_agnostic: bool = False,
    ) -> "Predictor":
        """A trained detector. Everything that is not given is taken from the checkpoint.

        Args:
            source: a file, an address, the name of a published model (`detr_resnet50`; `hubconf.py` lists them), or a
                checkpoint that was read already.
            device: `cuda`, `cuda:N` or `cpu`; by default a GPU if there is one.
            amp: `bf16`: the network in bfloat16. image_size, max_size: short and longest side, in pixels.
            class_agnostic: one box for each query, whatever its class; then checkpoints of pre-training work too.

        Raises:
            UserError: the file holds no such detector, or can't be had; one line says why and what to do.
        """
        options = {"device": device, "amp": amp, "image_size": image_size, "max_size": max_size}
        given = checked_flags(FINETUNE, options)
        use_device(given.get("device") or default_device())
        checkpoint = source if isinstance(source, Checkpoint) else _load(str(source))
        if class_agnostic:
            return cls._class_agnostic(checkpoint, given)
        given |= {"resume": checkpoint.source, "eval": True}
        settings = resolve(given, adopt(checkpoint, given), FINETUNE)
        classes = classes_of(checkpoint)
        if not checkpoint.class_names:
            used = "COCO's are used" if classes.names else "objects have numbers only"
            log.info("%s holds no class names: %s", checkpoint.source, used)
        model, _, postprocessors = build_model(settings, classes.count)
        load_exactly(model, checkpoint)
        return cls(
            model, postprocessors["bbox"], classes, settings, device=torch.device(settings.device)
        )

    @classmethod
    def _class_agnostic(cls, checkpoint: Checkpoint, given: dict[str, Any]) -> "Predictor":
        """The detector inside a checkpoint of a pretext or of training, with its class head."""
        given = {**given, "pretrain": checkpoint.source, "classification": head_kind(checkpoint)}
        settings = resolve(given, adopt(checkpoint, given), FINETUNE)
        count = class_rows(checkpoint.model, settings.classification)
        model, _, _ = build_model(settings, count)
        load_exactly(model, without_pretext(checkpoint))
        label = object_label(count) if is_pretext(checkpoint) else None
        classes = Classes({OBJECT: "object"}, {OBJECT: OBJECT}, count, checkpoint.source)
        postprocess = ClassAgnosticPostProcess(model.classification, label)
        return cls(model, postprocess, classes, settings, device=torch.device(settings.device))

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too
        self, images: Input, *, threshold: float = 0.5, batch_size: int = 1
    ) -> Prediction: ...

    @overload
    def __call__(
        self, images: Iterable[Input], *, threshold: float = 0.5, batch_size: int = 1
    ) -> list[Prediction]: ...

    def __call__(
        self, images: Input | Iterable[Input], *, threshold: float = 0.5, batch_size: int = 1
    ) -> Prediction | list[Prediction]:
        """What is found in one image, or in each of several.

        Args:
            images: a path, an image of Pillow, an RGB array uint8 [H, W, 3], or a tensor [3, H, W] (uint8, or float in
                0..1); or an iterable of these.
            threshold: lowest score of an object.
            batch_size: images of different sizes in a batch are padded, which changes predictions a little.

        Raises:
            UserError: an image can't be read.
            ValueError: an array or tensor of another shape or type.
        """
        if isinstance(images, Input):
            return self([images], threshold=threshold)[0]
        found: list[Prediction] = []
        for some in batched(images, batch_size):
            batch = [prepare(as_image(image), self.transforms) for image in some]
            sizes_hw = torch.stack([target["orig_size"] for _, target in batch])
            found += self.predict_batch(collate(batch)[0], sizes_hw)
        return [prediction.above(threshold) for prediction in found]

    @torch.no_grad()
    def predict_batch(self, samples: NestedTensor, sizes_hw: Tensor) -> list[Prediction]:
        """samples: uint8 images, padded to one size. sizes_hw: int64 [B, 2] of the original images, in whose pixels the
        boxes are.
        """
        samples = normalize(samples.to(self.device, non_blocking=True), **self.model.normalization)
        with engine.autocast(self.device, self.amp):
            outputs = self.model(samples)
        results = engine.results_to_host(self.postprocess(outputs, sizes_hw.to(self.device)))
        return [
            self._prediction(result, (int(height), int(width)))
            for result, (height, width) in zip(results, sizes_hw.tolist(), strict=True)
        ]

    def _prediction(self, result: dict[str, Tensor], size_hw: tuple[int, int]) -> Prediction:
        order = result["scores"].argsort(descending=True, stable=True)
        scores, labels, boxes = (result[name][order] for name in ("scores", "labels", "boxes"))
        limits = torch.tensor([size_hw[1], size_hw[0]] * 2)
        return Prediction(
            scores,
            labels,
            torch.minimum(boxes.clamp(min=0), limits),
            size_hw,
            names=[self.classes.names.get(label, f"class {label}") for label in labels.tolist()],
            category_ids=[self.classes.ids.get(label, label) for label in labels.tolist()],
        )

    def predict_files(
        self,
        images: ImageFiles,
        *,
        threshold: float = 0.5,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> Iterator["FileResult"]:
        """Goes over many files in their order, read by dataloader workers. Each file is decoded once, and one that
        can't be read is a result with the reason.
        """
        loader: DataLoader = DataLoader(
            _Files(images, self.transforms),
            batch_size,
            collate_fn=_collate_readable,
            num_workers=num_workers,
            worker_init_fn=init_worker,
            pin_memory=self.device.type == "cuda",
        )
        for samples, sizes_hw, files in loader:
            found = iter(self.predict_batch(samples, sizes_hw)) if samples is not None else iter(())
            for result in files:
                if result.problem is None:
                    result.prediction = next(found).above(threshold)
                yield result


def object_label(num_classes: int) -> int:
    """The class output of a pretext's detector that says "object"."""
    return min(OBJECT, num_classes - 1)


def _load(source: str) -> Checkpoint:
    return load_checkpoint(published_file(source) if source in HUB_MODELS else source)


@dataclass
class FileResult:
    """index: of the file. image: uint8 [3, H, W], as decoded. problem: why it can't be read; then there is no image."""

    index: int
    image: Tensor | None = None
    prediction: Prediction | None = None
    problem: str | None = None


class _Files(Dataset):
    """File i as (result without prediction, sample)."""

    def __init__(self, images: ImageFiles, transforms: Transform) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[FileResult, tuple[Tensor, Target] | None]:
        try:
            image = read_image(self.images.file(index))
        except BadImageError as error:
            return FileResult(index, problem=str(error)), None
        return FileResult(index, image), prepare(image, self.transforms, index)


def _collate_readable(
    batch: Sequence[tuple[FileResult, tuple[Tensor, Target] | None]],
) -> tuple[NestedTensor | None, Tensor | None, list[FileResult]]:
    """The batch of the images that can be read, None without any, their sizes, and all results."""
    files, samples = (
        [file for file, _ in batch],
        [sample for _, sample in batch if sample is not None],
    )
    if not samples:
        return None, None, files
    return collate(samples)[0], torch.stack([target["orig_size"] for _, target in samples]), files


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one perhaps shorter (itertools.batched exists from Python 3.12 on)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def prepare(image: Tensor, transforms: Transform, index: int = 0) -> tuple[Tensor, Target]:
    """uint8 [3, H, W] -> what the model sees, and a target with its sizes."""
    size = torch.tensor(image.shape[-2:])
    target = {"image_id": torch.tensor([index + 1]), "orig_size": size, "size": size.clone()}
    prepared, target = transforms(image, target, SampleRandom.of(0, 0, index))
    return cast(Tensor, prepared), target


def as_image(image: Input) -> Tensor:
    """uint8 [3, H, W], RGB, of what a predictor is called with.

    Raises:
        UserError: a file that can't be read.
        ValueError: an array or tensor of another shape or type.
    """
    if isinstance(image, str | Path):
        return _read(str(image))
    if isinstance(image, Image.Image):
        return to_tensor(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an array must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
            )
        return torch.from_numpy(image.copy()).permute(2, 0, 1)
    if (
        image.ndim != 3
        or image.shape[0] != 3
        or not (image.dtype == torch.uint8 or image.is_floating_point())
    ):
        raise ValueError(
            f"a tensor must be [3, H, W], uint8 or float in 0..1, got {image.dtype} {list(image.shape)}"
        )
    if image.dtype == torch.uint8:
        return image.cpu()
    return (image.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)


def _read(file: ImageFile) -> Tensor:
    try:
        return read_image(file)
    except BadImageError as error:
        raise UserError(f"{file}: {error}: give an image that can be read") from error
