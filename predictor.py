"""Inference: a trained detector from a checkpoint, called with images.

    predictor = Predictor.from_checkpoint("outputs/coco/checkpoint.pth")
    prediction = predictor("image.jpg")
    print(prediction.names, prediction.scores, prediction.boxes)

With a mask head predictions also have `masks`, and of a panoptic detector a segmentation of the image (`panoptic`).

Tools, the hub and the evaluation of pre-trained models all use this class.

Letters in shape comments: B images of a batch, K objects of an image, H and W the size of an image or a padded batch.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from datasets.evaluators.proposals import OBJECT_ID
from datasets.images.image_folder import (
    ImageFile,
    ImageFiles,
    convert_image,
    decode_image,
    pillow_warnings,
    read_image,
    to_tensor,
)
from datasets.images.pixels import UNDECIDED
from datasets.labelled.coco import labelled_transforms
from datasets.sample import BadImageError, Target
from datasets.transforms import Transform
from models import build_model
from models.attention_maps import ImageAttention, record_attention
from models.postprocess import ClassAgnosticPostProcess
from models.trainable import TrainableModel
from util.bf16 import AMP_DTYPES, log_bf16
from util.checkpoints.adoption import is_pretext, settings_from_checkpoint, strip_pretext
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.classes import Classes, count_classes, infer_classes, infer_classification
from util.checkpoints.hub_models import HUB_MODELS, published_url
from util.checkpoints.loading import load_strict, without_mask_head
from util.distributed import select_device
from util.errors import UserError
from util.logger import log
from util.masks import decode_masks
from util.packed_images import PackedImages
from util.random_state import SampleRNG
from util.runs.compilation import compile_detector
from util.settings import FINETUNE, Settings, checked_flags, resolve
from util.settings.registry import PRETEXTS
from util.settings.resolving import default_device

RLE = dict[str, Any]  # {"size": [H, W], "counts": bytes}
ImageInput = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class Panoptic:
    """A panoptic segmentation: each pixel belongs to one segment, an object ("thing") or a region ("stuff").

    Attributes:
        ids: int32 [H, W], the segment of each pixel; 0: none.
        segments: a dict for each segment: `id` (from 1), `category_id` (in annotation files), `name`, `isthing`, `area`
            in pixels, and `score` in [0, 1].
    """

    ids: Tensor
    segments: list[dict[str, Any]]


@dataclass
class Prediction:
    """The objects found in one image, best first.

    Attributes:
        scores: float32 [K], in [0, 1].
        labels: int64 [K], rows of the class head.
        boxes: float32 [K, 4], (x0, y0, x1, y1) in pixels of the image, clipped to it.
        size_hw: height and width of the image.
        names: class names, K of them.
        category_ids: ids of the classes in annotation files, K of them.
        rles: masks as run-length encodings in COCO's compressed format, K of them; None without a mask head.
        panoptic: segmentation of the image; None if the detector is not a panoptic one.
        best_score: highest score in the image, also of objects that are left out.
        queries: int64 [K], the object query of each; None if it is not known.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    size_hw: tuple[int, int]
    names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    rles: list[RLE] | None = None
    panoptic: Panoptic | None = None
    best_score: float = 0.0
    queries: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> Tensor | None:
        """Masks of the objects in pixels of the image, bool [K, H, W]; None without a mask head.

        Decoded on each call: 100 masks of a 12-megapixel image take 1.2 GB.
        """
        if self.rles is None:
            return None
        if not self.rles:
            return torch.zeros(0, *self.size_hw, dtype=torch.bool)
        return torch.from_numpy(decode_masks(self.rles)).bool()  # [K, H, W]

    def above(self, threshold: float) -> "Prediction":
        """Return the objects with a score of at least `threshold`. `panoptic` stays as it is."""
        return self._select((self.scores >= threshold).nonzero().flatten().tolist())

    def best(self, count: int) -> "Prediction":
        """Return the `count` best objects, or all if there are fewer. `panoptic` stays as it is."""
        return self._select(list(range(min(count, len(self)))))

    def _select(self, keep: list[int]) -> "Prediction":
        return replace(
            self,
            scores=self.scores[keep],
            labels=self.labels[keep],
            boxes=self.boxes[keep],
            names=[self.names[i] for i in keep],
            category_ids=[self.category_ids[i] for i in keep],
            rles=None if self.rles is None else [self.rles[i] for i in keep],
            queries=None if self.queries is None else self.queries[keep],
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return detections in COCO's results format, plus `category_name`.

        `bbox` is x, y, width, height. With masks there is a `segmentation`, an RLE that JSON can store.
        """
        top_left, bottom_right = self.boxes[:, :2], self.boxes[:, 2:]
        boxes_xywh = torch.cat([top_left, bottom_right - top_left], dim=1)  # [K, 4]
        rows = zip(
            self.category_ids, self.names, boxes_xywh.tolist(), self.scores.tolist(), strict=True
        )
        found: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "category_name": name,
                "bbox": box,
                "score": score,
            }
            for category_id, name, box, score in rows
        ]
        if self.rles is not None:
            for row, rle in zip(found, self.rles, strict=True):
                row["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
        return found


class Predictor:
    """A detector with everything that inference needs: image sizes, normalization, post-processing, class names.

    Attributes:
        model: the detector, in evaluation mode on `device`.
        postprocessors: of `build_model`: `bbox`, with a mask head `segm`, of a panoptic detector `panoptic`.
        classes: what the rows of the class head mean.
        settings: of the run that trained the detector.
        device: where the detector runs.
        amp: the dtype that the network runs in by autocast; None: in float32.
        compilation: what was compiled; None without `compile`.
        exif: "apply" to rotate images as their EXIF orientation says; otherwise they are used as stored.
        transforms: resizing, as in evaluation.
    """

    def __init__(
        self,
        model: TrainableModel,
        postprocessors: Mapping[str, nn.Module],
        classes: Classes,
        settings: Settings,
        *,
        device: torch.device,
    ) -> None:
        self.model = model.base_detector().to(device).to(memory_format=torch.channels_last).eval()
        self.model.requires_grad_(False)  # lets it keep weights with folded norms
        self.postprocessors: dict[str, Any] = dict(postprocessors)
        self.classes, self.settings, self.device = classes, settings, device
        self.amp = AMP_DTYPES[settings.amp]
        log_bf16(device, settings.amp == "bf16")
        self.compilation = compile_detector(self.model, settings.compile)
        self.exif = settings.exif
        self.transforms = labelled_transforms("val", settings)

    @property
    def postprocess(self) -> Any:
        """The post-processor of boxes: (outputs, image sizes) -> results."""
        return self.postprocessors["bbox"]

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Checkpoint,
        *,
        device: str | None = None,
        amp: str | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
        exif: str | None = None,
        compile: bool | None = None,
        class_agnostic: bool = False,
        panoptic_threshold: float | None = None,
    ) -> "Predictor":
        """Load a trained detector. Arguments that are not given have the values of the checkpoint's run.

        Args:
            source: a file, a URL, the name of a published model (such as `detr_resnet50`; `hubconf.py` lists them), or
                a checkpoint that is already loaded.
            device: `cuda`, `cuda:N` or `cpu`; a GPU by default, if there is one.
            amp: `bf16` runs the network in bfloat16, `fp16` in float16, `no` in float32.
            image_size: short side in pixels that images are resized to.
            max_size: limit of the long side, in pixels.
            exif: `apply` rotates images as their EXIF orientation says, `ignore` uses them as stored. By default as in
                training, if that tells.
            compile: run backbone, encoder and decoder compiled; the first images then take minutes.
            class_agnostic: return one box per query regardless of its class, without masks. Checkpoints of pre-training
                need this.
            panoptic_threshold: lowest score of a segment of a panoptic detector; 0.85 by default, 0.5 with focal
                classification.

        Raises:
            UserError: the file can't be loaded or has no such detector.
        """
        options = {
            "device": device,
            "amp": amp,
            "image_size": image_size,
            "max_size": max_size,
            "exif": exif,
            "compile": compile,
        }
        given = checked_flags(FINETUNE, options)
        # Before the file is read: a wrong device is reported at once.
        select_device(given.get("device") or default_device())

        checkpoint = source if isinstance(source, Checkpoint) else _load_checkpoint(str(source))
        if "exif" not in given and (trained := exif_of_training(checkpoint)):
            given["exif"] = trained
        if class_agnostic and panoptic_threshold is not None:
            raise UserError(
                "panoptic_threshold: with class_agnostic there are no segments; omit one"
            )
        if class_agnostic:
            return cls._class_agnostic(checkpoint, given)

        given |= {"resume": checkpoint.source, "eval": True}
        settings = resolve(given, settings_from_checkpoint(checkpoint, given), FINETUNE)
        classes = infer_classes(checkpoint)
        if not checkpoint.class_names:
            used = "using COCO's" if classes.names else "objects are named by class number"
            log.info("%s has no class names: %s", checkpoint.source, used)

        model, _, postprocessors = build_model(settings, classes.num_classes, classes.things)
        load_strict(model, checkpoint)
        if panoptic_threshold is not None:
            _set_panoptic_threshold(postprocessors, panoptic_threshold, checkpoint.source)
        return cls(model, postprocessors, classes, settings, device=torch.device(settings.device))

    @classmethod
    def _class_agnostic(cls, checkpoint: Checkpoint, given: dict[str, Any]) -> "Predictor":
        """Load the detector of a checkpoint, from a pretext or from training, with its own class head.

        A mask head is left out.
        """
        given = {
            **given,
            "pretrain": checkpoint.source,
            "classification": infer_classification(checkpoint),
        }
        adopted = {
            **settings_from_checkpoint(checkpoint, given),
            **_trained_size(checkpoint, given),
        }
        settings = resolve(given, adopted, FINETUNE)
        num_classes = count_classes(checkpoint.model, settings.classification)
        model, _, _ = build_model(settings, num_classes)
        load_strict(model, without_mask_head(strip_pretext(checkpoint)))

        # A pretext has one output that means "object"; a trained detector has real classes, of which the best counts.
        label = object_label(num_classes) if is_pretext(checkpoint) else None
        postprocessors = {"bbox": ClassAgnosticPostProcess(model.classification, label)}
        classes = Classes(
            {OBJECT_ID: "object"}, {OBJECT_ID: OBJECT_ID}, num_classes, checkpoint.source
        )
        return cls(model, postprocessors, classes, settings, device=torch.device(settings.device))

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too
        self, images: ImageInput, *, threshold: float = 0.5, batch_size: int = 1
    ) -> Prediction: ...

    @overload
    def __call__(
        self, images: Iterable[ImageInput], *, threshold: float = 0.5, batch_size: int = 1
    ) -> list[Prediction]: ...

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        threshold: float = 0.5,
        batch_size: int = 1,
    ) -> Prediction | list[Prediction]:
        """Detect objects in one image, or in each of several.

        Args:
            images: a path, a Pillow image, an RGB array uint8 [H, W, 3], or a tensor [3, H, W] (uint8, or float in
                [0, 1]); or an iterable of these.
            threshold: lowest score of an object, in [0, 1].
            batch_size: images per batch. Images of different sizes are padded, which changes predictions slightly.

        Returns:
            One prediction for one image, a list of them for an iterable.

        Raises:
            UserError: an image can't be read.
            ValueError: an array or tensor has another shape or type.
        """
        if isinstance(images, ImageInput):
            return self([images], threshold=threshold)[0]

        predictions: list[Prediction] = []
        for chunk in batched(images, batch_size):
            tensors = [to_uint8_tensor(image, self.exif) for image in chunk]
            batch = [preprocess(tensor, self.transforms) for tensor in tensors]
            orig_sizes, sizes = _sizes_hw(batch)
            predictions += self.predict_batch(collate(batch)[0], orig_sizes, sizes, threshold)
        return predictions

    @torch.no_grad()
    def predict_batch(
        self, samples: PackedImages, orig_sizes: Tensor, sizes: Tensor, threshold: float = 0.0
    ) -> list[Prediction]:
        """Detect objects in a collated batch.

        Args:
            samples: uint8 images, resized.
            orig_sizes: int64 [B, 2], (height, width) of the original images. Boxes and masks are in their pixels.
            sizes: int64 [B, 2], (height, width) of the images in the batch, without padding.
            threshold: lowest score of an object. Masks are computed for objects above it only.

        Returns:
            A prediction for each image.
        """
        inputs = normalize(samples.to(self.device, non_blocking=True), **self.model.normalization)
        with engine.autocast(self.device, self.amp):
            outputs = self.model(inputs)
        results = engine.postprocess(self.postprocessors, outputs, orig_sizes, sizes, threshold)
        return [
            self._prediction(result, (int(height), int(width)))
            for result, (height, width) in zip(results, orig_sizes.tolist(), strict=True)
        ]

    def attention(
        self, image: ImageInput, *, threshold: float = 0.5, layers: Iterable[int] | None = None
    ) -> tuple[Prediction, ImageAttention]:
        """Detect objects in one image, and return the attention of the detector in pixels of the image.

            prediction, attention = predictor.attention("image.jpg")
            heat = attention.decoder_map(query=prediction.queries[0])  # of the best object, [h, w]

        Args:
            image, threshold: as for a call.
            layers: the layers to record, see `models.attention_maps.record_attention`. Default: all.

        Raises:
            UserError: the image can't be read, there is no such layer, or the detector is compiled.
        """
        pixels = to_uint8_tensor(image, self.exif)
        with record_attention(self.model, layers) as attention:
            prediction = self(pixels, threshold=threshold)
        return prediction, attention.image(0, prediction.size_hw)

    def _prediction(self, result: dict[str, Any], size_hw: tuple[int, int]) -> Prediction:
        # Softmax detectors have one result per query, in the order of the queries. A stable sort keeps ties in it.
        order = result["scores"].argsort(descending=True, stable=True)  # [K]
        labels = result["labels"][order]
        rles, panoptic = result.get("masks"), result.get("panoptic")
        height, width = size_hw
        limits = torch.tensor([width, height, width, height])
        return Prediction(
            scores=result["scores"][order],
            labels=labels,
            # Post-processing does not clip, as published.
            boxes=torch.minimum(result["boxes"][order].clamp(min=0), limits),  # [K, 4]
            size_hw=size_hw,
            names=[self._class_name(label) for label in labels.tolist()],
            category_ids=[self._category_id(label) for label in labels.tolist()],
            rles=None if rles is None else [rles[i] for i in order.tolist()],
            panoptic=None if panoptic is None else self._panoptic(panoptic),
            best_score=result["best_score"],
            queries=result["queries"][order],
        )

    def _panoptic(self, result: dict[str, Any]) -> Panoptic:
        """Return a result of `PostProcessPanoptic.segment`, whose ids start from 0, in COCO's convention."""
        segments = [
            {
                **segment,
                "id": segment["id"] + 1,
                "category_id": self._category_id(segment["category_id"]),
                "name": self._class_name(segment["category_id"]),
            }
            for segment in result["segments_info"]
        ]
        return Panoptic((result["ids"] + 1).to(torch.int32), segments)

    def _class_name(self, label: int) -> str:
        return self.classes.names.get(label, f"class {label}")

    def _category_id(self, label: int) -> int:
        return self.classes.category_ids.get(label, label)

    def predict_files(
        self,
        images: ImageFiles,
        *,
        threshold: float = 0.5,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> Iterator["FileResult"]:
        """Yield a result for each of many files, in their order, read by dataloader workers.

        Each file is decoded once. A file that can't be read gives a result with `error` instead of a prediction.
        """
        loader: DataLoader = DataLoader(
            _FileDataset(images, self.transforms, self.exif),
            batch_size,
            collate_fn=_collate_readable,
            num_workers=num_workers,
            worker_init_fn=init_worker,
            pin_memory=self.device.type == "cuda",
        )
        for batch, results in loader:
            predictions: Iterator[Prediction] = iter(())
            if batch is not None:
                samples, orig_sizes, sizes = batch
                predictions = iter(self.predict_batch(samples, orig_sizes, sizes, threshold))
            for result in results:
                if result.error is None:
                    result.prediction = next(predictions)
                yield result


def object_label(num_classes: int) -> int:
    """Return the class output of a pretext's detector that means "object": 1, or 0 if there is only one class."""
    return min(OBJECT_ID, num_classes - 1)


def _set_panoptic_threshold(
    postprocessors: Mapping[str, Any], threshold: float, source: str
) -> None:
    if "panoptic" not in postprocessors:
        raise UserError(f"{source} is not a panoptic detector: omit panoptic_threshold")
    if not 0 <= threshold <= 1:
        raise UserError(f"panoptic_threshold={threshold}: must be in [0, 1]")
    postprocessors["panoptic"].threshold = threshold


def exif_of_training(checkpoint: Checkpoint) -> str | None:
    """Return "apply" or "ignore" if the training images were used in this way, None if it is not known."""
    for name in ("exif", "exif_of_training"):
        if checkpoint.args.get(name) in ("apply", "ignore"):
            return checkpoint.args[name]
    return None


def _trained_size(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image size that a run of this project chose; {} for the usual one.

    A pretext trains on smaller images by default, which says nothing about the size for detection.
    """
    stored = checkpoint.args
    pretext = PRETEXTS.get(stored.get("pretext") or "")
    is_default = pretext and stored.get("image_size") == pretext.defaults.get("image_size")
    if "script" not in stored or is_default or "image_size" in given:
        return {}
    names = ("image_size", "max_size")
    return {name: stored[name] for name in names if stored.get(name) and name not in given}


def _load_checkpoint(source: str) -> Checkpoint:
    return load_checkpoint(published_url(source) if source in HUB_MODELS else source)


@dataclass
class FileResult:
    """What was found in one file.

    Attributes:
        index: position of the file in the list of images.
        image: uint8 [3, H, W], as decoded; None if the file can't be read.
        prediction: the objects found; None if the file can't be read.
        error: why the file can't be read.
        ignored_orientation: EXIF orientation that was ignored without `--exif`; 1: none.
    """

    index: int
    image: Tensor | None = None
    prediction: Prediction | None = None
    error: str | None = None
    ignored_orientation: int = 1


class _FileDataset(Dataset):
    """Item i is (result without a prediction, sample); the sample is None if the file can't be read."""

    def __init__(self, images: ImageFiles, transforms: Transform, exif: str | None) -> None:
        self.images, self.transforms, self.exif = images, transforms, exif

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[FileResult, tuple[Tensor, Target] | None]:
        try:
            decoded = decode_image(self.images.file(index), self.exif)
        except BadImageError as error:
            return FileResult(index, error=str(error)), None
        image = to_tensor(decoded.image)  # [3, H, W]
        ignored = decoded.orientation if decoded.rotation == UNDECIDED else 1
        result = FileResult(index, image, ignored_orientation=ignored)
        return result, preprocess(image, self.transforms, index)


def _collate_readable(
    batch: Sequence[tuple[FileResult, tuple[Tensor, Target] | None]],
) -> tuple[tuple[PackedImages, Tensor, Tensor] | None, list[FileResult]]:
    """Return ((batch of the readable images, sizes of originals, sizes in the batch) or None without any, results)."""
    results = [result for result, _ in batch]
    samples = [sample for _, sample in batch if sample is not None]
    if not samples:
        return None, results
    return (collate(samples)[0], *_sizes_hw(samples)), results


def _sizes_hw(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, Tensor]:
    """Return the sizes of the original images and of the resized ones, [B, 2] each."""
    orig_sizes, sizes = (
        torch.stack([target[key] for _, target in batch]) for key in ("orig_size", "size")
    )
    return orig_sizes, sizes


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items, the last one perhaps shorter. itertools.batched needs Python 3.12."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def preprocess(image: Tensor, transforms: Transform, index: int = 0) -> tuple[Tensor, Target]:
    """Resize an image uint8 [3, H, W] for the detector; return it with a target that has its sizes."""
    size_hw = torch.tensor(image.shape[-2:])  # [2]
    target = {
        "image_id": torch.tensor([index + 1]),
        "orig_size": size_hw,
        "size": size_hw.clone(),  # the transforms change this one
    }
    # Transforms need a random state, but in evaluation there is only one size to draw.
    resized, target = transforms(image, target, SampleRNG.from_key(0, 0, index))
    return cast(Tensor, resized), target


def to_uint8_tensor(image: ImageInput, exif: str | None = None) -> Tensor:
    """Convert any supported input to an RGB tensor uint8 [3, H, W] on the CPU.

    Args:
        exif: "apply" rotates files and Pillow images as their EXIF orientation says.

    Raises:
        UserError: a file can't be read, or an image has floating-point pixels.
        ValueError: an array or tensor has another shape, type or range.
    """
    if isinstance(image, str | Path):
        return _read(str(image), exif)
    if isinstance(image, Image.Image):
        return _convert(image, exif)
    if isinstance(image, np.ndarray):
        return _array_to_tensor(image)

    is_float = image.is_floating_point()
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or is_float):
        raise ValueError(
            f"a tensor must be [3, H, W], uint8 or float in [0, 1], got {image.dtype} {list(image.shape)}"
        )
    if image.dtype == torch.uint8:
        return image.cpu()
    # Resizing may leave the range a little. Pixels up to 255 would all be white.
    if image.numel() and not (image.min() > -0.5 and image.max() < 1.5):
        raise ValueError(
            f"a tensor must be uint8 or float in [0, 1], got {image.min():g} to {image.max():g}: divide pixels by 255, "
            "without normalization"
        )
    # Back to uint8, so that every input takes the same path as a decoded file.
    return (image.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)


def _array_to_tensor(image: np.ndarray) -> Tensor:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an array must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return torch.from_numpy(image.copy()).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def _convert(image: Image.Image, exif: str | None) -> Tensor:
    try:
        with pillow_warnings():
            return to_tensor(convert_image(image, exif).image)
    except BadImageError as error:
        raise UserError(f"an image of Pillow: {error}") from error


def _read(file: ImageFile, exif: str | None) -> Tensor:
    try:
        return read_image(file, exif)
    except BadImageError as error:
        raise UserError(f"{file}: {error}: give an image that can be read") from error
