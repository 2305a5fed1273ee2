"""What is measured on validation images: a detector with its classes, or boxes whatever their class.

Both are called `evaluation(model, epoch)` and return the `test_*` values of the log.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engine
from datasets import build_loader
from datasets.collate import to_device
from datasets.evaluators.per_class import class_table
from datasets.evaluators.proposals import OBJECT, ProposalEvaluator
from datasets.labelled import few_shot
from datasets.sample import SampleDataset
from models.criterion import SetCriterion
from models.detector import Detector, full_precision
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed import is_main_process, share_statistics, unwrap_model
from util.files import write_text
from util.logger import Progress, log
from util.plots.pages import prediction_page
from util.runs.meters import BadImages

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP small",
    "AP medium",
    "AP large",
    "AR1",
    "AR10",
    "AR100",
    "AR small",
    "AR medium",
    "AR large",
)
EXAMPLES = 12  # images on the page of predictions
MOST_BOXES = 1000  # of an image, the best ones


class Evaluation:
    """Losses and metrics on the validation images, logged; `metrics.json`, `per_class.json`, `results.json` and a page
    of predictions in the run's folder.
    """

    def __init__(
        self,
        args: Namespace,
        dataset: SampleDataset,
        criterion: SetCriterion,
        postprocessors: dict[str, nn.Module],
        *,
        device: torch.device,
        folder: Path | None,
        normalization: dict,
    ) -> None:
        self.args, self.dataset, self.criterion, self.postprocessors = args, dataset, criterion, postprocessors
        self.device, self.folder, self.normalization = device, folder, normalization
        self.loader = build_loader(dataset, args, train=False)
        self.novel = few_shot.novel_names(args, dataset.class_names) if args.few_shot else None

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, Any]:
        """Returns the values for the log, with the prefix `test_`."""
        evaluator = self.dataset.evaluator(self.args)
        values, examples = engine.evaluate(
            model,
            self.criterion,
            self.postprocessors,
            self.loader,
            evaluator,
            device=self.device,
            normalization=self.normalization,
            amp=self.args.amp == "bf16",
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
            write_text(self.folder / "metrics.json", json.dumps({"epoch": epoch, **values}, indent=1))
            write_text(self.folder / "per_class.json", json.dumps({"epoch": epoch, "classes": per_class}, indent=1))
            rows = [_page_row(example) for example in examples]
            prediction_page(rows, self.dataset.class_names, self.folder / "predictions.png")
        return {f"test_{name}": value for name, value in values.items()}


def _summary(values: Mapping[str, Any]) -> str:
    """AP and the loss in one line, recalls in a second one where there are any."""
    shown = [f"{name} {value:.3f}" for name, value in zip(METRICS, values["coco_eval_bbox"], strict=False)]
    recalls = f"\n{'  '.join(shown[6:])}" if shown[6:] else ""
    return f"{'  '.join(shown[:6])}  loss {values['loss']:.3f}{recalls}"


def _page_row(example: dict) -> tuple:
    """(image, predictions, ground truth) of one example, boxes in pixels of the image."""
    image = example["image"]
    height, width = image.shape[1:]
    boxes = box_cxcywh_to_xyxy(example["boxes_cxcywh"]) * torch.tensor([width, height, width, height])
    return image.permute(1, 2, 0).numpy(), example["predictions"], {"boxes": boxes, "labels": example["labels"]}


# ------------------------------------------------------------------------------------------------------ class-agnostic


@dataclass
class BoxFinder:
    """A detector whose queries each give one box.

    label: the class output that says "object"; None: the best of all classes.
    """

    model: Detector
    label: int | None
    device: torch.device
    amp: bool

    @torch.no_grad()
    def __call__(self, samples, sizes_hw: Tensor) -> list[dict[str, Tensor]]:
        """Normalised images -> `scores` [K], `labels` [K] and `boxes` [K, 4], (x0, y0, x1, y1) in pixels of sizes_hw;
        the best 1000.
        """
        with engine.autocast(self.device, self.amp):
            outputs = self.model(samples)
        logits = full_precision(outputs["pred_logits"])
        boxes = box_cxcywh_to_xyxy(full_precision(outputs["pred_boxes"]))
        scores = logits.softmax(-1)[..., :-1] if self.model.classification.kind == "softmax" else logits.sigmoid()
        scores = scores.amax(-1) if self.label is None else scores[..., self.label]
        scores, order = scores.topk(min(MOST_BOXES, scores.shape[1]), dim=1)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * sizes_hw.flip(1).repeat(1, 2)[:, None].to(boxes)
        labels = torch.full(scores.shape, OBJECT)
        return [
            {"scores": s, "labels": n, "boxes": b} for s, n, b in zip(scores.cpu(), labels, boxes.cpu(), strict=True)
        ]


class ClassAgnosticEvaluation:
    """How well the boxes of a pre-trained model cover the annotated objects, whatever their class, as DETReg reports it
    (Bar et al. 2022, section 4.4): `test_object_AP` and more.

    dataset: labelled validation images. label: the class output that says "object"; None: the best of all classes.
    """

    def __init__(
        self, args: Namespace, dataset: SampleDataset, *, label: int | None, device: torch.device, evaluator: str
    ) -> None:
        self.dataset, self.label, self.device, self.amp = dataset, label, device, args.amp == "bf16"
        self.loader, self.ground_truth, self.evaluator = (
            build_loader(dataset, args, train=False),
            dataset.truth(),
            evaluator,
        )

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        metrics = self.evaluate(model).summarize()
        log.info("class-agnostic: %s", shown_metrics(metrics))
        return {f"test_object_{name}": value for name, value in metrics.items()}

    def evaluate(self, model: nn.Module) -> ProposalEvaluator:
        """The evaluator with the boxes that `model` (a detector, or a pretext around one) finds in all images."""
        model = unwrap_model(model)
        share_statistics(model)
        detector = model.eval().base_detector()
        finder = BoxFinder(detector, self.label, self.device, self.amp)
        evaluator = ProposalEvaluator(self.ground_truth, self.evaluator)
        backbone, bar, bad_images = detector.backbone[0], Progress(len(self.loader), "evaluation"), BadImages()
        for samples, packed in self.loader:
            bad_images.add(packed.problems)
            inputs, targets = to_device(samples, packed, self.device, backbone.mean, backbone.std)
            results = finder(inputs, torch.stack([target["orig_size"] for target in targets]))
            evaluator.update(dict(zip(packed.tensors["image_id"].tolist(), results, strict=True)))
            bar.step()
        bad_images.warn_of_missed_objects()
        evaluator.synchronize_between_processes()
        return evaluator


def shown_metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
