"""DETR's engine: one training step, one training epoch, one evaluation, for both entry scripts.

Everything comes in as an object: nothing here looks at the name of a detector, a pretext or a dataset.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from datasets.collate import to_device
from datasets.samplers import EpochSampler
from models.criterion import SetCriterion
from util.distributed import all_gather_object, get_world_size, share_statistics, unwrap_model
from util.errors import NonFinite, StopRequested
from util.logger import Progress, log
from util.nested_tensor import NestedTensor
from util.packed_targets import Targets
from util.runs.meters import (
    PAIRS,
    Averages,
    BadImages,
    LossReader,
    check_finite,
    check_gradient,
    per_pair,
    to_host,
    with_pairs,
)
from util.runs.signals import StopSignal

PROGRESS_LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_feature")


@dataclass(kw_only=True)
class TrainState:
    """What is trained, with what, and how far it has come. `trainer.Run` adds where it is saved.

    epochs: to train in all. max_iters: ends training after as many steps, which the learning rate schedule then counts
    in place of epochs. normalization: `mean` and `std` of the backbone. epoch, batch: the next ones to train, counted
    from 0. gradient_norm: of the last step, not read from the device yet. seconds: of training, over all sessions.
    """

    model: nn.Module
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: torch.utils.data.DataLoader
    device: torch.device
    normalization: Mapping[str, Sequence[float]]
    epochs: int
    clip_max_norm: float = 0.1
    amp: bool = False
    max_iters: int | None = None
    epoch: int = 0
    batch: int = 0
    averages: Averages = field(default_factory=Averages)
    bad_images: BadImages = field(default_factory=BadImages)
    stop: StopSignal = field(default_factory=StopSignal)
    gradient_norm: Tensor | None = None
    seconds: float = 0.0

    @property
    def sampler(self) -> EpochSampler:
        """The loader's, which knows the epoch and the position in it."""
        return cast(EpochSampler, self.loader.batch_sampler)

    def progress(self) -> float:
        """Fraction of the training that is done, before the step that `batch` counts; 0 at the start."""
        if self.max_iters:
            return self.scheduler.last_epoch / self.max_iters
        return (self.epoch + self.batch / self.sampler.batches_per_epoch) / self.epochs


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 for the network; boxes, matching and losses stay in float32 by themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def forward(model: nn.Module, samples: NestedTensor, targets: Targets, amp: bool) -> dict:
    """The outputs of a model. Pretexts see the targets, detectors do not."""
    with autocast(samples.tensors.device, amp):
        return model(samples, targets) if unwrap_model(model).needs_targets else model(samples)


def forward_losses(
    model: nn.Module, criterion: SetCriterion, samples: NestedTensor, targets: Targets, amp: bool
) -> tuple[dict, dict[str, Tensor], Tensor]:
    """One forward pass: outputs, named losses, weighted total."""
    outputs = forward(model, samples, targets, amp)
    losses = criterion(outputs, targets)
    total = criterion.total(losses)
    return (
        outputs,
        losses if criterion.reproduce_published else with_pairs(losses, losses.num_pairs),
        total,
    )


def logged_values(losses: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """The published log: each weighted loss by its name, each raw value with `_unscaled`, `loss` the weighted sum."""
    losses = per_pair(losses)
    values = {f"{name}_unscaled": value for name, value in losses.items() if name != PAIRS}
    scaled = {name: losses[name] * weight for name, weight in weights.items() if name in losses}
    kept = {name: losses[name] for name in ("class_error", PAIRS) if name in losses}
    return {**values, **scaled, "loss": sum(scaled.values()), **kept}


def train_step(
    state: TrainState, samples: NestedTensor, targets: Targets, stop: bool
) -> tuple[dict[str, float], bool]:
    """Forward, backward, clip, step. Returns the values for the log, averaged over processes, and whether any process
    was asked to stop (`stop` is this one's answer).

    Raises:
        NonFiniteLoss: before the optimizer's step, so that the weights stay as they are; or the gradient of the step
            before was not finite, which is checked only now, since the host would have had to wait for the device.
    """
    try:
        _, losses, total = forward_losses(state.model, state.criterion, samples, targets, state.amp)
        reader = LossReader(losses, float(stop))
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()
        values = reader.read()
        check_finite(
            values, (int(target["image_id"]) for target in targets)
        )  # ids are read only in case of an error
    except NonFinite:
        check_gradient(state.gradient_norm)
        raise
    if state.clip_max_norm > 0:
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        state.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, state.clip_max_norm)
    state.optimizer.step()
    return logged_values(values, state.criterion.weight_dict), reader.flag > 0


def train_one_epoch(state: TrainState) -> None:
    """Trains from `state.batch` to the end of the epoch; `state.averages` grow with each step.

    Raises:
        StopRequested: after a step; `state.batch` says where to continue.
    """
    state.model.train()
    state.criterion.train()
    sampler, model = state.sampler, unwrap_model(state.model)
    sampler.set_epoch(
        state.epoch, state.batch, state.max_iters and state.max_iters - state.scheduler.last_epoch
    )
    steps = state.batch + len(sampler)
    bar = Progress(steps, f"epoch {state.epoch + 1}/{state.epochs}", start=state.batch)
    began, images, bad_before = time.monotonic(), 0, state.bad_images.count
    for samples, packed in state.loader:
        state.bad_images.add(packed.problems)
        images += sampler.batch_size * get_world_size()  # `samples` may hold several views of each
        samples, targets = to_device(samples, packed, state.device, **state.normalization)
        values, stop = train_step(state, samples, targets, state.stop.requested)
        values["lr"] = state.optimizer.param_groups[0]["lr"]
        model.after_step(state.progress())
        if state.max_iters:
            state.scheduler.step()
        state.averages.add(values)
        state.batch += 1
        speed = images / (time.monotonic() - began)
        bar.step(_progress_text(values, speed) if bar.wants_text() else None)
        if stop:
            _stop(state, began, steps)
    if any(
        all_gather_object(state.stop.requested)
    ):  # the signal came in the last step, after its flag was sent
        _stop(state, began, steps)
    if state.bad_images.count > bad_before:
        log.warning(
            "%d unreadable or tiny images were replaced in this epoch (%d different ones in this run)",
            state.bad_images.count - bad_before,
            len(state.bad_images.seen),
        )
    state.seconds += time.monotonic() - began


def _stop(state: TrainState, began: float, steps: int) -> None:
    """Also after the last batch: the resumed run then finishes the epoch without a step."""
    state.seconds += time.monotonic() - began
    raise StopRequested(f"epoch {state.epoch + 1}, after batch {state.batch} of {steps}")


def _progress_text(values: dict[str, float], speed: float) -> str:
    losses = [
        f"{name.removeprefix('loss_')} {values[name]:.3f}"
        for name in PROGRESS_LOSSES
        if name in values
    ]
    return f"{' '.join(losses)} {speed:.1f} images/s lr {values['lr']:.1e}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion | None,
    postprocessors: dict[str, nn.Module],
    loader: torch.utils.data.DataLoader,
    evaluator: Any,
    *,
    device: torch.device,
    normalization: Mapping[str, Sequence[float]],
    amp: bool = False,
    keep_examples: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Losses and metrics over a dataset, each image once over all processes.

    criterion: None: no losses. Returns (values, examples). values: the losses and what the evaluator's `summarize`
    gives. examples: the first `keep_examples` images of this process with predictions and targets.
    """
    model = unwrap_model(model).eval()
    share_statistics(model)
    if criterion is not None:
        criterion.eval()
    averages, bar, bad_images = Averages(), Progress(len(loader), "evaluation"), BadImages()
    examples: list[dict[str, Any]] = []
    for samples, packed in loader:
        bad_images.add(packed.problems)
        inputs, targets = to_device(samples, packed, device, **normalization)
        if criterion is None:
            outputs = forward(model, inputs, targets, amp)
        else:
            outputs, losses, _ = forward_losses(model, criterion, inputs, targets, amp)
            averages.add(logged_values(to_host(losses), criterion.weight_dict), len(samples))
        sizes = torch.stack([target["orig_size"] for target in targets])
        results = results_to_host(postprocessors["bbox"](outputs, sizes))
        evaluator.update(dict(zip(packed.tensors["image_id"].tolist(), results, strict=True)))
        examples += _examples(samples, targets, results, keep_examples - len(examples))
        bar.step()
    bad_images.warn_of_missed_objects()
    values = averages.merged().means()
    evaluator.synchronize_between_processes()
    summary = evaluator.summarize()
    if "stats" in summary:
        summary["coco_eval_bbox"] = summary.pop("stats")  # the published key
    return {**values, **summary}, examples


def results_to_host(results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The results of a batch on the CPU: one copy for each kind of result, not one for each image."""
    host = {name: torch.stack([result[name] for result in results]).cpu() for name in results[0]}
    return [{name: values[i] for name, values in host.items()} for i in range(len(results))]


def _examples(
    samples: NestedTensor, targets: Targets, results: list[dict], count: int
) -> list[dict]:
    """Images as the model saw them, uint8 [3, h, w], with boxes in their pixels."""
    kept = []
    for image, target, result in list(zip(samples.tensors, targets, results, strict=True))[
        : max(count, 0)
    ]:
        (height, width), original = target["size"].tolist(), target["orig_size"].tolist()
        scale = torch.tensor([width / original[1], height / original[0]] * 2)
        kept.append(
            {
                "image": image[:, :height, :width].clone(),
                "image_id": int(target["image_id"]),
                "boxes_cxcywh": target["boxes"].cpu(),
                "labels": target["labels"].cpu(),
                "predictions": {**result, "boxes": result["boxes"] * scale},
            }
        )
    return kept
