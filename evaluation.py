"""Evaluation on validation images: of a detector with its classes, or class-agnostic, of boxes only.

Both evaluations are called as `evaluation(model, epoch)` and return the `test_*` values of the log.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import engine
from datasets import build_dataset, build_loader
from datasets.evaluators.analysis import ImageScore, analyse
from datasets.evaluators.per_class import class_table
from datasets.evaluators.proposals import ProposalEvaluator
from datasets.labelled import few_shot
from datasets.sample import SampleDataset
from models.criterion import SetCriterion
from models.postprocess import ClassAgnosticPostProcess
from predictor import Predictor
from util.bf16 import AMP_DTYPES
from util.box_ops import box_cxcywh_to_xyxy
from util.coco import BBOX_METRICS
from util.distributed import broadcast_batch_norm_stats, is_main_process, unwrap_model
from util.files import to_json, write_text
from util.logger import log
from util.plots.pages import prediction_page
from util.runs.folder import ANALYSIS, BEST_IMAGES, WORST_IMAGES
from util.runs.optional_files import training_continues
from util.settings import FINETUNE, Settings
from util.settings import settings as make_settings
from util.settings.frozen import GIVEN
from util.settings.registry import PRETEXTS
from visualization import draw_scored_images

METRICS_FILE = "proposal_metrics.json"
BOXES_FILE = "proposals.json"  # in COCO's results format
PROPOSAL_OUTPUTS = (METRICS_FILE, BOXES_FILE)
NUM_EXAMPLES = 12  # images on the page of predictions
NUM_SCORED_IMAGES = 4  # best, and worst, images

# Settings of a pretext's run that say which validation images to use and how to load them.
VALIDATION_FLAGS = (
    "dataset_file",
    "coco_path",
    "data_root",
    "voc_path",
    "voc_val",
    "airbus_path",
    "exif",
    "image_size",
    "max_size",
    "device",
    "batch_size",
    "eval_batch_size",
    "bucket_aspect",
    "num_workers",
    "amp",
    "seed",
)


class Evaluation:
    """Evaluate a detector: log losses and metrics, and write `metrics.json`, `per_class.json`, `results.json`,
    `analysis.json` and pictures to the run's folder.

    With `--eval` on images without any box, such as those of COCO's evaluation server, there are no metrics.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: SampleDataset,
        criterion: SetCriterion,
        postprocessors: dict[str, nn.Module],
        *,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.settings, self.dataset = settings, dataset
        self.criterion, self.postprocessors = criterion, postprocessors
        self.device, self.folder = device, folder
        self.loader = build_loader(dataset, settings, train=False, in_order=NUM_EXAMPLES)
        annotations = getattr(dataset, "annotations", None)
        # During training, metrics of -1 keep the log of each epoch complete.
        self.has_metrics = not settings.eval or annotations is None or len(annotations.labels) > 0
        self.novel_classes = None
        if settings.few_shot:
            self.novel_classes = few_shot.novel_class_names(settings, dataset.class_names)

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, Any]:
        """Evaluate `model` and return the values for the log, with the prefix `test_`."""
        evaluator = self.dataset.evaluator(self.settings)
        values, examples = engine.evaluate(
            model,
            self.criterion,
            self.postprocessors,
            self.loader,
            evaluator,
            device=self.device,
            normalization=unwrap_model(model).normalization,
            amp=AMP_DTYPES[self.settings.amp],
            num_examples=NUM_EXAMPLES,
        )

        per_class = values.pop("per_class")
        table = class_table(per_class)
        panoptic_per_class = values.pop("panoptic_per_class", [])
        if panoptic_per_class:
            table += "\n" + class_table(panoptic_per_class)
        if self.novel_classes is not None:
            per_class = few_shot.add_groups(per_class, self.novel_classes)
            values["few_shot"] = few_shot.group_means(per_class)
            table += "\n" + few_shot.group_table(per_class, values["few_shot"])
        if self.has_metrics:
            log.info("%s\n%s", _summary(values), table)
        else:
            log.info("no metrics: %s has no box", self.dataset.annotation_file)

        if self.folder is not None and is_main_process():
            classes = {"epoch": epoch, "classes": per_class}
            if panoptic_per_class:
                classes["panoptic"] = panoptic_per_class
            # log.txt has the metrics of all epochs. With --eval these files are what the user waits for.
            with nullcontext() if self.settings.eval else training_continues():
                self._write_files(
                    self.folder, evaluator, {"epoch": epoch, **values}, classes, examples
                )
        return {f"test_{name}": value for name, value in values.items()}

    def _write_files(
        self,
        folder: Path,
        evaluator: Any,
        metrics: Mapping[str, Any],
        classes: Mapping[str, Any],
        examples: Sequence[dict],
    ) -> None:
        write_text(folder / "results.json", to_json(evaluator.results()))
        if self.has_metrics:
            _write_json(folder / "metrics.json", metrics)
            _write_json(folder / "per_class.json", classes)
            self._write_analysis(evaluator.rows(), metrics["epoch"])
        rows = [_example_row(example) for example in examples]
        prediction_page(rows, self.dataset.class_names, folder / "predictions.png")

    def _write_analysis(self, rows: np.ndarray, epoch: int) -> None:
        """Write what is found, confused and missed, and draw the best and the worst images.

        rows: all detections, see `DetectionEvaluator.rows`.
        """
        assert self.folder is not None
        ground_truth = self.dataset.ground_truth
        analysis = analyse(rows, ground_truth)
        best, worst = analysis.best_and_worst(NUM_SCORED_IMAGES)
        record = {
            "epoch": epoch,
            "class_names": {str(c["id"]): c["name"] for c in ground_truth["categories"]},
            **analysis.as_dict(),
            "best_images": [self._image_record(image) for image in best],
            "worst_images": [self._image_record(image) for image in worst],
        }
        write_text(self.folder / ANALYSIS, to_json(record))
        for images, name in ((best, BEST_IMAGES), (worst, WORST_IMAGES)):
            draw_scored_images(images, self.dataset, rows, analysis.threshold, self.folder / name)

    def _image_record(self, image: ImageScore) -> dict[str, Any]:
        annotations = self.dataset.annotations
        index = int(np.flatnonzero(annotations.image_ids == image.image_id)[0])
        return {"file_name": annotations.file_names[index], **asdict(image)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, to_json(content, indent=1))


def _summary(values: Mapping[str, Any]) -> str:
    """Return the AP metrics of boxes and the loss in one line, and in further ones, where there are any, average
    recalls, the metrics of masks, and panoptic quality.
    """
    precision, recall = _named_metrics(values["coco_eval_bbox"])
    lines = [f"{precision}  loss {values['loss']:.3f}", recall]
    if "coco_eval_masks" in values:
        lines += [f"masks: {line}" for line in _named_metrics(values["coco_eval_masks"])]
    if "PQ_all" in values:
        names = {"PQ_all": "all", "PQ_th": "things", "PQ_st": "stuff"}
        qualities = [
            f"{name}: PQ {values[key]['pq']:.3f} SQ {values[key]['sq']:.3f} RQ {values[key]['rq']:.3f}"
            for key, name in names.items()
        ]
        lines.append("panoptic, " + "  ".join(qualities))
    return "\n".join(filter(None, lines))


def _named_metrics(stats: Sequence[float]) -> tuple[str, str]:
    """Return the average precisions, and the average recalls if there are any, as text."""
    # Not strict: COCO has 12 metrics, VOC has three.
    metrics = [f"{name} {value:.3f}" for name, value in zip(BBOX_METRICS, stats, strict=False)]
    return "  ".join(metrics[:6]), "  ".join(metrics[6:])


def _example_row(example: dict) -> tuple:
    """Return (image uint8 [h, w, 3], predictions, ground truth), with boxes [N, 4] in pixels of the image.

    Masks of the ground truth are bool [N, h, w].
    """
    image = example["image"]  # [3, h, w]
    height, width = image.shape[1:]
    scale = torch.tensor([width, height, width, height])
    boxes_xyxy_abs = box_cxcywh_to_xyxy(example["boxes_cxcywh"]) * scale
    ground_truth = {"boxes": boxes_xyxy_abs, "labels": example["labels"]}
    if "masks" in example:
        ground_truth["masks"] = example["masks"]
    return image.permute(1, 2, 0).numpy(), example["predictions"], ground_truth


# ------------------------------------------------------------------------------------------------------ class-agnostic


class ClassAgnosticEvaluation:
    """Class-agnostic AP and AR of a model's boxes, as DETReg reports them (Bar et al. 2022, section 4.4).

    Args:
        settings: of the validation data, see `validation_settings`.
        label: the class output that means "object"; None takes the best score over all classes.
    """

    def __init__(
        self, settings: Settings, dataset: SampleDataset, *, label: int | None, device: torch.device
    ) -> None:
        self.dataset, self.label, self.device = dataset, label, device
        self.amp, self.backend = AMP_DTYPES[settings.amp], settings.coco_evaluator
        self.loader = build_loader(dataset, settings, train=False)

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Evaluate `model` and return `test_object_AP` and the other metrics for the log."""
        metrics, _ = self.evaluate(model)
        log.info("class-agnostic: %s", format_metrics(metrics))
        return {f"test_object_{name}": value for name, value in metrics.items()}

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], ProposalEvaluator]:
        """Return the metrics of `model`, a detector or a pretext around one, and the evaluator with its boxes."""
        pretext = unwrap_model(model)
        # Also the batch norm of the pretext's own heads, which is not in the detector: training continues with it.
        broadcast_batch_norm_stats(pretext)

        detector = pretext.base_detector()
        evaluator = ProposalEvaluator(self.dataset.ground_truth, self.backend)
        postprocess = ClassAgnosticPostProcess(detector.classification, self.label)
        metrics, _ = engine.evaluate(
            detector,
            None,
            {"bbox": postprocess},
            self.loader,
            evaluator,
            device=self.device,
            normalization=detector.normalization,
            amp=self.amp,
        )
        return metrics, evaluator


def evaluate_class_agnostic(
    predictor: Predictor, validation: Settings, folder: Path | None
) -> dict[str, float]:
    """Evaluate the boxes of a class-agnostic predictor on labelled validation images; log and save the metrics."""
    dataset = build_dataset("val", validation, allow_any_num_classes=True)
    label = predictor.postprocess.label
    evaluation = ClassAgnosticEvaluation(validation, dataset, label=label, device=predictor.device)
    metrics, evaluator = evaluation.evaluate(predictor.model)
    save_proposal_metrics(folder, {"checkpoint": predictor.classes.source}, metrics, evaluator)
    return metrics


def save_proposal_metrics(
    folder: Path | None,
    source: Mapping[str, Any],
    metrics: Mapping[str, float],
    evaluator: ProposalEvaluator,
) -> None:
    """Log the metrics, and write them and the boxes to the folder.

    source: what made the boxes; it is written in front of the metrics.
    """
    log.info("class-agnostic: %s", format_metrics(metrics))
    if folder is not None and is_main_process():
        write_text(folder / METRICS_FILE, to_json({**source, **metrics}, indent=1) + "\n")
        write_text(folder / BOXES_FILE, to_json(evaluator.results()))


def validation_settings(settings: Settings) -> Settings:
    """Return the settings of the labelled validation images for a pretext's detector.

    With `--eval` or `--viz` they follow from the given flags alone: how a checkpoint was trained must not change its
    metrics. During training they follow the run: its dataset (COCO for a custom one) and its image size if that was
    chosen, the usual evaluation size otherwise.
    """
    if settings.eval or settings.viz:
        given = set(VALIDATION_FLAGS) & set(settings.names_from(GIVEN))
        return make_settings(FINETUNE, **{name: getattr(settings, name) for name in sorted(given)})

    flags: dict[str, Any] = {name: getattr(settings, name) for name in VALIDATION_FLAGS}
    if settings.dataset_file == "custom":
        flags["dataset_file"] = "coco"  # main.py does not have the flags of validation annotations
    if settings.image_size == PRETEXTS[settings.pretext].defaults.get("image_size"):
        del flags["image_size"]  # the pretext's default is smaller than the size for evaluation
    return make_settings(FINETUNE, **flags)


def format_metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
