"""The training and evaluation loops: one training step, one training epoch, one evaluation, for both entry scripts.

Everything comes in as an object. Nothing here looks at the name of a detector, a pretext or a dataset.

Letters in shape comments: B images per GPU, N objects of an image, K detections per image, H and W the padded size of a
batch, h and w the size of one image.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.samplers import EpochSampler, Segment
from datasets.transfer import LookAhead, Transfer
from models.criterion import SetCriterion
from util.distributed import (
    all_gather_object,
    broadcast_batch_norm_stats,
    collective,
    get_world_size,
    unwrap_model,
)
from util.errors import NonFinite, StopRequested, UserError
from util.logger import Progress
from util.nested_tensor import NestedTensor
from util.packed_images import PackedImages
from util.packed_targets import PackedTargets, Targets
from util.runs.meters import (
    NUM_PAIRS_KEY,
    Averages,
    BadImages,
    LossReader,
    average_class_error,
    to_host,
    weight_class_error,
)
from util.runs.nonfinite import Batch, NonFiniteGuard
from util.runs.optimizer import clip_gradient, step_if_finite
from util.runs.signals import StopSignal
from util.runs.step_checkpoints import SaveSchedule
from util.runs.weight_average import WeightAverage

SINGLE_VALUE = "Expected more than 1 value per channel"  # PyTorch's message of batch norm

# Losses in the progress bar; those that a run does not have are skipped.
PROGRESS_LOSSES = (
    "loss",
    "loss_ce",
    "loss_bbox",
    "loss_giou",
    "loss_mask",
    "loss_dice",
    "loss_feature",
    "loss_object_embedding",
    "loss_enc_global_contra",
)
GRAD_NORM = "grad_norm"  # key of the log, as in Deformable DETR
PUBLISHED_KEYS = {"stats": "coco_eval_bbox", "stats_masks": "coco_eval_masks"}  # of the log


@dataclass(frozen=True)
class Accumulation:
    """The place of a batch among those of one optimizer step.

    Gradients are those that as many processes with one batch each would have: losses are divided by the mean number
    of targets of a batch, and averaged over the batches.

    Attributes:
        index: from 0.
        size: number of batches.
        mean_targets: mean number of targets of these batches; None: a single batch, which counts its own.
    """

    index: int = 0
    size: int = 1
    mean_targets: float | None = None

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1


def accumulate(
    loader: Iterable[tuple[PackedImages, PackedTargets]], size: int
) -> Iterator[tuple[Accumulation, PackedImages, PackedTargets]]:
    """Yield the batches of a loader with their place in groups of `size`. The last group may be smaller.

    The batches of a group are loaded before the first one is used, to know their number of targets.
    """
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        mean = sum(sum(targets.counts["labels"]) for _, targets in group) / len(group)
        for index, batch in enumerate(group):
            yield Accumulation(index, len(group), mean if size > 1 else None), *batch


@dataclass(kw_only=True)
class TrainState:
    """Model, optimizer, data and progress of a training. `trainer.Run` adds where it is saved.

    Attributes:
        model: wrapped in DistributedDataParallel where there are several processes.
        normalization: `mean` and `std` that the backbone was trained with, for RGB in [0, 1].
        epochs: number of epochs in all.
        clip_max_norm: maximum gradient norm; 0 turns clipping off.
        amp: run the network in this dtype by autocast; None: in float32.
        scaler: scales the losses of float16, see `build_scaler`.
        average: moving average of the weights, which is evaluated and saved instead of them.
        accumulate: number of batches per optimizer step.
        max_iters: end training after this many steps; the learning rate schedule then counts steps instead of epochs.
        epoch, batch: the next ones to train, from 0.
        earlier: the first of these batches, if the epoch began with another batch size or number of processes.
        averages: losses of the current epoch so far.
        step: optimizer steps done since the start of the run, skipped ones included.
        unread_norm: gradient norm of the last step, on the device. It is read one step later, so that the host never
            waits for it.
        guard: skips steps that are not finite.
        schedule: when to save within an epoch. save_requested: whether it is time, by the clock of rank 0.
        on_save: saves within an epoch.
        log_every: call `on_log_step` every this many batches of an epoch; 0: never.
        on_log_step: gets the epoch, the number of its finished batches, and the values of the last one.
        on_step: called after each batch.
        seconds: training time up to `clock`, over all starts of the run.
        clock: when `seconds` was updated, by `time.monotonic`.
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
    amp: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    average: WeightAverage | None = None
    accumulate: int = 1
    max_iters: int | None = None
    epoch: int = 0
    batch: int = 0
    earlier: list[Segment] = field(default_factory=list)
    step: int = 0
    averages: Averages = field(default_factory=Averages)
    bad_images: BadImages = field(default_factory=BadImages)
    stop_signal: StopSignal = field(default_factory=StopSignal)
    unread_norm: Tensor | None = None
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    schedule: SaveSchedule = field(default_factory=SaveSchedule)
    save_requested: bool = False
    on_save: Callable[[], None] | None = None
    log_every: int = 0
    on_log_step: Callable[[int, int, Mapping[str, float]], None] | None = None
    on_step: Callable[[], None] | None = None
    seconds: float = 0.0
    clock: float = 0.0

    @property
    def sampler(self) -> EpochSampler:
        """The loader's batch sampler, which knows the epoch and the position in it."""
        return cast(EpochSampler, self.loader.batch_sampler)

    def progress(self) -> float:
        """Return the finished fraction of the training before step `batch`; 0 at the start."""
        if self.max_iters:
            return self.scheduler.last_epoch / self.max_iters  # the scheduler's "epochs" are steps
        batches = self.earlier_batches + self.sampler.batches_after_earlier
        return (self.epoch + self.batch / batches) / self.epochs

    @property
    def earlier_batches(self) -> int:
        """Number of batches in `earlier`."""
        return sum(batches for _, batches in self.earlier)

    def set_position(self) -> None:
        """Make the loader continue at `epoch` and `batch`."""
        start = self.batch - self.earlier_batches
        self.sampler.set_epoch(self.epoch, start, self.remaining_batches(), self.earlier)

    def count_seconds(self) -> None:
        """Add the time since `clock` to `seconds`."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def remaining_batches(self) -> int | None:
        """Return the number of batches left until `max_iters`, None without `max_iters`."""
        if not self.max_iters:
            return None
        return (self.max_iters - self.scheduler.last_epoch) * self.accumulate


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Run the network in this dtype; None: without autocast.

    Boxes, matching and losses stay in float32: the models cast them themselves.
    """
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=bool(dtype))


def build_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler | None:
    """Return a loss scaler for float16, whose small gradients would become 0. Other dtypes need none.

    A step whose gradients overflow is skipped, and the scale is halved.
    """
    return torch.amp.GradScaler(device.type) if dtype is torch.float16 else None


def forward(
    model: nn.Module, samples: NestedTensor, targets: Targets, amp: torch.dtype | None
) -> dict:
    """Return the outputs of a model. Pretexts see the targets, detectors do not.

    Raises:
        UserError: batch norm in training mode gets a single value per channel, which has no variance.
    """
    try:
        with autocast(samples.tensors.device, amp):
            if unwrap_model(model).needs_targets:
                return model(samples, targets)
            return model(samples)
    except ValueError as error:
        if SINGLE_VALUE not in str(error):
            raise
        raise UserError(
            f"--batch_size {len(samples)}: batch norm can't train on a single value per channel "
            f"({str(error).partition('got ')[2]}); use a larger --batch_size, --num_patches or --image_size, or "
            "--backbone_norm frozen"
        ) from error


def forward_losses(
    model: nn.Module,
    criterion: SetCriterion,
    samples: NestedTensor,
    targets: Targets,
    amp: torch.dtype | None,
    num_targets: float | None = None,
) -> tuple[dict, dict[str, Tensor], Tensor]:
    """Return (outputs, named losses, weighted total loss) of one forward pass. `num_targets`: see `SetCriterion`."""
    outputs = forward(model, samples, targets, amp)
    losses = criterion(outputs, targets, num_targets)
    total = criterion.total_loss(losses)

    if criterion.reproduce_published:
        return outputs, losses, total  # the published class error is a mean over batches
    return outputs, weight_class_error(losses, losses.num_pairs), total


def logged_values(losses: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Return the values of the published log: each weighted loss by its name, each raw value with the suffix
    `_unscaled`, and `loss`, the weighted sum.
    """
    losses = average_class_error(losses)
    unscaled = {
        f"{name}_unscaled": value for name, value in losses.items() if name != NUM_PAIRS_KEY
    }
    scaled = {name: losses[name] * weight for name, weight in weights.items() if name in losses}

    # NUM_PAIRS_KEY is the weight of `class_error` in `Averages`; it never reaches the log.
    unweighted = {name: losses[name] for name in ("class_error", NUM_PAIRS_KEY) if name in losses}
    return {**unscaled, **scaled, "loss": sum(scaled.values()), **unweighted}


def train_step(
    state: TrainState,
    samples: NestedTensor,
    targets: Targets,
    stop: bool,
    place: Accumulation | None = None,
) -> tuple[dict[str, float], bool]:
    """Run forward and backward on one batch, and after the last batch of a step gradient clipping and the optimizer.

    Args:
        samples: normalized images, [B, 3, H, W].
        stop: whether this process was asked to stop.
        place: among the batches of the optimizer step; by default the only one.

    A step is skipped if a loss is not finite, which the host knows before it, or the gradient, which the device finds.

    Returns:
        The values for the log, averaged over processes, and whether any process was asked to stop. `grad_norm` among
        them is that of the previous step.
    """
    place = place or Accumulation()
    guard, is_first = state.guard, place.index == 0
    guard.before_forward(is_first)
    # Gradients are averaged over the ranks once per step.
    without_sync: AbstractContextManager = nullcontext()
    if isinstance(state.model, DistributedDataParallel) and not place.is_last:
        without_sync = state.model.no_sync()
    with without_sync:
        with collective("the forward pass (broadcast of buffers)"):
            _, losses, total = forward_losses(
                state.model, state.criterion, samples, targets, state.amp, place.mean_targets
            )

        # Starts an asynchronous copy of the losses to the host, which overlaps with the backward pass. The flags
        # travel in the same all-reduce, so that every rank stops, and saves, after the same step. So does the gradient
        # norm of the previous step, which is known by now.
        unread = {} if state.unread_norm is None else {GRAD_NORM: state.unread_norm}
        flags = float(stop), float(state.schedule.is_time())
        reader = LossReader({**losses, **unread}, flags)
        if is_first:
            state.optimizer.zero_grad(set_to_none=True)
        total = total / place.size if place.size > 1 else total
        with collective("the backward pass (all_reduce of gradients)"):
            (total if state.scaler is None else state.scaler.scale(total)).backward()

    values = reader.read()
    norm = _check_norm(state, values.pop(GRAD_NORM)) if unread else {}
    guard.check_losses(values, reader)
    if place.is_last and guard.step_is_finite:
        _optimizer_step(state)
    asked_to_stop, state.save_requested = (flag > 0 for flag in reader.flags)
    return {**logged_values(values, state.criterion.weight_dict), **norm}, asked_to_stop


def _check_norm(state: TrainState, norm: float, of_current: bool = False) -> dict[str, float]:
    """Return the gradient norm of a step for the log; {} if it is not finite. `of_current`: see `NonFiniteGuard`."""
    state.unread_norm = None
    is_finite = math.isfinite(norm)
    if is_finite or not _may_be_overflow(state.scaler):
        state.guard.check_gradient(norm, of_current)
    return {GRAD_NORM: norm} if is_finite else {}


def _may_be_overflow(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether a loss scaler may have made a gradient overflow. It halves its scale until that ends, but not below 1."""
    return scaler is not None and scaler.get_scale() >= 1.0


def _optimizer_step(state: TrainState) -> None:
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    state.unread_norm = clip_gradient(state.optimizer, state.clip_max_norm)
    if state.scaler is None:
        step_if_finite(state.optimizer, state.unread_norm)
    else:
        state.scaler.step(state.optimizer)
        state.scaler.update()


def train_one_epoch(state: TrainState) -> None:
    """Train from `state.batch` to the end of the epoch. `state.averages` collects the losses of all its steps.

    Raises:
        NonFiniteLoss: too many steps in a row were not finite, see `NonFiniteGuard`.
        StopRequested: after a step; `state.batch` says where to continue.
    """
    state.model.train()
    state.criterion.train()
    model, sampler = unwrap_model(state.model), state.sampler
    state.set_position()

    num_batches = state.batch + len(sampler)
    bar = Progress(num_batches, f"epoch {state.epoch + 1}/{state.epochs}", start=state.batch)
    num_images = 0
    replaced_before = state.bad_images.count, state.bad_images.boxless_count
    start = state.clock = time.monotonic()

    for place, samples, packed, inputs, targets in _batches_on_device(state):
        state.bad_images.add(packed.problems)
        state.bad_images.add_dropped_boxes(packed.dropped_boxes)
        padding = samples.padding_fraction
        state.guard.add(Batch(samples, packed, state.step, place.mean_targets), place.index == 0)
        values, stop = train_step(state, inputs, targets, state.stop_signal.requested, place)
        values["padding"] = padding
        values["lr"] = state.optimizer.param_groups[0]["lr"]

        if place.is_last:
            # A momentum teacher, for instance, is updated here, from the new weights.
            model.after_step(state.progress())
            if state.average is not None:
                state.average.update()
            if state.max_iters:
                state.scheduler.step()
            state.step += 1
        _add_to_averages(state, values)
        state.batch += 1

        # Not len(samples): a batch of a Siamese pretext has two views of each image.
        num_images += sampler.batch_size * get_world_size()
        throughput = num_images / (time.monotonic() - start)
        bar.step(_progress_text(values, throughput) if bar.will_display() else None)
        if state.log_every and state.on_log_step and state.batch % state.log_every == 0:
            speed = {"images_per_second": throughput}
            state.on_log_step(state.epoch, state.batch, {**values, **speed})
        if state.on_step is not None:
            state.on_step()
        # Only between steps: a checkpoint has no gradients.
        if place.is_last:
            _end_step(state, stop, num_batches)

    # A signal during the last step came after its flag was sent. All ranks must agree, or some would wait for others.
    if any(all_gather_object(state.stop_signal.requested)):
        _raise_stop(state, num_batches)
    state.bad_images.warn_of_epoch(*replaced_before)
    _read_last_norm(state)
    state.count_seconds()


def looks_ahead(device: torch.device, model: Any) -> bool:
    """Whether the backbone computes its maps of the next batch while the host waits for the matching costs.

    The GPU has work then while the host solves the assignment. Only for a backbone whose maps are the same in every
    step.
    """
    return device.type == "cuda" and model.base_detector().backbone[0].constant


def _batches_on_device(
    state: TrainState,
) -> Iterator[tuple[Accumulation, PackedImages, PackedTargets, NestedTensor, Targets]]:
    """Yield the remaining batches of the epoch with their place, on the host and on the device."""
    model, matcher = unwrap_model(state.model), state.criterion.matcher
    batches: LookAhead[Accumulation] = LookAhead(
        accumulate(state.loader, state.accumulate), Transfer(state.device, state.normalization)
    )

    def fetch_next() -> None:
        inputs = batches.fetch_next()
        if inputs is not None:
            with autocast(state.device, state.amp):
                model.base_detector().backbone[0].compute_ahead(inputs.tensors)

    if looks_ahead(state.device, model):
        matcher.while_waiting = fetch_next
    try:
        for (place, samples, packed), inputs, targets in batches:
            yield place, samples, packed, inputs, targets
    finally:
        matcher.while_waiting = None


def _add_to_averages(state: TrainState, values: dict[str, float]) -> None:
    """Add the values of a step to the averages of the epoch; of losses that are not finite only the gradient norm of
    the step before.
    """
    if not state.guard.batch_is_finite:
        values = {name: value for name, value in values.items() if name == GRAD_NORM}
    state.averages.add(values)


def _end_step(state: TrainState, stop: bool, num_batches: int) -> None:
    """After an optimizer step: end a run that has diverged, stop, or save if that is due.

    The end of an epoch has its own checkpoint.
    """
    if state.guard.in_a_row >= state.guard.limit:
        _read_last_norm(state)
        state.count_seconds()
        state.guard.check_limit()
    if stop:
        _raise_stop(state, num_batches)
    is_due = state.schedule.is_due(state.step, state.save_requested)
    if is_due and state.on_save is not None and state.batch < num_batches:
        _read_last_norm(state)
        state.count_seconds()
        state.on_save()


def _read_last_norm(state: TrainState) -> None:
    """Add the gradient norm of the last step to the averages. The host waits for it: once per epoch and save."""
    if state.unread_norm is not None:
        state.averages.add(_check_norm(state, float(state.unread_norm), of_current=True))


def _raise_stop(state: TrainState, num_batches: int) -> None:
    """Raise StopRequested. After the last batch too: the resumed run then ends the epoch without another step."""
    _read_last_norm(state)
    state.count_seconds()
    raise StopRequested(f"epoch {state.epoch + 1}, after batch {state.batch} of {num_batches}")


def _progress_text(values: dict[str, float], throughput: float) -> str:
    losses = [
        f"{name.removeprefix('loss_')} {values[name]:.3f}"
        for name in PROGRESS_LOSSES
        if name in values
    ]
    return f"{' '.join(losses)} lr {values['lr']:.1e} {throughput:.1f} images/s"


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
    amp: torch.dtype | None = None,
    num_examples: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute losses and metrics over a dataset. Each image is evaluated once over all processes.

    Args:
        criterion: None to skip the losses.
        evaluator: gets the detections of each image by `update`, and computes the metrics in `summarize`.
        num_examples: number of images to return with predictions and targets.

    Returns:
        (values, examples): the losses and the metrics, and the first `num_examples` images of this process.
    """
    # Without DistributedDataParallel: ranks may have different numbers of batches, and its forward pass broadcasts
    # buffers, which would wait for ranks that have finished.
    model = unwrap_model(model).eval()
    broadcast_batch_norm_stats(model)
    if criterion is not None:
        criterion.eval()

    averages, bad_images = Averages(), BadImages()
    examples: list[dict[str, Any]] = []
    transfer = Transfer(device, normalization)
    bar = Progress(len(loader), "evaluation")
    for samples, packed in loader:
        bad_images.add(packed.problems)
        bad_images.add_dropped_boxes(packed.dropped_boxes)
        inputs, targets = transfer(samples, packed)
        if criterion is None:
            outputs = forward(model, inputs, targets, amp)
        else:
            outputs, losses, _ = forward_losses(model, criterion, inputs, targets, amp)
            averages.add(logged_values(to_host(losses), criterion.weight_dict), len(samples))

        # Sizes of the image files, so that boxes and masks are in the pixels of the annotations.
        orig_sizes = packed.tensors["orig_size"].view(-1, 2).to(device, non_blocking=True)  # [B, 2]
        sizes = torch.stack([target["size"] for target in targets])  # [B, 2]
        results = postprocess(postprocessors, outputs, orig_sizes, sizes)
        evaluator.update(dict(zip(packed.tensors["image_id"].tolist(), results, strict=True)))
        examples += _collect_examples(samples, targets, results, num_examples - len(examples))
        bar.step()

    bad_images.warn_of_missed_objects()
    bad_images.warn_of_dropped_boxes()
    values = averages.merged().means()
    evaluator.synchronize_between_processes()
    metrics = evaluator.summarize()
    for name, published in PUBLISHED_KEYS.items():
        if name in metrics:
            metrics[published] = metrics.pop(name)
    return {**values, **metrics}, examples


def postprocess(
    postprocessors: Mapping[str, Any],
    outputs: dict,
    orig_sizes: Tensor,
    sizes: Tensor,
    threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the results of each image on the CPU.

    Args:
        postprocessors: `bbox`, and optionally `segm` and `panoptic`, from `build_model`.
        orig_sizes: [B, 2], (height, width) that results are in.
        sizes: [B, 2], (height, width) of the images in the batch, without padding.
        threshold: lowest score of a result.

    Returns:
        `scores`, `labels`, `boxes` and `queries`, see `PostProcess`, and `best_score`, the highest score of the image,
        also below the threshold. With `segm` also `masks`, K compressed RLEs, and
        with `panoptic` also `panoptic`, see `PostProcessPanoptic.segment`.
    """
    results: list[dict[str, Any]] = []
    for result in results_to_host(postprocessors["bbox"](outputs, orig_sizes)):
        keep = result["scores"] >= threshold
        best_score = float(result["scores"].max())
        results.append({key: value[keep] for key, value in result.items()})
        results[-1]["best_score"] = best_score

    if "segm" in postprocessors:
        device = outputs["pred_logits"].device
        queries = [result["queries"].to(device, non_blocking=True) for result in results]
        masks = postprocessors["segm"].encode(queries, outputs, orig_sizes, sizes)
        for result, rles in zip(results, masks, strict=True):
            result["masks"] = rles
    if "panoptic" in postprocessors:
        segmentations = postprocessors["panoptic"].segment(outputs, sizes, orig_sizes)
        for result, segmentation in zip(results, segmentations, strict=True):
            result["panoptic"] = segmentation
    return results


def results_to_host(results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copy the results of a batch to the CPU, with one copy per key instead of one per image.

    Raises:
        NonFinite: a score or box is NaN or infinite. JSON has no such numbers, and no threshold finds such an object.
    """
    # scores and labels [K] -> [B, K], boxes [K, 4] -> [B, K, 4]
    host = {key: torch.stack([result[key] for result in results]).cpu() for key in results[0]}
    for key, values in host.items():
        if not torch.isfinite(values).all():
            raise NonFinite(
                f"the model predicts NaN or infinite {key}: its weights have diverged, or overflow with --amp; "
                "choose an earlier checkpoint, or give --amp no"
            )
    return [{key: values[i] for key, values in host.items()} for i in range(len(results))]


def _collect_examples(
    samples: PackedImages, targets: Targets, results: list[dict], count: int
) -> list[dict]:
    """Return up to `count` images as the model saw them, with predictions and ground truth.

    Masks of the ground truth are bool [N, h, w]; predicted masks and segmentations have the size of the file.
    """
    examples: list[dict] = []
    if count <= 0:
        return examples
    for image, target, result in zip(samples.tensors, targets, results, strict=True):
        if len(examples) >= count:
            break
        height, width = target["size"].tolist()
        orig_height, orig_width = target["orig_size"].tolist()
        scale = torch.tensor([width / orig_width, height / orig_height] * 2)  # [4]
        masks = {}
        if "masks" in target:
            masks["masks"] = target["masks"][:, :height, :width].cpu()  # [N, h, w]
        examples.append(
            {
                **masks,
                "image": image[:, :height, :width].clone(),  # [3, H, W] -> [3, h, w], uint8
                "image_id": int(target["image_id"]),
                "boxes_cxcywh": target["boxes"].cpu(),  # [N, 4], relative to the image
                "labels": target["labels"].cpu(),  # [N]
                # Boxes are in pixels of the file, here of the resized image.
                "predictions": {**result, "boxes": result["boxes"] * scale},
            }
        )
    return examples
