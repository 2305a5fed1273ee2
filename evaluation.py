"""What is measured on validation images: a detector with its classes, or boxes whatever their class.

Both are called `evaluation(model, epoch)` and return the `test_*` values of the log.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engine
from datasets import build_dataset, build_loader
from datasets.evaluators.per_class import class_table
from datasets.evaluators.proposals import ProposalEvaluator
from datasets.labelled import few_shot
from datasets.sample import SampleDataset
from models.criterion import SetCriterion
from models.postprocess import ClassAgnosticPostProcess
from predictor import Predictor
from util.box_ops import box_cxcywh_to_xyxy
from util.coco import BBOX_METRICS
from util.distributed import is_main_process, share_statistics, unwrap_model
from util.files import write_text
from util.logger import log
from util.plots.pages import prediction_page
from util.settings import FINETUNE, Settings
from util.settings import settings as make_settings
from util.settings.frozen import GIVEN
from util.settings.registry import PRETEXTS

PROPOSAL_FILES = (
    "proposal_metrics.json",
    "proposals.json",
)  # metrics, and boxes in COCO's results format
EXAMPLES = 12  # images on the page of predictions
# What a pretext's settings say of the validation images and how they are loaded.
VALIDATION_FLAGS = (
    "dataset_file",
    "coco_path",
    "data_root",
    "voc_path",
    "voc_val",
    "airbus_path",
    "image_size",
    "max_size",
    "device",
    "batch_size",
    "num_workers",
    "amp",
    "seed",
)


class Evaluation:
    """Losses and metrics on the validation images, logged; `metrics.json`, `per_class.json`, `results.json` and a page
    of predictions in the run's folder.
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
        self.settings, self.dataset, self.criterion, self.postprocessors = (
            settings,
            dataset,
            criterion,
            postprocessors,
        )
        self.device, self.folder = device, folder
        self.loader = build_loader(dataset, settings, train=False)
        self.novel = (
            few_shot.novel_names(settings, dataset.class_names) if settings.few_shot else None
        )

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, Any]:
        """Returns the values for the log, with the prefix `test_`."""
        evaluator = self.dataset.evaluator(self.settings)
        values, examples = engine.evaluate(
            model,
            self.criterion,
            self.postprocessors,
            self.loader,
            evaluator,
            device=self.device,
            normalization=unwrap_model(model).normalization,
            amp=self.settings.amp == "bf16",
            keep_examples=EXAMPLES,
        )
        per_class = values.pop("per_class")
        table = class_table(per_class)
        if self.novel is not None:
            per_class = few_shot.with_groups(per_class, self.novel)
            values["few_shot"] = few_shot.group_means(per_class)
            table += "\n" + few_shot.group_table(per_class, values["few_shot"])
        log.info("%s\n%s", _summary(values), table)
        if self.folder is not None and is_main_process():
            write_text(self.folder / "results.json", json.dumps(evaluator.results()))
            write_text(
                self.folder / "metrics.json", json.dumps({"epoch": epoch, **values}, indent=1)
            )
            write_text(
                self.folder / "per_class.json",
                json.dumps({"epoch": epoch, "classes": per_class}, indent=1),
            )
            rows = [_page_row(example) for example in examples]
            prediction_page(rows, self.dataset.class_names, self.folder / "predictions.png")
        return {f"test_{name}": value for name, value in values.items()}


def _summary(values: Mapping[str, Any]) -> str:
    """AP and the loss in one line, recalls in a second one where there are any."""
    shown = [
        f"{name} {value:.3f}"
        for name, value in zip(BBOX_METRICS, values["coco_eval_bbox"], strict=False)
    ]
    recalls = f"\n{'  '.join(shown[6:])}" if shown[6:] else ""
    return f"{'  '.join(shown[:6])}  loss {values['loss']:.3f}{recalls}"


def _page_row(example: dict) -> tuple:
    """(image, predictions, ground truth) of one example, boxes in pixels of the image."""
    image = example["image"]
    height, width = image.shape[1:]
    boxes = box_cxcywh_to_xyxy(example["boxes_cxcywh"]) * torch.tensor(
        [width, height, width, height]
    )
    return (
        image.permute(1, 2, 0).numpy(),
        example["predictions"],
        {"boxes": boxes, "labels": example["labels"]},
    )


# ------------------------------------------------------------------------------------------------------ class-agnostic


class ClassAgnosticEvaluation:
    """How well the boxes of a model cover the annotated objects, whatever their class, as DETReg reports it (Bar et al.
    2022, section 4.4).

    Args:
        settings: of the data, as `validation_settings` gives them.
        label: the class output that says "object"; None: the best of all classes.
    """

    def __init__(
        self, settings: Settings, dataset: SampleDataset, *, label: int | None, device: torch.device
    ) -> None:
        self.dataset, self.label, self.device = dataset, label, device
        self.amp, self.backend = settings.amp == "bf16", settings.coco_evaluator
        self.loader = build_loader(dataset, settings, train=False)

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Returns `test_object_AP` and the other metrics for the log."""
        metrics, _ = self.evaluate(model)
        log.info("class-agnostic: %s", shown_metrics(metrics))
        return {f"test_object_{name}": value for name, value in metrics.items()}

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], ProposalEvaluator]:
        """The metrics of `model`, a detector or a pretext around one, and the evaluator with its boxes."""
        whole = unwrap_model(model)
        share_statistics(whole)  # the pretext's own parts too, which continue to train
        detector = whole.base_detector()
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


def evaluate_proposals_of(
    predictor: Predictor, validation: Settings, folder: Path | None
) -> dict[str, float]:
    """Class-agnostic metrics of a predictor's detector on labelled validation images, logged and saved."""
    dataset = build_dataset("val", validation, any_class_count=True)
    label = predictor.postprocess.label
    evaluation = ClassAgnosticEvaluation(validation, dataset, label=label, device=predictor.device)
    metrics, evaluator = evaluation.evaluate(predictor.model)
    save_proposal_metrics(folder, {"checkpoint": predictor.classes.source}, metrics, evaluator)
    return metrics


def save_proposal_metrics(
    folder: Path | None,
    what: Mapping[str, Any],
    metrics: Mapping[str, float],
    evaluator: ProposalEvaluator,
) -> None:
    """Logs the metrics, and writes them and the boxes into the folder."""
    log.info("class-agnostic: %s", shown_metrics(metrics))
    if folder is not None and is_main_process():
        write_text(folder / PROPOSAL_FILES[0], json.dumps({**what, **metrics}, indent=1) + "\n")
        write_text(folder / PROPOSAL_FILES[1], json.dumps(evaluator.results()))


def validation_settings(settings: Settings) -> Settings:
    """Settings of the labelled validation images on which the boxes of a pretext's detector are evaluated.

    With `--eval` or `--viz` they follow from the given flags alone: how a checkpoint was trained must not change its
    metrics. During training the images are those of the run's dataset, of COCO for a custom one, in the usual size of
    an evaluation unless the run has a size of its own.
    """
    if settings.eval or settings.viz:
        given = set(VALIDATION_FLAGS) & set(settings.names_from(GIVEN))
        return make_settings(FINETUNE, **{name: getattr(settings, name) for name in sorted(given)})
    flags: dict[str, Any] = {name: getattr(settings, name) for name in VALIDATION_FLAGS}
    if settings.dataset_file == "custom":
        flags["dataset_file"] = "coco"  # main.py does not have the flags of validation annotations
    if settings.image_size == PRETEXTS[settings.pretext].defaults.get("image_size"):
        del flags["image_size"]
    return make_settings(FINETUNE, **flags)


def shown_metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
